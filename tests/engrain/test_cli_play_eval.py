"""`engrain play`, `eval` and `distill`, really run: the math world and a model of 27 008 weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import engrain.cli as shell
from engrain.cli.common import fingerprint
from envs import registry
from envs.base import Split, Task
from envs.math import MathEnv
from envs.splits import split_of
from memory.store import Store

WORLD = ("math", "-o", "convention=answer_tag")


@pytest.fixture(autouse=True)
def _no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output holds data only, as `main` sees to."""
    import transformers.utils.logging as library

    library.disable_progress_bar()
    monkeypatch.setenv("COLUMNS", "200")


def run(*arguments: str, typed: str | bytes | None = None) -> Any:
    result = CliRunner().invoke(shell.app, list(arguments), input=typed)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def output(*arguments: str, typed: str | bytes | None = None) -> str:
    result = run(*arguments, typed=typed)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def stored(engrain_home: Path) -> Store:
    return Store.open(str(engrain_home / "engrain.db"), create=False)


def answers(count: int) -> list[str]:
    tasks = registry.world("math", {"convention": "answer_tag"}).tasks(Split.TRAIN, count, 7)
    return [str(task.parameters["answer"]) for task in tasks]


def test_a_person_plays_at_the_keyboard(engrain_home: Path) -> None:
    first, second = answers(2)
    shown = output("play", *WORLD, "--human", "-n", "2", "--seed", "7", typed=f"<answer>{first}</answer>\n{second}\n")
    assert "Counted. Correct." in shown
    assert "only read in this form: <answer>12</answer>" in shown
    assert "1 of 2 solved" in shown
    with stored(engrain_home) as store:
        assert store.arrivals("math") == 2  # a loop that waits for new training episodes counts them
        right, wrong = sorted(store.episodes(), key=lambda episode: not episode.success)
    assert (right.success, wrong.success) == (True, False)
    assert all(episode.human and episode.model == "human" and not episode.token_ids for episode in (right, wrong))
    assert right.turns[0].action == f"<answer>{first}</answer>"


def test_the_end_of_the_input_ends_the_game(engrain_home: Path) -> None:
    shown = output("play", "frozenlake", "--human", "-n", "3", typed="")
    assert "nothing to store" in shown
    assert "left unfinished" in output("play", "frozenlake", "--human", "-n", "3", typed="[up]\n")
    with stored(engrain_home) as store:
        (episode,) = store.episodes()
    assert episode.stop_reason == "interrupted"
    assert [turn.action for turn in episode.turns] == ["[up]"]


def test_every_game_of_a_person_is_another(engrain_home: Path) -> None:
    for _ in range(2):
        output("play", *WORLD, "--human", typed="1\n")
    with stored(engrain_home) as store:
        assert len({episode.task.id for episode in store.episodes()}) == 2


def test_a_world_without_training_tasks_is_played_on_test_tasks(engrain_home: Path, tmp_path: Path) -> None:
    text = next(t for t in (f"What is {i} + 1?" for i in range(1000)) if split_of(t) is Split.TEST)
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question": text, "answer": "1"}) + "\n")
    shown = output("play", "math", "-o", f"data={questions}", "--human", typed="2\n")
    assert text in shown
    assert "a test task, which no round learns from" in shown
    with stored(engrain_home) as store:
        assert store.arrivals("math") == 0


def test_what_does_not_go_together_is_one_line() -> None:
    for words, said in (
        (("--human", "--co"), "exclude each other"),
        (("--co", "--compare"), "exclude each other"),
        (("--co", "--json"), "a player needs to see the game"),
        (("--human", "--gap"), "--human plays without one"),
        (("--against", "3"), "--against 3 is what --gap and --why ask about"),
        (("--gap", "--base-url", "http://x/v1"), "need the model in this process"),
        (("--gap",), "no round of qwen2.5-coder-0.5b has chosen one for math with these -o options"),
        (("--compare",), "there is nothing to compare the bare model with"),
    ):
        result = run("play", "math", *words)
        assert result.exit_code == 2, result.output
        assert said in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    nameless = run("play", typed="")
    assert nameless.exit_code == 2
    assert "no world was named" in nameless.stderr
    assert "name the world" in run("play", "--json").stderr


