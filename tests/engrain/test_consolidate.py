"""`engrain distill` and the job behind it: methods, a second teacher, stored episodes, bad input."""

from __future__ import annotations

import copy
import json
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from agent.engines.transformers import TransformersEngine
from agent.episode import Episode, SamplingParams
from agent.rollout import play
from distill.checkpoint import Manifest, read_manifest
from distill.config import DistillConfig, LoraSettings
from distill.errors import VocabularyMismatchError
from distill.partial import PrefixSource
from engrain.cli import app
from engrain.consolidate import consolidate
from engrain.errors import EngineCannotTrainError
from envs import registry
from envs.base import Split
from memory.records import CheckpointRecord, Knowledge, digest
from memory.store import Store

KNOWLEDGE = Knowledge(id="k", items=(), text="Answer briefly.", tokens=0)


@pytest.fixture
def engine(tiny_model, tiny_tokenizer) -> TransformersEngine:
    return TransformersEngine(tiny_model(), tiny_tokenizer, name="tiny", dtype="float32")


@pytest.fixture
def tasks():
    return registry.world("math", {}).tasks(Split.TRAIN, 4, 0)


def config(**settings) -> DistillConfig:
    return DistillConfig(
        **{"steps": 2, "batch_size": 2, "save_every": 2, **settings},
        lora=LoraSettings(rank=2),
        sampling=SamplingParams(max_tokens=4),
    )


@pytest.mark.parametrize(
    ("method", "who"), [("opcd", {None}), ("off_policy", {"k"}), ("sft", {"k"}), ("mixed", {None, "k"})]
)
def test_each_method_plays_who_it_says(engine, tasks, tmp_path: Path, method: str, who: set[str | None]) -> None:
    episodes = []
    fit = consolidate(engine, tasks, KNOWLEDGE, config(method=method), tmp_path, on_episode=episodes.append)
    assert {e.knowledge for e in episodes} == who
    assert len(fit.history) == 2
    assert read_manifest(fit.last).config["method"] == method
    assert engine.network.__class__.__name__ == "Qwen2ForCausalLM"  # the base model again


