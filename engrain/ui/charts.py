"""What the dashboard draws: learning curves, training curves, effects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from engrain.curve import MEASURES, RoundScores
from engrain.svg import Estimate, Point, Series, curve, estimates
from memory.records import EvaluationRecord, ItemEffect, RunRecord


def learning(scores: Sequence[RoundScores]) -> dict[str, Markup]:
    """Accuracy on test tasks over the rounds of each model that was measured, with 95% intervals, by its name."""
    charts = {}
    for model in dict.fromkeys(row.round.model for row in scores if row.scores):
        mine = [row for row in scores if row.round.model == model]
        series = [
            Series(
                name.replace("_", " "),
                [Point(r.round.number, s.accuracy, s.low, s.high) for r in mine if (s := r.scores.get(name))],
            )
            for name in MEASURES
        ]
        charts[model] = curve(
            series,
            title=f"Accuracy of {model} on test tasks by round, with 95% intervals",
            x_label="round",
            y_label="accuracy on test tasks",
            y_range=(0, 1),
        )
    return charts


def evaluations(rows: Sequence[EvaluationRecord]) -> Markup:
    """Accuracies with their 95% intervals, one a row."""
    return estimates(
        [Estimate(f"{e.name} ({e.env})", e.accuracy, e.low, e.high) for e in rows],
        title="Accuracies with 95% intervals",
        x_label="accuracy",
        x_range=(0, 1),
    )


def effects(rows: Sequence[ItemEffect]) -> Markup:
    """What an item did to accuracy each time it was measured; no effect is a dashed line."""
    return estimates(
        [Estimate(f"{e.created_at:%Y-%m-%d} {e.method}", e.effect, e.low, e.high) for e in rows],
        title="Effect on accuracy each time it was measured, with 95% intervals",
        x_label="effect on accuracy",
        mark=0.0,
    )


def training(run: RunRecord) -> Markup:
    """Divergence to the teacher by training step."""
    return curve(
        [Series("divergence", list(_points(run.metrics, "divergence")))],
        title="Divergence between student and teacher by training step",
        x_label="training step",
        y_label="divergence (nats a token)",
    )


def _points(metrics: Iterable[Mapping[str, Any]], name: str) -> Iterable[Point]:
    """What was noted at each step; another program's notes may hold anything."""
    for row in metrics:
        x, y = row.get("step"), row.get(name)
        if isinstance(x, int | float) and isinstance(y, int | float):
            yield Point(float(x), float(y))


def validation(state: Mapping[str, Any]) -> Markup | None:
    """Accuracy on validation tasks by training step, from a round's notebook; None where it notes none."""
    noted = state.get("consolidate")
    found = noted.get("validation") if isinstance(noted, Mapping) else None
    if not isinstance(found, Mapping) or not found:
        return None
    points = [Point(float(step), float(y)) for step, y in found.items() if str(step).isdigit() and _is_number(y)]
    return curve(
        [Series("validation", sorted(points, key=lambda point: point.x))],
        title="Accuracy on validation tasks by training step",
        x_label="training step",
        y_label="accuracy on validation tasks",
        y_range=(0, 1),
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
