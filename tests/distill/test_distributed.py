"""Two gloo processes train as one does: replicated (DDP) and sharded (FSDP2), with uneven shares, and taken up by
another number of processes.

This file is launched as a script, once for each way; the tests compare what it wrote with what one process comes to.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from agent.episode import Episode, SamplingParams
from distill.baselines import MixedSource, TeacherSource
from distill.checkpoint import read_manifest
from distill.config import DistillConfig, LoraSettings
from distill.distributed import from_main, gather, in_shares, rank, world
from distill.errors import DistillConfigError
from distill.monitor import GuardConfig, StepMetrics
from distill.packing import Sample
from distill.parallel import Replicated, current
from distill.replicas import replicated, serve
from distill.source import OnPolicySource
from distill.teacher import EmaTeacher, FrozenTeacher
from distill.trainer import FitResult, Trainer
from tests.launching import launch

#: What cannot be equal: how long it took and what it needed.
OWN = {name for name in StepMetrics.model_fields if name.startswith("seconds_")}
OWN |= {"tokens_per_second", "peak_memory_bytes"}

#: Batches of 3, each sample a pass of its own, give two processes 2 passes and 1; a batch of 1 leaves one with none.
CASES: dict[str, dict[str, Any]] = {
    "lora": {"micro_batch_tokens": 1},
    "one-sample": {"batch_size": 1, "normalize": "token", "gradient_checkpointing": True},
    "mixed-ema": {"method": "mixed", "on_policy_fraction": 0.3, "teacher_kind": "ema", "ema_rate": 0.3},
    "full": {"lora": None, "learning_rate": 1e-3, "method": "sft"},
}


class Killed(Exception):
    pass


def train(
    model: Path, folder: Path, case: str, *, cut: bool = False, told: list[Episode] | None = None
) -> tuple[Trainer, FitResult | None]:
    """A case's run, in as many processes as this one is of; `cut` ends it after the checkpoint of step 2."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from agent.engines.transformers import TransformersEngine
    from distill.adapters import continue_lora
    from distill.backbone import Backbone
    from envs import registry
    from envs.base import Split

    defaults = {"steps": 4, "batch_size": 3, "learning_rate": 1e-2, "save_every": 2, "micro_batch_tokens": 200}
    config = DistillConfig(
        **{"lora": LoraSettings(rank=4), **defaults, **CASES[case]},
        sampling=SamplingParams(max_tokens=6),
        guard=GuardConfig(rising_steps=None, min_entropy_ratio=None, min_distinct_ratio=None),
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    student = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    teaching: Any = student
    if config.lora:
        student = teaching = continue_lora(student, config.lora, 0, None, config.teacher_kind)
    else:
        teaching = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    engine = TransformersEngine.wrap(student, tokenizer, name="tiny")
    tasks = registry.world("math", {"convention": "answer_tag"}).tasks(Split.TRAIN, 12, 0)
    told = [] if told is None else told
    text = "Experience from earlier tasks. Follow it:\n- Reply with one digit."
    shared: dict[str, Any] = {"sampling": config.sampling, "seed": 0, "on_episode": told.append}
    mine, size = config.on_policy_samples, config.batch_size
    sources: list[Any] = []
    if mine:
        sources.append(OnPolicySource(tasks, engine, text, batch_size=mine, **shared))
    if mine < size:
        taught = {"knowledge_id": "k", "model": student, "batch_size": size - mine}
        sources.append(TeacherSource(tasks, engine, text, **taught, **shared))
    source = MixedSource(*sources)

    def until_killed(step: int):
        if cut and step == 2:
            raise Killed
        return source(step)

    own = Backbone(teaching)
    trainer = Trainer(
        student,
        EmaTeacher(own, config.ema_rate) if config.teacher_kind == "ema" else FrozenTeacher(own),
        until_killed,
        config,
        folder / case,
        base_model="tiny",
        knowledge="k",
        decode=engine.renderer.decode,
    )
    try:
        return trainer, trainer.fit(validate=lambda step: float(engine.network.training) + step)
    except Killed:
        return trainer, None


def worker(model: Path, folder: Path) -> None:
    """What each of the two processes does."""
    current()
    facts: dict[str, Any] = {"failed": failure(), "refused": refusals(), "asked": asked(model, folder)}
    for case in CASES:
        told: list[Episode] = []
        trainer, fit = train(model, folder, case, told=told)
        assert fit is not None
        facts[case] = report(trainer, fit) | {"episodes": len(told)}
    train(model, folder / "from-two", "mixed-ema", cut=True)
    trainer, fit = train(model, folder / "from-one", "mixed-ema")
    assert fit is not None
    facts["from-one"] = report(trainer, fit)
    from_main(lambda: (folder / "facts.json").write_text(json.dumps(facts)))


def report(trainer: Trainer, fit: FitResult) -> dict[str, Any]:
    how = {"way": type(trainer.parallel).__name__, "processes": world(), "start": trainer.start}
    history = [metrics.model_dump(exclude=OWN) for metrics in fit.history]
    return how | {"history": history, "validation": list(fit.validation.items()), "last": str(fit.last)}


def refusals() -> list[str]:
    """What is said to processes that start apart, and to those that were launched as FSDP 1."""
    said = []
    torch.manual_seed(rank())
    with pytest.raises(DistillConfigError) as refused:
        current().adopt(torch.nn.Linear(2, 2))
    said.append(str(refused.value))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        patch.setenv("FSDP_VERSION", "1")
        with pytest.raises(DistillConfigError) as refused:
            current()
    return [*said, str(refused.value)]


def failure() -> str:
    """What the other process hears when the second one fails in its share."""

    def share(mine: list[int]) -> list[int]:
        if 1 in mine:
            raise ValueError("no room")
        return mine

    try:
        in_shares([0, 1], share)
    except Exception as error:
        return str(error)
    return "nothing"


PROMPTS = [list(f"prompt {number}".encode()) for number in range(5)]


class Counted:
    """An engine that counts what it is asked."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.prompts = engine, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def generate(self, prompts: Any, sampling: Any) -> Any:
        self.prompts += len(prompts)
        return self.engine.generate(prompts, sampling)


def answers(engine: Any, adapter: Path) -> list[Any]:
    """What an engine gives when it is asked in several ways, one of which it refuses."""
    from agent.engines.base import steady
    from agent.errors import ContextLengthError

    given: list[Any] = []
    for checkpoint in (None, adapter):
        engine.load(checkpoint)
        with steady(engine):
            for params in (SamplingParams(temperature=0, max_tokens=6), SamplingParams(seed=3, max_tokens=6)):
                given.append([list(done.token_ids) for done in engine.generate(PROMPTS, [params] * len(PROMPTS))])
            too_long = [SamplingParams(max_tokens=6)] * 4 + [SamplingParams(max_tokens=engine.max_context)]
            with pytest.raises(ContextLengthError, match="shorten the knowledge") as refused:
                engine.generate(PROMPTS, too_long)
            given.append(str(refused.value))
    return given


def new_engine(model: Path) -> Any:
    from agent.engines.transformers import TransformersEngine

    return TransformersEngine(model, name="tiny", dtype=torch.float32)


def asked(model: Path, folder: Path) -> dict[str, Any]:
    """In the main process: what all engines answer as one, and how many prompts each of them was given."""
    adapter = folder / "from-one" / "mixed-ema" / "step-000002"
    engine = Counted(new_engine(model))
    if rank():
        serve(engine)
        given = []
    else:
        with replicated(engine) as everywhere:
            given = answers(everywhere, adapter)
    return {"answers": given, "prompts": gather(engine.prompts)}


@pytest.fixture(scope="module")
def model(tiny_model, tiny_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(initializer_range=0.2).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What one process reports of each case."""
    folder = tmp_path_factory.mktemp("one")
    return {case: report(*train(model, folder, case)) for case in CASES}  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def together(request, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict[str, Any]]:
    """Which way, the runs' folder, and what the two processes reported."""
    folder = tmp_path_factory.mktemp(request.param)
    train(model, folder / "from-one", "mixed-ema", cut=True)
    done = launch(request.param, __file__, str(model), str(folder))
    assert done.returncode == 0, done.stderr[-4000:]
    return (
        {"ddp": "Replicated", "fsdp2": "Sharded"}[request.param],
        folder,
        json.loads((folder / "facts.json").read_text()),
    )


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Two reports agree in every number of every step, in validation and in the weights, up to rounding."""
    assert len(ours["history"]) == len(theirs["history"]) == 4
    for one, other in zip(map(dict, ours["history"]), map(dict, theirs["history"]), strict=True):
        assert one.pop("objective") == other.pop("objective")
        assert one == pytest.approx(other, rel=1e-4)
    assert ours["validation"] == [list(entry) for entry in theirs["validation"]]
    folders = [Path(report["last"]) for report in (ours, theirs)]
    assert read_manifest(folders[0]).step == read_manifest(folders[1]).step == 4
    files = {file.name for file in folders[1].iterdir()}
    assert {file.name for file in folders[0].iterdir()} == files
    for name in sorted(file for file in files if file.endswith("model.safetensors")):
        tensors, expected = (load_file(folder / name) for folder in folders)
        assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in expected.items()}
        for key, tensor in tensors.items():
            # Adam takes a full step on a gradient that is nothing but rounding; few weights have such
            torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=2e-3)
            assert (tensor - expected[key]).abs().mean() < 2e-5


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(together, alone, case: str) -> None:
    way, _, facts = together
    assert (facts[case]["way"], facts[case]["processes"]) == (way, 2)
    same(facts[case], alone[case])
    assert facts[case]["episodes"] == 4 * CASES[case].get("batch_size", 3)  # told once, by the main process


def test_a_run_goes_on_in_another_number_of_processes(together, alone, model: Path) -> None:
    _, folder, facts = together
    assert facts["from-one"]["start"] == 2
    same(facts["from-one"], alone["mixed-ema"])
    trainer, fit = train(model, folder / "from-two", "mixed-ema")
    assert fit is not None
    back = report(trainer, fit)
    assert (back["start"], back["way"]) == (2, "Alone")
    same(json.loads(json.dumps(back)), alone["mixed-ema"])


def test_a_process_that_fails_and_processes_that_differ_are_named(together) -> None:
    _, _, facts = together
    assert facts["failed"] == "process 1 failed: no room"
    assert "process 1 starts from other weights" in facts["refused"][0]
    assert "--fsdp_version 2" in facts["refused"][1]


def test_processes_sample_together_what_the_main_one_is_asked(together, model: Path) -> None:
    _, folder, facts = together
    alone = answers(new_engine(model), folder / "from-one" / "mixed-ema" / "step-000002")
    assert facts["asked"]["answers"] == alone
    assert alone[0] != alone[3]  # the adapter was loaded
    assert facts["asked"]["prompts"] == [18, 12]  # six calls of five


def test_the_command_line_trains_in_two_processes(model: Path, tmp_path: Path) -> None:
    from engrain.cli import app

    (tmp_path / "rules.txt").write_text("- Reply with one digit.\n")
    command = ["distill", "math", "-k", str(tmp_path / "rules.txt"), "--model", str(model), "--rank", "4", "--json"]
    command += ["--steps", "1", "--batch-size", "3", "--max-tokens", "6", "-n", "6", "--validation", "2"]
    command += ["--store", str(tmp_path / "store.db"), "--out"]
    one = CliRunner().invoke(app, [*command, str(tmp_path / "one")])
    assert one.exit_code == 0, one.output
    two = launch("fsdp2", "-m", "engrain", *command, str(tmp_path / "two"))
    assert two.returncode == 0, two.stderr[-4000:]
    ours, theirs = json.loads(two.stdout), json.loads(one.stdout)  # printed once
    assert ours["history"][0]["loss"] == pytest.approx(theirs["history"][0]["loss"], rel=1e-4)
    assert ours["validation"] == theirs["validation"]
    assert (tmp_path / "two" / "step-000001" / "adapter_model.safetensors").is_file()


def test_shares_are_balanced_by_tokens_and_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [10, 3, 4, 3]
    samples = [Sample(str(i), (1,), (1,), (2,) * n, (True,) * n) for i, n in enumerate(lengths)]
    monkeypatch.setattr("distill.parallel.world", lambda: 2)
    shares = []
    for number in range(2):
        monkeypatch.setattr("distill.parallel.rank", lambda number=number: number)
        shares.append([sample.episode_id for sample in Replicated().share(samples)])
    assert shares == [["0"], ["1", "2", "3"]]


def test_processes_make_the_same_passes(make_trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_trainer().teacher.cache
    passes = []
    monkeypatch.setattr(cache.backbone, "states", lambda prefix: passes.append(prefix) or [])
    monkeypatch.setattr("distill.teacher.world", lambda: 2)
    assert cache.best([[1, 2, 3], [1, 2, 4]]) == (0, [])  # a share of the batch, which others do not see
    assert not passes
    cache.find([[1, 2, 3], [1, 2, 4]])  # the whole batch
    assert passes == [[1, 2]]


if __name__ == "__main__":
    worker(Path(sys.argv[1]), Path(sys.argv[2]))
