"""What a first step says of the objective it was taken with."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from distill.monitor import StepMetrics, opening_advice
from engrain.console import ConsoleListener

ZEROS = {name: 0.0 for name, field in StepMetrics.model_fields.items() if field.is_required()}


def metrics(objective: str, student_mass: float, step: int = 1) -> StepMetrics:
    return StepMetrics(**{**ZEROS, "step": step, "objective": objective, "student_mass": student_mass})


@pytest.mark.parametrize("objective", ["reverse_kl", "jsd", "topk"])
def test_a_student_that_never_opens_like_the_teacher_is_told_of_where_reverse_kl_is_blind(objective: str) -> None:
    advice = opening_advice(metrics(objective, 0.001))
    assert advice is not None
    assert objective in advice
    assert "0.1%" in advice
    assert opening_advice(metrics(objective, 0.3)) is None


@pytest.mark.parametrize("objective", ["forward_kl", "skew_kl", "cross_entropy"])
def test_objectives_that_cover_the_teacher_need_no_advice(objective: str) -> None:
    assert opening_advice(metrics(objective, 0.0)) is None


def test_the_console_gives_the_advice_once() -> None:
    output = io.StringIO()
    with ConsoleListener(Console(file=output, width=400)) as listener:
        for step in (1, 2, 3):
            listener.step(metrics("reverse_kl", 0.0, step), 3)
    assert output.getvalue().count("forward_kl and skew_kl") == 1
