"""What a first step says of the objective it was taken with."""

from __future__ import annotations

import io
import math

import pytest
import torch
from rich.console import Console

from distill.monitor import Guard, GuardConfig, StepMetrics, opening_advice
from distill.objective import forward_kl, jsd, reverse_kl, skew_kl, topk
from engrain.console import ConsoleListener

ZEROS = {name: 0.0 for name, field in StepMetrics.model_fields.items() if field.is_required()}


def metrics(objective: str, student_mass: float, step: int = 1) -> StepMetrics:
    return StepMetrics(**{**ZEROS, "step": step, "objective": objective, "student_mass": student_mass})


@pytest.mark.parametrize("objective", ["reverse_kl", "jsd", "skew_kl", "topk"])
def test_a_student_that_never_opens_like_the_teacher_is_told_of_where_reverse_kl_is_blind(objective: str) -> None:
    advice = opening_advice(metrics(objective, 0.001))
    assert advice is not None
    assert objective in advice
    assert "0.1%" in advice
    assert opening_advice(metrics(objective, 0.3)) is None


@pytest.mark.parametrize("mass", [1e-2, 1e-4])
def test_the_pull_on_a_token_vanishes_with_the_students_mass_but_for_forward_kl(mass: float) -> None:
    logp_s = torch.tensor([[math.log(mass), math.log1p(-mass)]], dtype=torch.float64)
    logp_t = torch.tensor([[math.log(0.9), math.log(0.1)]], dtype=torch.float64)
    for divergence in (reverse_kl, jsd(0.5), skew_kl(0.1), topk(1)):
        g = divergence(logp_s, logp_t)[1]
        pull = -(g - logp_s.exp() * g.sum(-1, keepdim=True))[0, 0]
        assert pull < 15 * mass
    g = forward_kl(logp_s, logp_t)[1]
    assert -(g - logp_s.exp() * g.sum(-1, keepdim=True))[0, 0] > 0.88


@pytest.mark.parametrize("objective", ["forward_kl", "cross_entropy"])
def test_objectives_that_cover_the_teacher_need_no_advice(objective: str) -> None:
    assert opening_advice(metrics(objective, 0.0)) is None


def test_the_console_gives_the_advice_once() -> None:
    output = io.StringIO()
    with ConsoleListener(Console(file=output, width=400)) as listener:
        for step in (1, 2, 3):
            listener.step(metrics("reverse_kl", 0.0, step), 3)
    assert output.getvalue().count("forward_kl") == 1


def test_what_a_model_or_a_world_wrote_does_not_reach_the_terminal_as_orders() -> None:
    output = io.StringIO()
    with ConsoleListener(Console(file=output, width=400)) as listener:
        listener.note("effect +0.10: press\x1b[2J enter\a")
        listener.stage("select", "\x1b]0;mine\a with [red]")
    assert "\x1b" not in output.getvalue()
    assert "press\ufffd[2J enter\ufffd" in output.getvalue()
    assert "\ufffd]0;mine\ufffd with [red]" in output.getvalue()


def entropies(student: list[float], teacher: float, **config: float | None) -> list[str | None]:
    guard = Guard(GuardConfig(**{"warmup_steps": 5, **config}))
    said = []
    for step, entropy in enumerate(student, 1):
        seen = {"step": step, "student_entropy": entropy, "teacher_entropy": teacher, "divergence": 1 / step}
        said.append(guard.check(StepMetrics(**{**ZEROS, **seen})))
    return said


def test_a_budget_of_sampled_tokens_ends_a_run_after_the_step_that_spends_it() -> None:
    guard = Guard(GuardConfig(max_sampled_tokens=100))
    said = [
        guard.check(
            StepMetrics(**{**ZEROS, "step": step, "response_tokens": 12.5, "sequences": 4, "divergence": 1 / step})
        )
        for step in (1, 2)
    ]
    assert said == [None, "100 tokens were sampled by step 2, the budget is 100"]


def test_a_bound_on_rising_entropy_is_there_for_who_asks() -> None:
    apart = [0.99, 1.1, 1.3, 1.5, 1.6, 1.7, 2.1, 2.5]
    *calm, why = entropies(apart, teacher=0.92, max_entropy_ratio=2.0)
    assert calm == [None] * 7
    assert why == "student_entropy rose from 0.99 above 1.98: 2.3 at step 8"
    assert entropies(apart, teacher=0.92) == [None] * 8  # it rises while a form is learned: see the module


def test_a_student_may_grow_as_unsure_as_its_teacher_began_and_a_little_more() -> None:
    for student, teacher in (
        ([0.2] * 5 + [1.2] * 3, 1.0),
        ([0.02] * 5 + [0.5] * 3, 0.01),
        ([1.0] * 5 + [2.4, 1.0, 2.4], 1.0),  # one batch is not a trend
    ):
        assert entropies(student, teacher, max_entropy_ratio=2.0) == [None] * 8
    assert "student_entropy rose" in str(entropies([1.0] * 5 + [1.6] * 2, teacher=1.0, max_entropy_ratio=1.5)[-1])