def test_stored_episodes_need_no_env(engine, tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = play(tasks, engine, sampling=SamplingParams(max_tokens=4), namespace="old")
    monkeypatch.setattr("envs.registry.make", lambda task: pytest.fail("an env was made"))
    fit = consolidate(engine, tasks, KNOWLEDGE, config(), tmp_path, episodes=stored)
    assert [m.sequences for m in fit.history] == [2, 2]


def test_another_engine_samples_and_is_as_stale_as_asked(
    engine, tasks, tiny_model, tiny_tokenizer, tmp_path: Path
) -> None:
    other = TransformersEngine(tiny_model(), tiny_tokenizer, name="tiny", dtype="float32")
    episodes: list[Episode] = []
    settings = config(steps=3, save_every=4, sync_every=2)
    fit = consolidate(engine, tasks, KNOWLEDGE, settings, tmp_path, sampler=other, on_episode=episodes.append)
    assert [m.staleness for m in fit.history] == [0, 1, 0]
    assert [e.checkpoint for e in episodes] == [None] * 4 + [f"{tmp_path.name}@2"] * 2


def test_a_second_model_teaches_if_it_is_the_one_named(
    engine, tasks, tiny_model, tiny_tokenizer, tmp_path: Path
) -> None:
    wide = TransformersEngine(
        tiny_model(hidden_size=48, num_attention_heads=4), tiny_tokenizer, name="wide", dtype="float32"
    )
    settings = config(teacher="wide", method="mixed")
    fit = consolidate(engine, tasks, KNOWLEDGE, settings, tmp_path, teacher=wide)
    assert read_manifest(fit.last).config["teacher"] == "wide"
    for given in (None, engine):
        with pytest.raises(EngineCannotTrainError, match="wide"):
            consolidate(engine, tasks, KNOWLEDGE, settings, tmp_path, teacher=given)
    wide.tokenizer = copy.deepcopy(tiny_tokenizer)
    wide.tokenizer.add_tokens(["<extra>"])
    with pytest.raises(VocabularyMismatchError, match="<extra>"):
        consolidate(engine, tasks, KNOWLEDGE, settings, tmp_path, teacher=wide)


def test_a_parent_of_another_model_is_refused(engine, tasks, tmp_path: Path) -> None:
    parent = CheckpointRecord(id="p", model="other", path=str(tmp_path), kind="lora")
    with pytest.raises(EngineCannotTrainError, match="other"):
        consolidate(engine, tasks, KNOWLEDGE, config(), tmp_path, parent=parent)


TEXT = "Answer briefly."


def run(folder: Path, tmp_path: Path, *words: str):
    knowledge = tmp_path / "knowledge.txt"
    knowledge.write_text(TEXT)
    fixed = ["--steps", "1", "--batch-size", "2", "--max-tokens", "4", "--validation", "0", "-n", "4", "--rank", "2"]
    out = str(tmp_path / "run")
    given = ["distill", "math", "-k", str(knowledge), "--out", out, "-m", str(folder), *fixed, *words]
    return CliRunner().invoke(app, given)


def test_the_command_distils_with_a_teacher_and_prints_json(tiny_folder: Path, tmp_path: Path) -> None:
    words = ["--method", "off_policy", "--normalize", "token", "--teacher", str(tiny_folder), "--json"]
    result = run(tiny_folder, tmp_path, *words)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["history"][0]["objective"] == "forward_kl"
    settings = read_manifest(Path(facts["checkpoint"])).config
    assert (settings["method"], settings["normalize"]) == ("off_policy", "token")


def facts_of(result) -> tuple[dict, Manifest]:
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    return facts, read_manifest(Path(facts["checkpoint"]))


def test_a_system_prompt_in_a_file_is_distilled_as_it_stands(tiny_folder: Path, tmp_path: Path) -> None:
    prompts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.source.check_pair", lambda sample, *_: prompts.append(sample))
        facts, manifest = facts_of(run(tiny_folder, tmp_path, "--objective", "forward_kl", "--json"))
    assert manifest.knowledge == digest(TEXT)
    assert manifest.config["objective"] == "forward_kl"
    assert facts["history"][0]["objective"] == "forward_kl"
    ids = TransformersEngine(tiny_folder, name="t").renderer
    assert len(prompts) == 2
    for sample in prompts:
        assert TEXT in ids.decode(sample.teacher_prompt)
        assert TEXT not in ids.decode(sample.student_prompt)


def test_a_larger_model_teaches_and_one_of_another_vocabulary_does_not(
    tiny_folder: Path, tiny_model, tiny_tokenizer, tmp_path: Path
) -> None:
    wide = tmp_path / "wide"
    tiny_model(hidden_size=48, num_attention_heads=4).save_pretrained(wide)
    tiny_tokenizer.save_pretrained(wide)
    facts, manifest = facts_of(run(tiny_folder, tmp_path, "--teacher", str(wide), "--json"))
    assert manifest.config["teacher"] == str(wide)
    assert facts["history"][0]["divergence"] > 0
    other = copy.deepcopy(tiny_tokenizer)
    other.add_tokens(["<extra>"])
    other.save_pretrained(wide)
    refused = run(tiny_folder, tmp_path, "--teacher", str(wide), "--out", str(tmp_path / "other"))
    assert refused.exit_code == 2
    line = refused.stderr.strip().splitlines()[-1]  # after what was said while the models were loaded
    assert line.startswith("error: ")
    assert "<extra>" in line


def test_the_student_samples_on_another_engine_if_asked_to(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    @contextmanager
    def other(model: str, *where: object, **options: object):
        engine = TransformersEngine(model, name=model, dtype="float32")
        asked.append((engine, *where, options["trainable"]))
        yield engine

    monkeypatch.setattr("engrain.cli.distill.open_sampler", other)
    words = ["--engine", "vllm", "--sync-every", "2", "--save-every", "2", "--steps", "3", "--json"]
    facts, manifest = facts_of(run(tiny_folder, tmp_path, *words))
    ((engine, *where),) = asked
    assert where == ["vllm", None, True]
    assert [metrics["staleness"] for metrics in facts["history"]] == [0, 1, 0]
    assert manifest.config["sync_every"] == 2
    assert engine.checkpoint is None
    assert not list((tmp_path / "run").glob("sync-*"))
    refused = run(tiny_folder, tmp_path, "--engine", "vllm", "--method", "sft")
    assert refused.exit_code == 2
    assert "with --method sft it samples none" in " ".join(refused.output.split())


def test_every_kind_of_teacher_goes_on_from_a_parent(tiny_folder: Path, tmp_path: Path) -> None:
    first, _ = facts_of(run(tiny_folder, tmp_path, "--learning-rate", "0.05", "--json"))
    start = {}
    for kind in ("previous_checkpoint", "frozen", "ema"):
        words = ["--teacher-kind", kind, "--parent", first["checkpoint"], "--out", str(tmp_path / kind), "--json"]
        facts, manifest = facts_of(run(tiny_folder, tmp_path, *words))
        assert manifest.config["teacher_kind"] == kind
        start[kind] = facts["history"][0]["divergence"]
    assert start["frozen"] != start["previous_checkpoint"]  # the base model is not the parent
    assert start["ema"] == start["previous_checkpoint"]  # an average starts where the student does


def test_a_mixed_batch_has_the_fraction_that_was_asked_for(tiny_folder: Path, tmp_path: Path) -> None:
    words = ["--method", "mixed", "--on-policy-fraction", "0.75", "--batch-size", "4", "--json"]
    played = []
    with pytest.MonkeyPatch.context() as patch:
        for module in ("distill.source", "distill.baselines"):
            patch.setattr(f"{module}.check_pair", lambda *_, module=module: played.append(module))
        _, manifest = facts_of(run(tiny_folder, tmp_path, *words))
    assert manifest.config["on_policy_fraction"] == 0.75
    assert Counter(played) == {"distill.source": 3, "distill.baselines": 1}


@pytest.fixture
def stored(tiny_folder: Path, tiny_tokenizer, tasks, tmp_path: Path) -> str:
    """A store of four training episodes by the tiny model, two of them of round 1, and others of no use."""
    engine = TransformersEngine(tiny_folder, name=str(tiny_folder), dtype="float32")
    world = registry.world("math", {})
    short = {"sampling": SamplingParams(max_tokens=4)}
    url = str(tmp_path / "episodes.db")
    with Store.open(url) as store:
        first = store.create_round({}, 0, str(tiny_folder)).id
        store.add_episodes(play(tasks[:2], engine, namespace="a", **short), round_id=first, stage="play")
        store.add_episodes(play(tasks[2:], engine, namespace="b", **short))
        store.add_episodes(play(world.tasks(Split.VALIDATION, 1, 0), engine, namespace="c", **short))
        stranger = play(tasks[:1], engine, namespace="d", **short)[0].model_copy(update={"model": "another"})
        store.add_episodes([stranger])
    return url


def test_stored_episodes_are_continued_without_an_env(
    tiny_folder: Path, stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("envs.registry.make", lambda task: pytest.fail("an env was made"))
    monkeypatch.setattr("envs.registry.world", lambda *_: pytest.fail("a world was asked for"))
    given = []
    monkeypatch.setattr(
        "engrain.consolidate.PrefixSource",
        lambda episodes, *a, **k: given.append(list(episodes)) or PrefixSource(episodes, *a, **k),
    )
    words = ["--from-episodes", "--store", stored, "--json"]
    facts, _ = facts_of(run(tiny_folder, tmp_path, *words))
    assert facts["history"][0]["sequences"] == 2
    facts_of(run(tiny_folder, tmp_path, *words, "--round", "1", "--stage", "play", "--out", str(tmp_path / "second")))
    assert [len(episodes) for episodes in given] == [4, 2]
    assert all(e.task.split is Split.TRAIN and e.model == str(tiny_folder) for e in given[0])
    again = run(tiny_folder, tmp_path, *words, "--round", "1")
    assert again.exit_code == 2
    assert "other tasks or episodes" in again.stderr


def test_stored_episodes_mix_with_the_teachers_play(tiny_folder: Path, stored: str, tmp_path: Path) -> None:
    words = ["--from-episodes", "--method", "mixed", "--store", stored, "--json"]
    facts, _ = facts_of(run(tiny_folder, tmp_path, *words))
    assert facts["history"][0]["sequences"] == 2


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--round", "1"], "--round picks stored episodes"),
        (["--failed"], "--solved/--failed picks stored episodes"),
        (["--from-episodes", "--round", "7"], "no round '7'"),
        (["--from-episodes", "--stage", "dream"], "no training episodes of math by"),
        (["--from-episodes", "--method", "sft"], "--method sft it samples none"),
        (["--on-policy-fraction", "0.3"], "--on-policy-fraction 0.3 is for --method mixed, not opcd"),
        (["--method", "mixed", "--on-policy-fraction", "1.5"], "less than 1"),
        (["--method", "mixed", "--on-policy-fraction", "nan"], "on_policy_fraction"),
        (["--method", "mixed", "--on-policy-fraction", "0.01"], "leaves nothing to mix"),
    ],
)
def test_words_that_do_not_go_together_are_one_line(tmp_path: Path, words: list[str], named: str) -> None:
    result = run(tmp_path / "never-loaded", tmp_path, "--store", str(tmp_path / "empty.db"), *words)
    assert result.exit_code == 2
    line = " ".join(result.stderr.split())
    assert named in line
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--method", "grpo"], "grpo"),
        (["--teacher-kind", "live"], "live"),
        (["--normalize", "mean"], "mean"),
        (["--method", "sft", "--objective", "jsd"], "cross_entropy"),
        (["--teacher", "no-such-model"], "no-such-model"),
    ],
)
def test_bad_words_are_one_line(tiny_folder: Path, tmp_path: Path, words: list[str], named: str) -> None:
    result = run(tiny_folder, tmp_path, *words)
    assert result.exit_code == 2
    assert named in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert len(result.stderr) < 300