def test_bytes_that_are_no_text_are_an_answer_like_any_other(engrain_home: Path) -> None:
    assert "not solved" in output("play", *WORLD, "--human", typed=b"\xff\xfe\n")


def test_the_agent_is_watched_and_its_episodes_are_kept(engrain_home: Path, tiny_folder: Path) -> None:
    command = ("play", *WORLD, "-m", str(tiny_folder), "-n", "2", "--max-tokens", "5")
    shown = output(*command)
    assert shown.count("What is ") == 2
    assert "0 of 2 solved" in shown
    played = json.loads(output(*command, "--json"))
    with stored(engrain_home) as store:
        assert {episode.id for episode in store.episodes()} == {episode["id"] for episode in played}
        assert store.counts()["episode"] == 2  # the same games again are the same episodes


def test_evaluations_say_what_was_measured_and_play_nothing_twice(
    engrain_home: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "knowledge.txt"
    text.write_text("Write <answer>12</answer>.")
    command = ("eval", *WORLD, "-m", str(tiny_folder), "-n", "3", "--max-tokens", "4", "--knowledge", str(text))
    found = json.loads(output(*command, "--paired", "--json"))
    assert list(found["evaluations"]) == ["base model", "knowledge"]
    bare, taught = found["evaluations"].values()
    assert (bare["n"], bare["split"], bare["knowledge"], bare["checkpoint"]) == (3, "test", None, None)
    assert taught["knowledge"] is not None  # not to be taken for the bare model's
    assert bare["low"] <= bare["accuracy"] <= bare["high"]
    assert [r["task_id"] for r in bare["results"]] == [r["task_id"] for r in taught["results"]]
    assert found["gain"]["n"] == 3
    with stored(engrain_home) as store:
        assert store.counts()["episode"] == 6
    monkeypatch.setattr(MathEnv, "step", None)  # what would play now would break
    again = json.loads(output(*command, "--json"))
    assert again["evaluations"]["knowledge"]["results"] == taught["results"]
    assert "knowledge" in output(*command)


def test_broken_episodes_are_told(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    intact, broken = MathEnv.reset, {_tasks(1)[0].id}

    def reset(self: MathEnv) -> Any:
        if self.task.id in broken:
            raise OSError("the world is gone")
        return intact(self)

    monkeypatch.setattr(MathEnv, "reset", reset)
    command = ("eval", *WORLD, "-m", str(tiny_folder), "-n", "2", "--max-tokens", "4")
    result = run(*command)
    assert result.exit_code == 0
    assert "1 of 2 episodes broke off, the first: OSError: the world is gone" in result.stderr
    broken |= {task.id for task in _tasks(2)}
    result = run(*command, "--temperature", "0.5")
    assert result.exit_code == 1
    assert "no episode was played to its end, the first: OSError: the world is gone" in result.stderr


def test_the_same_command_plays_broken_episodes_again_and_no_others(
    engrain_home: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    intact, broken, played = MathEnv.reset, {_tasks(1)[0].id}, []

    def reset(self: MathEnv) -> Any:
        played.append(self.task.id)
        if self.task.id in broken:
            raise OSError("the world is gone")
        return intact(self)

    monkeypatch.setattr(MathEnv, "reset", reset)
    command = ("eval", *WORLD, "-m", str(tiny_folder), "-n", "2", "--max-tokens", "4", "--json")
    first = json.loads(output(*command))["evaluations"]["base model"]
    assert "broke off" in run(*command).stderr
    broken.clear()
    mended = json.loads(output(*command))["evaluations"]["base model"]
    assert json.loads(output(*command))["evaluations"]["base model"]["results"] == mended["results"]
    assert played == [_tasks(1)[0].id, _tasks(2)[1].id, *[_tasks(1)[0].id] * 2]
    with stored(engrain_home) as store:
        assert [episode.error for episode in store.episodes()] == [None, None]
        assert store.counts()["episode"] == 2
        whole = next(e for e in store.evaluations() if e.id == first["id"])
        assert [result.success for result in whole.results] == [r["success"] for r in first["results"]]


def _tasks(count: int) -> list[Task]:
    return registry.world("math", {"convention": "answer_tag"}).tasks(Split.TEST, count)


def test_another_model_under_the_same_name_is_played_anew(
    tiny_folder: Path, tmp_path: Path, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("eval", *WORLD, "-m", ".", "-n", "1", "--max-tokens", "4", "--json")
    monkeypatch.chdir(tiny_folder)
    first = json.loads(output(*command))["evaluations"]["base model"]["results"][0]["episode_id"]
    assert json.loads(output(*command))["evaluations"]["base model"]["results"][0]["episode_id"] == first
    tiny_model(seed=5).save_pretrained(tiny_folder)
    assert json.loads(output(*command))["evaluations"]["base model"]["results"][0]["episode_id"] != first
    assert fingerprint("smollm2-135m") == "smollm2-135m"
    assert fingerprint("owner/name") == "owner/name"


def test_a_text_is_distilled_and_its_checkpoint_measured(tiny_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "knowledge.txt"
    text.write_text("Write <answer>12</answer>.")
    sizes = ("--steps", "2", "--batch-size", "2", "--rank", "2", "--max-tokens", "4", "-n", "4", "--validation", "2")
    command = ("distill", *WORLD, "-m", str(tiny_folder), "-k", str(text), "--out", str(tmp_path / "run"), *sizes)
    folder = Path(output(*command).strip())
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["model"], manifest["step"], manifest["kind"]) == (str(tiny_folder), 2, "lora")
    assert output(*command).strip() == str(folder)  # done is done
    for change in (("-o", "convention=json"), ("--parent", str(folder)), ("-n", "5")):
        other = run(*command, *change)
        assert other.exit_code == 2
        assert "holds a run on other tasks or episodes, or from another parent" in other.stderr
    measured = ("eval", *WORLD, "-m", str(tiny_folder), "-n", "2", "--max-tokens", "4", "--checkpoint", str(folder))
    record = json.loads(output(*measured, "--json"))["evaluations"]["checkpoint"]
    assert record["checkpoint"] == manifest["id"]
    played = json.loads(
        output("play", *WORLD, "-m", str(tiny_folder), "--max-tokens", "4", "--checkpoint", str(folder), "--json")
    )
    assert played[0]["checkpoint"] == manifest["id"]
    sizes = ("-m", str(tiny_folder), "--max-tokens", "4", "-k", str(text), "--checkpoint", str(folder))
    (compared,) = json.loads(output("play", *WORLD, *sizes, "--compare", "--gap", "--why", "--json"))
    arms = compared["arms"]
    assert [(name, arm["checkpoint"], bool(arm["knowledge"])) for name, arm in arms.items()] == [
        ("bare", None, False),
        ("with knowledge", None, True),
        ("distilled", manifest["id"], False),
    ]
    assert {arm["task"]["id"] for arm in arms.values()} == {compared["task"]}
    assert [arm.get("influence", {}).get("forwards") for arm in arms.values()] == [None, 2, None]
    tokens = {name: arm["gap"][0]["tokens"] for name, arm in arms.items()}
    assert all(len(tokens[name]) == 4 for name in arms)
    distilled = [token["student"] for token in tokens["distilled"]]
    own = [p for p, mark in zip(arms["distilled"]["logprobs"], arms["distilled"]["loss_mask"], strict=True) if mark]
    assert distilled == pytest.approx(own, abs=1e-3)  # the student's weights played; the teacher's are the base model's
    refused = run("eval", *WORLD, "-m", "smollm2-135m", "--checkpoint", str(folder))
    assert refused.exit_code == 2
    assert f"not smollm2-135m; pass --model {tiny_folder}" in refused.stderr
