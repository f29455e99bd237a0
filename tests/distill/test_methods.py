"""The baselines and the kinds of teacher, each in the one trainer and each resumable."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from distill.adapters import STUDENT, TEACHER, continue_lora, follow
from distill.backbone import Backbone
from distill.baselines import MixedSource, TeacherSource
from distill.config import DistillConfig, LoraSettings
from distill.errors import CheckpointError, DistillConfigError
from distill.monitor import StepMetrics
from distill.packing import Sample
from distill.source import Batch, OnPolicySource
from distill.teacher import EmaTeacher, FrozenTeacher
from distill.trainer import Trainer

TIMES = {name for name in StepMetrics.model_fields if name.startswith("seconds_")}
TIMES |= {"tokens_per_second", "peak_memory_bytes"}


@pytest.fixture
def by_method(make_trainer, tasks, knowledge):
    """A trainer of a method, with the sources that belong to it."""

    def make(folder: str = "run", **settings) -> Trainer:
        def source(engine, config):
            shared = {"sampling": config.sampling, "seed": 0}
            mine, n = config.on_policy_samples, config.batch_size
            student = OnPolicySource(tasks, engine, knowledge, batch_size=mine, **shared)
            teacher = TeacherSource(
                tasks, engine, knowledge, knowledge_id="k", model=engine.network, batch_size=n - mine, **shared
            )
            return student if mine == n else MixedSource(student, teacher) if mine else teacher

        return make_trainer(folder, source=source, **settings)

    return make


@pytest.mark.parametrize(
    ("settings", "objective"),
    [
        ({"method": "off_policy"}, "forward_kl"),
        ({"method": "sft"}, "cross_entropy"),
        ({"method": "mixed", "on_policy_fraction": 0.3}, "forward_kl"),
        ({"teacher_kind": "ema", "ema_rate": 0.3, "objective": "reverse_kl"}, "reverse_kl"),
    ],
)
def test_each_trains_and_resumes_to_the_bit(by_method, weights, settings, objective: str) -> None:
    def cut(metrics: StepMetrics) -> None:
        if metrics.step == 3:
            raise KeyboardInterrupt

    whole = by_method("whole", **settings)
    start, unbroken = weights(whole), whole.fit()
    with pytest.raises(KeyboardInterrupt):
        by_method("cut", **settings).fit(on_step=cut)
    second = by_method("cut", **settings)
    assert second.start == 3  # an interrupt keeps what was trained
    resumed = second.fit()
    assert all(torch.equal(w, weights(whole)[n]) for n, w in weights(second).items())
    assert [m.model_dump(exclude=TIMES) for m in resumed.history] == [
        m.model_dump(exclude=TIMES) for m in unbroken.history
    ]
    assert resumed.history[-1].objective == objective
    changed = {n for n, w in weights(whole).items() if not torch.equal(w, start[n])}
    kinds = {STUDENT, TEACHER} if "teacher_kind" in settings else {STUDENT}
    assert changed
    assert all(any(f".{kind}." in name for kind in kinds) for name in changed)
    kept = [name for file in resumed.last.glob("teacher.safetensors") for name in load_file(file)]
    moved = [name for name in kept if not name.startswith("prefix.")]  # ids of cached prefixes are any teacher's
    assert bool(moved) == ("teacher_kind" in settings)


def test_sft_takes_the_gradient_of_cross_entropy_on_the_teachers_tokens(by_method) -> None:
    trainer = by_method(method="sft", normalize="token", max_grad_norm=1e9)
    batch, model = trainer.source(0), trainer.student.model
    trainer.teacher.hidden = None  # no teacher is read
    trainer.teacher.prepare = None
    loss, tokens = torch.zeros(()), 0
    for sample in batch.samples:
        ids = torch.tensor([[*sample.student_prompt, *sample.continuation]])
        logits, start = model(input_ids=ids).logits[0, :-1], len(sample.student_prompt) - 1
        loss = loss + torch.nn.functional.cross_entropy(logits[start:], ids[0, start + 1 :], reduction="sum")
        tokens += len(sample.continuation)
    gradients = torch.autograd.grad(loss / tokens, trainer.parameters)
    metrics = trainer.step(batch)
    assert metrics.loss == pytest.approx(loss.item() / tokens, rel=1e-4)
    assert metrics.grad_norm == pytest.approx(float(torch.cat([g.flatten() for g in gradients]).norm()), rel=1e-3)
    assert metrics.teacher_entropy == 0.0


def test_off_policy_lowers_the_divergence_on_the_teachers_samples(by_method) -> None:
    history = by_method(method="off_policy", steps=10, batch_size=6, save_every=10).fit().history
    assert sum(m.divergence for m in history[-3:]) < 0.8 * sum(m.divergence for m in history[:3])


def test_measuring_changes_nothing_and_says_what_the_next_step_says(make_trainer, weights) -> None:
    trainer = make_trainer()
    batch, before = trainer.source(0), weights(trainer)
    measured = trainer.measure(batch)
    assert all(torch.equal(w, before[n]) for n, w in weights(trainer).items())
    assert all(p.grad is None for p in trainer.parameters)
    stepped = trainer.step(batch)
    other = {"grad_norm", "learning_rate", *TIMES}
    assert measured.model_dump(exclude=other) == stepped.model_dump(exclude=other)
    assert 0.0 < measured.opening_overlap <= 1.0
    with pytest.raises(DistillConfigError, match="sampled token"):
        trainer.measure(Batch((), ()))


def sample_of(prompt: int = 9) -> Sample:
    ids = tuple(range(20, 20 + prompt))
    return Sample("x", ids[-3:], ids, (5, 6, 7), (True,) * 3)


def logits(teacher: FrozenTeacher) -> torch.Tensor:
    return teacher.hidden([sample_of()]) @ teacher.head_VD.T


def shift(model, adapter: str) -> None:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if f"lora_B.{adapter}" in name:
                weight.add_(0.3)


def test_an_ema_teacher_follows_and_drops_its_cache(tiny_model) -> None:
    student = continue_lora(tiny_model(), LoraSettings(rank=4), 0, None, "ema")
    teacher = EmaTeacher(Backbone(student), 0.25)
    teacher.prepare([(*range(60), last) for last in (1, 2)])
    assert teacher.cache is not None
    assert teacher.cache.bytes > 0
    first = logits(teacher)
    shift(student, STUDENT)
    torch.testing.assert_close(logits(teacher), first)  # not before it is told
    teacher.follow()
    assert teacher.cache.bytes == 0
    weights = dict(student.named_parameters())
    for name, weight in weights.items():
        if f"lora_B.{TEACHER}" in name:
            torch.testing.assert_close(weight, weights[name.replace(TEACHER, STUDENT)] * 0.25)
            assert not weight.requires_grad
    assert not torch.allclose(logits(teacher), first)
    with pytest.raises(CheckpointError, match="does not fit"):
        teacher.restore({})
    with pytest.raises(DistillConfigError, match="adapter of its own"):
        EmaTeacher(Backbone(continue_lora(tiny_model(), LoraSettings(rank=4), 0, None)), 0.1)
    follow(student, 1.0)
    with torch.no_grad():
        bare = student(input_ids=torch.tensor([[*sample_of().teacher_prompt, 5, 6, 7]])).logits[0, 8:11]
    torch.testing.assert_close(logits(teacher), bare, rtol=1e-4, atol=1e-5)


def test_an_ema_teacher_pays_for_its_prefix_every_step_and_a_frozen_one_once(make_trainer, monkeypatch) -> None:
    from distill.teacher import PrefixCache

    computed: list[int] = []
    keep = PrefixCache._keep
    monkeypatch.setattr(
        PrefixCache, "_keep", lambda self, key, entry: computed.append(len(key)) or keep(self, key, entry)
    )
    make_trainer("frozen", micro_batch_tokens=10_000).fit()
    assert len(computed) == 1
    result = make_trainer("ema", micro_batch_tokens=10_000, teacher_kind="ema").fit()
    assert len(computed) == 1 + 4
    assert all(0 < m.seconds_prefix <= m.seconds_teacher for m in result.history)


@pytest.mark.parametrize(("kind", "of"), [("frozen", "base"), ("previous_checkpoint", "parent"), ("ema", "parent")])
def test_whose_weights_teach_in_the_second_round(make_trainer, tiny_model, kind: str, of: str) -> None:
    parent = make_trainer().fit().last
    second = make_trainer("second", parent=parent, teacher_kind=kind)
    ids = torch.tensor([[*sample_of().teacher_prompt, 5, 6, 7]])
    with torch.no_grad():
        student = second.student.model(input_ids=ids).logits[0, 8:11]
        base = tiny_model(initializer_range=0.2)(input_ids=ids).logits[0, 8:11]
    assert not torch.allclose(student, base, atol=1e-3)
    shift(second.student.model, STUDENT)
    torch.testing.assert_close(logits(second.teacher), base if of == "base" else student, rtol=1e-4, atol=1e-4)


def test_a_wider_teacher_of_the_same_vocabulary_teaches(make_trainer, tiny_model) -> None:
    wide = tiny_model(seed=5, hidden_size=48, num_attention_heads=4, initializer_range=0.2)
    trainer = make_trainer(teacher=FrozenTeacher(Backbone(wide)), objective="forward_kl", steps=8, batch_size=6)
    before = {n: w.clone() for n, w in wide.named_parameters()}
    history = trainer.fit().history
    assert history[-1].divergence < 0.9 * history[0].divergence
    assert all(torch.equal(w, before[n]) for n, w in wide.named_parameters())
    other = FrozenTeacher(Backbone(tiny_model(vocab_size=300)))
    with pytest.raises(DistillConfigError, match="300"):
        make_trainer("other", teacher=other)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"method": "sft", "objective": "reverse_kl"}, "sft"),
        ({"objective": "cross_entropy"}, "sft"),
        ({"teacher_kind": "ema", "teacher": "big"}, "second"),
        ({"teacher_kind": "ema", "lora": None}, "lora"),
        ({"method": "mixed", "batch_size": 1}, "larger batch"),
        ({"save_every": 10, "sync_every": 4}, "multiple"),
        ({"method": "grpo"}, "opcd"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, word: str) -> None:
    with pytest.raises((DistillConfigError, ValidationError), match=word):
        DistillConfig.model_validate(settings)


def test_the_methods_usual_objective_is_written_down() -> None:
    assert DistillConfig().objective == DistillConfig(method="off_policy").objective == "forward_kl"
    assert DistillConfig(method="off_policy", objective="jsd").objective == "jsd"
    sft = DistillConfig(method="sft")
    assert DistillConfig.model_validate(sft.model_dump(mode="json")) == sft
