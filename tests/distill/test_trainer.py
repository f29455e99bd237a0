"""The trainer on a tiny model and the real math world: exact gradients, resumable to the bit, honest in its logs."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

from agent.engines.transformers import TransformersEngine
from agent.episode import SamplingParams
from distill.adapters import continue_lora
from distill.backbone import Backbone
from distill.checkpoint import latest_resumable, load_weights, read_manifest
from distill.config import LoraSettings
from distill.errors import CheckpointError, DistillConfigError
from distill.monitor import Guard, GuardConfig, StepMetrics, distinct_n, leak_rate
from distill.objective import forward_kl
from distill.packing import Sample
from distill.source import Batch, OnPolicySource, check_pair, deal, make_sample
from distill.tally import Tally
from distill.teacher import FrozenTeacher

TIMES = {name for name in StepMetrics.model_fields if name.startswith("seconds_")}
TIMES |= {"tokens_per_second", "peak_memory_bytes"}


def test_the_gradient_is_that_of_the_formula_on_unpadded_full_logits(make_trainer) -> None:
    trainer = make_trainer(objective="reverse_kl")
    with torch.no_grad():  # a student that differs from its teacher
        for name, weight in trainer.student.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    batch = trainer.source(0)
    model, tokens = trainer.student.model, sum(s.sampled for s in batch.samples)
    trainer.loss(batch.samples, sequences=3, tokens=tokens, tally=Tally()).backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total = torch.zeros(())
    for sample in batch.samples:
        where = [i for i, m in enumerate(sample.mask) if m]
        bare = model(input_ids=torch.tensor([[*sample.student_prompt, *sample.continuation]])).logits[0]
        with torch.no_grad(), model.disable_adapter():
            seen = model(input_ids=torch.tensor([[*sample.teacher_prompt, *sample.continuation]])).logits[0]
        s = bare[[len(sample.student_prompt) + i - 1 for i in where]].log_softmax(-1)
        t = seen[[len(sample.teacher_prompt) + i - 1 for i in where]].log_softmax(-1)
        total = total + (s.exp() * (s - t)).sum(-1).mean() / 3
    total.backward()
    assert ours
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad, rtol=2e-3, atol=1e-6)


def test_the_loss_does_not_depend_on_how_the_batch_is_cut(make_trainer) -> None:
    results = []
    for budget in (1, 150, 10_000):
        trainer = make_trainer(f"cut-{budget}", micro_batch_tokens=budget)
        metrics = trainer.step(trainer.source(0))
        results.append((metrics.loss, metrics.grad_norm, metrics.divergence))
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-4)


def test_training_lowers_the_divergence_and_changes_adapter_weights_only(make_trainer, weights) -> None:
    trainer = make_trainer(steps=12, batch_size=6, objective="forward_kl")
    before = weights(trainer)
    result = trainer.fit()
    after = weights(trainer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    losses = [m.divergence for m in result.history]
    assert all(math.isfinite(x) for x in losses)
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_full_weights_train_against_a_frozen_copy(make_trainer, weights) -> None:
    trainer = make_trainer(lora=False, learning_rate=1e-3)
    frozen = {n: w.clone() for n, w in trainer.teacher.backbone.model.named_parameters()}
    result = trainer.fit()
    manifest = read_manifest(result.last)
    assert manifest.kind == "full"
    assert all(torch.equal(w, frozen[n]) for n, w in trainer.teacher.backbone.model.named_parameters())
    other = make_trainer("other", lora=False)
    load_weights(result.last, other.student.model)
    assert all(torch.equal(w, weights(trainer)[n]) for n, w in weights(other).items())


class Killed(Exception):
    pass


@pytest.mark.parametrize("share", [0.0, float("inf")], ids=["checkpoints", "steps"])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_run_that_was_cut_ends_in_the_state_of_an_unbroken_one(
    make_trainer, weights, after: int, share: float, monkeypatch
) -> None:
    monkeypatch.setattr("distill.trainer._SAVING_SHARE", share)  # none of the time, or all of it
    scored: list[int] = []
    whole = make_trainer("whole")
    unbroken = whole.fit(validate=lambda step: scored.append(step) or float(step))

    def cut(metrics: StepMetrics) -> None:
        if metrics.step == after:
            raise Killed

    with pytest.raises(Killed):
        make_trainer("cut").fit(validate=lambda step: float(step), on_step=cut)
    second = make_trainer("cut")
    assert second.start == 0 or second.teacher.cache.prefixes == whole.teacher.cache.prefixes
    assert second.start == (after - 1 if share else (after - 1) // 2 * 2)
    resumed = second.fit(validate=lambda step: float(step))
    assert all(torch.equal(w, weights(whole)[n]) for n, w in weights(second).items())
    assert [m.model_dump(exclude=TIMES) for m in resumed.history] == [
        m.model_dump(exclude=TIMES) for m in unbroken.history
    ]
    assert resumed.validation == unbroken.validation == {0: 0.0, 2: 2.0, 4: 4.0}
    assert scored == [0, 2, 4]
    assert read_manifest(resumed.best).id == read_manifest(unbroken.best).id
    assert latest_resumable(second.folder) == resumed.last
    assert listing(second.folder) == listing(whole.folder)


def listing(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_what_a_kill_left_behind_goes(make_trainer) -> None:
    whole = make_trainer("whole")
    whole.fit()
    (whole.folder / ".step-000003.draft").mkdir()  # killed while it was written
    (whole.folder / ".step-000001.dying").mkdir()  # killed while it was deleted
    step, last = whole.folder / "step-000002", whole.folder / "step-000004"
    shutil.copy(last / "optimizer.safetensors", step)  # killed before the optimiser state of the one before was gone
    shutil.copytree(last, whole.folder / "step-000003")  # and before a step between two checkpoints was
    make_trainer("whole").fit()
    make_trainer("other").fit()
    assert listing(whole.folder) == listing(whole.folder.with_name("other"))


def test_saving_again_replaces_a_checkpoint_as_a_whole(make_trainer) -> None:
    trainer = make_trainer()
    last = trainer.fit().last
    (last / "stray").touch()
    trainer._save(4)
    assert not (last / "stray").exists()
    assert read_manifest(last).step == 4
    assert not list(trainer.folder.glob(".*"))


def test_the_best_checkpoint_is_validations_and_ties_go_to_the_earlier(make_trainer) -> None:
    scores = {0: 0.1, 1: 0.4, 2: 0.9, 3: 0.9, 4: 0.2}
    result = make_trainer(save_every=1).fit(validate=scores.__getitem__)
    assert (result.best_step, result.best.name) == (2, "step-000002")
    assert result.last.name == "step-000004"


def test_a_folder_of_another_run_is_refused(make_trainer) -> None:
    make_trainer(steps=2).fit()
    with pytest.raises(CheckpointError, match="other settings"):
        make_trainer(steps=3)


def test_a_run_of_an_older_version_that_lacked_a_setting_goes_on(make_trainer) -> None:
    manifest = make_trainer(steps=2).fit().last / "manifest.json"
    told = json.loads(manifest.read_text())
    del told["config"]["guard"]["max_entropy_ratio"], told["config"]["only_successes"]
    manifest.write_text(json.dumps(told))
    assert make_trainer(steps=2).start == 2
    told["config"]["a setting of tomorrow"] = 1
    manifest.write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match="other settings"):
        make_trainer(steps=2)


def test_a_folder_of_a_run_from_another_checkpoint_is_refused(make_trainer) -> None:
    make_trainer(lineage="first", steps=2).fit()
    for other in ("second", None):
        with pytest.raises(CheckpointError, match=f"started from first, not from {other or 'the base model'}"):
            make_trainer(lineage=other, steps=2)
    assert make_trainer(lineage="first", steps=2).start == 2


def test_a_damaged_checkpoint_is_one_clear_error(make_trainer) -> None:
    result = make_trainer().fit()
    (result.last / "adapter_model.safetensors").write_bytes(b"\x10")
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        make_trainer()
    (result.last / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        read_manifest(result.last)


def test_a_manifest_names_the_lineage(make_trainer) -> None:
    manifest = read_manifest(make_trainer(steps=2, seed=7).fit().last)
    assert (manifest.model, manifest.parent, manifest.knowledge, manifest.step, manifest.seed) == (
        "tiny",
        None,
        "k",
        2,
        7,
    )
    assert manifest.config["learning_rate"] == 1e-2
    assert {"torch", "transformers", "peft", "python"} <= set(manifest.versions)


def test_nan_stops_the_run_before_it_reaches_the_weights(make_trainer, weights) -> None:
    trainer = make_trainer(steps=4)
    trainer.divergence = lambda name: lambda s, t: tuple(x * float("nan") for x in forward_kl(s, t))
    before = weights(trainer)
    result = trainer.fit()
    assert "nan" in result.stopped
    assert len(result.history) == 1
    assert all(torch.equal(w, before[n]) for n, w in weights(trainer).items())


def test_the_next_round_is_taught_by_the_parent_checkpoint(make_trainer, tiny_model) -> None:
    parent = make_trainer().fit().last
    student = continue_lora(tiny_model(), LoraSettings(rank=4), 0, parent)
    expected = continue_lora(tiny_model(), LoraSettings(rank=4), 0, parent)
    ids = torch.tensor([[5, 6, 7, 8]])
    taught = expected(input_ids=ids).logits
    sample = Sample("x", (5,), (5,), (6, 7, 8), (True, True, True))
    teacher = FrozenTeacher(Backbone(student))
    torch.testing.assert_close(student(input_ids=ids).logits, taught)
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if ".default." in name:
                weight.add_(0.3)
    torch.testing.assert_close(teacher.hidden([sample]) @ teacher.head_VD.T, taught[0, :3], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(student(input_ids=ids).logits, taught, atol=1e-2)
    trained = {n for n, p in student.named_parameters() if p.requires_grad}
    assert trained
    assert all(".default." in n for n in trained)
    with pytest.raises(CheckpointError, match="rank 4"):
        continue_lora(tiny_model(), LoraSettings(rank=8), 0, parent)


def test_samples_carry_the_sampled_ids_and_one_generation_header(make_trainer, knowledge, tasks) -> None:
    source = make_trainer().source
    batch = source(0)
    again = source(0)
    assert [s.continuation for s in batch.samples] == [s.continuation for s in again.samples]
    assert [s.continuation for s in source(1).samples] != [s.continuation for s in batch.samples]
    for sample, episode in zip(batch.samples, batch.episodes, strict=True):
        assert sample.continuation == episode.token_ids[episode.prompt_length :]
        assert sample.student_prompt == episode.token_ids[: episode.prompt_length]
        bare, taught = (source.renderer.decode(p) for p in (sample.student_prompt, sample.teacher_prompt))
        assert taught == f"system\n{knowledge}\n{bare}"  # the teacher is asked for nothing else
        header = source.renderer.generation_header
        assert (
            list(sample.teacher_prompt[-len(header) :]) == list(header) == list(sample.student_prompt[-len(header) :])
        )
    with pytest.raises(DistillConfigError, match="context holds 40"):
        make_sample(batch.episodes[0], source.renderer, knowledge, 40)
    sample = batch.samples[0]
    other = Sample("x", sample.student_prompt, (*sample.teacher_prompt, 3), sample.continuation, sample.mask)
    with pytest.raises(DistillConfigError, match="generation headers"):
        check_pair(other, source.renderer, 4096)


def test_tasks_are_dealt_without_repeats_and_by_step_alone(tasks) -> None:
    first = [deal(tasks, step, 5, seed=3) for step in range(5)]
    flat = [t.id for batch in first for t in batch]
    assert len(set(flat[:12])) == 12
    assert len(set(flat[12:24])) == 12
    assert flat[:12] != flat[12:24]
    assert deal(tasks, 3, 5, seed=3) == first[3]


def metrics(step: int, **changed: float) -> StepMetrics:
    fields = dict.fromkeys(StepMetrics.model_fields, 1.0) | {"sequences": 1, "dropped": 0, "peak_memory_bytes": 1}
    fields["objective"] = "forward_kl"
    return StepMetrics.model_validate({**fields, "staleness": 0, "step": step, **changed})


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"loss": float("inf")}, "loss"),
        ({"grad_norm": float("nan")}, "grad_norm"),
        ({"student_entropy": 0.05}, "student_entropy"),
        ({"response_tokens": 0.05}, "response_tokens"),
        ({"response_tokens": 9.0}, "rose above"),
        ({"distinct_2": 0.1}, "distinct_2"),
    ],
)
def test_the_guard_says_why(changed: dict[str, float], word: str) -> None:
    guard = Guard(GuardConfig(warmup_steps=2))
    assert guard.check(metrics(1)) is None
    assert guard.check(metrics(2)) is None
    assert guard.check(metrics(3)) is None
    assert word in (guard.check(metrics(4, **changed)) or "")


def test_the_guard_sees_a_rising_divergence_and_lets_a_sure_teacher_make_a_sure_student() -> None:
    guard = Guard(GuardConfig(rising_steps=3))
    assert [guard.check(metrics(i, divergence=d)) for i, d in enumerate([1, 0.9, 1.0, 1.1], 1)] == [None] * 4
    assert "rose 3 steps" in (guard.check(metrics(5, divergence=1.2)) or "")
    calm = Guard(GuardConfig(warmup_steps=1, rising_steps=None))
    calm.check(metrics(1))
    assert calm.check(metrics(2, student_entropy=0.05, teacher_entropy=0.05)) is None


def test_distinct_and_leaks() -> None:
    assert distinct_n([[1, 2, 1, 2]]) == pytest.approx(2 / 3)
    assert distinct_n([[1]]) == 1.0
    leaking = ["According to the experience, 4.", "Based on my earlier experience: 4", "as stated in the knowledge"]
    assert leak_rate(leaking) == 1.0
    assert leak_rate(["The answer is 4.", "experience counts", "According to the recipe, bake."]) == 0.0


def test_history_and_checkpoints_are_plain_json_and_tensors(make_trainer) -> None:
    result = make_trainer(steps=1).fit()
    text = json.dumps([m.model_dump() for m in result.history])
    assert StepMetrics.model_validate(json.loads(text)[0]) == result.history[0]
    kinds = {path.suffix for path in result.last.parent.rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors"}  # no stage hands over a pickle


def test_no_tasks_or_no_tokens_is_said(make_trainer, knowledge, tiny_model, tiny_tokenizer) -> None:
    engine = TransformersEngine.wrap(tiny_model(), tiny_tokenizer, name="tiny")
    with pytest.raises(DistillConfigError, match="no training tasks"):
        OnPolicySource([], engine, knowledge, batch_size=1, sampling=SamplingParams(), seed=0)
    with pytest.raises(DistillConfigError, match="sampled token"):
        make_trainer().step(Batch((), ()))
