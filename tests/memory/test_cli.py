import json

import pytest
from typer.testing import CliRunner

from agent.episode import SamplingParams
from engrain.cli.memory import app
from envs.errors import UsageError
from memory.curate import admit
from memory.extract import Extractor
from memory.prompts import MARKER
from memory.records import CheckpointRecord, EvaluationRecord
from memory.render import compose
from memory.store import Store


@pytest.fixture
def filled(tmp_path, make_episode, queue_engine, tiny_tokenizer):
    """A store with one of everything, and what is in it."""
    path = str(tmp_path / "filled.db")
    with Store.open(path) as store:
        round_ = store.create_round({"world": "sums"}, 7, "tiny")
        hostile = "[red]markup[/red] \x1b[2J\x07"
        episodes = [
            make_episode("abc1", turns=[("first?", hostile), ("second?", "b")]),
            make_episode("xyz9", success=True),
        ]
        store.add_episodes(episodes, round_id=round_.id, stage="play")
        extractor = Extractor(queue_engine([f"{MARKER} Knock [first]."]), sampling=SamplingParams(max_tokens=9))
        for extraction in extractor.extract(episodes[:1], 0):
            store.add_extraction(extraction, round_.id)
            items = admit(store, [extraction], round_.id)
        knowledge = store.add_knowledge(compose(items, 999, tiny_tokenizer), round_.id)
        store.add_checkpoint(CheckpointRecord(id="ckpt", model="tiny", path="/x", round_id=round_.id))
        store.add_evaluation(
            EvaluationRecord(
                name="bare",
                round_id=round_.id,
                knowledge=knowledge.id,
                env="sums",
                split="test",
                n=4,
                successes=1,
                accuracy=0.25,
                low=0.05,
                high=0.7,
                mean_score=0.25,
            )
        )
    return path, items[0], knowledge, round_


def run(*args, path=None):
    result = CliRunner().invoke(app, [*args, *(["--store", path] if path else [])], env={"COLUMNS": "250"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def output(*args, path):
    result = run(*args, path=path)
    assert result.exit_code == 0, result.output
    return result.output


def data(*args, path):
    return json.loads(output(*args, "--json", path=path))


def test_list_is_the_default(filled):
    path, item, knowledge, round_ = filled
    for noun, expected in (
        ("episodes", {"abc1", "xyz9"}),
        ("items", {item.id}),
        ("knowledge", {knowledge.id}),
        ("rounds", {round_.id}),
    ):
        assert {row["id"] for row in data(noun, path=path)} == expected
        assert data(noun, path=path) == data(noun, "list", path=path)
        assert all(id_[:10] in output(noun, path=path) for id_ in expected)


def test_filters_and_limit(filled):
    path, *_ = filled
    assert [r["id"] for r in data("episodes", "--solved", path=path)] == ["xyz9"]
    assert [r["id"] for r in data("episodes", "list", "--failed", "--round", "1", path=path)] == ["abc1"]
    assert len(data("episodes", "--limit", "1", path=path)) == 1
    assert data("episodes", "--env", "other", path=path) == []
    assert "no episodes" in output("episodes", "--stage", "other", path=path)
    assert data("items", "--status", "retired", path=path) == []
    assert len(data("episodes", "--checkpoint", "", "--knowledge", "", path=path)) == 2


def test_an_episode_is_replayed_and_cannot_drive_the_terminal(filled):
    path, *_ = filled
    shown = output("episodes", "show", "abc", path=path)
    assert shown.index("first?") < shown.index("[red]markup[/red]") < shown.index("second?")
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "Knock [first]." in shown
    assert data("episodes", "show", "abc1", path=path)["turns"][1]["action"] == "b"


def test_the_others_are_shown(filled):
    path, item, knowledge, round_ = filled
    assert data("items", "show", item.id[:6], path=path)["sources"][0]["episode_id"] == "abc1"
    assert "abc1" in output("items", "show", item.id, path=path)
    for name in ("1", knowledge.id[:7]):
        assert data("knowledge", "show", name, path=path)["text"] == knowledge.text
    assert "- Knock [first]." in output("knowledge", "show", "1", path=path)
    shown = data("rounds", "show", "1", path=path)
    assert shown["id"] == round_.id
    assert [e["name"] for e in shown["evaluations"]] == ["bare"]
    assert [c["id"] for c in shown["checkpoints"]] == ["ckpt"]
    assert "0.250" in output("rounds", "show", round_.id, path=path)


@pytest.mark.parametrize("noun", ["episodes", "items", "knowledge", "rounds"])
def test_what_is_unknown_is_a_usage_error(filled, noun):
    with pytest.raises(UsageError, match="nope"):
        run(noun, "show", "nope", path=filled[0])
    assert run(noun, "--help").exit_code == 0
    assert run(noun, "wrong-command", path=filled[0]).exit_code == 2


def test_bad_values_are_usage_errors(filled, tmp_path):
    with pytest.raises(UsageError, match="no item status 'new'"):
        run("items", "--status", "new", path=filled[0])
    with pytest.raises(UsageError, match="no store at"):
        run("items", path=str(tmp_path / "nothing.db"))


def test_the_store_may_be_named_by_the_environment(filled, monkeypatch):
    monkeypatch.setenv("ENGRAIN_STORE", filled[0])
    assert len(json.loads(run("rounds", "--json").output)) == 1


def test_the_default_store_is_that_of_the_settings(engrain_home):
    pytest.importorskip("engrain.settings")
    with pytest.raises(UsageError, match="no store at"):
        run("rounds")
