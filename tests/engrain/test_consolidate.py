"""`engrain distill` and the job behind it: methods, a second teacher, stored episodes, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from agent.engines.transformers import TransformersEngine
from agent.episode import SamplingParams
from agent.rollout import play
from distill.checkpoint import read_manifest
from distill.config import DistillConfig, LoraSettings
from distill.errors import VocabularyMismatchError
from engrain.cli import app
from engrain.consolidate import consolidate
from engrain.errors import EngineCannotTrainError
from envs import registry
from envs.base import Split
from memory.records import CheckpointRecord, Knowledge

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
    fit = consolidate(engine, tasks, KNOWLEDGE, config(sync_every=2), tmp_path, sampler=other)
    assert [m.staleness for m in fit.history] == [0, 1]
    assert other.checkpoint == "sync-000000"


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
    import copy

    wide.tokenizer = copy.deepcopy(tiny_tokenizer)
    wide.tokenizer.add_tokens(["<extra>"])
    with pytest.raises(VocabularyMismatchError, match="<extra>"):
        consolidate(engine, tasks, KNOWLEDGE, settings, tmp_path, teacher=wide)


def test_a_parent_of_another_model_is_refused(engine, tasks, tmp_path: Path) -> None:
    parent = CheckpointRecord(id="p", model="other", path=str(tmp_path), kind="lora")
    with pytest.raises(EngineCannotTrainError, match="other"):
        consolidate(engine, tasks, KNOWLEDGE, config(), tmp_path, parent=parent)


def run(folder: Path, tmp_path: Path, *words: str):
    knowledge = tmp_path / "knowledge.txt"
    knowledge.write_text("Answer briefly.")
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
