"""What the dashboard draws: learning curves, training curves, effects."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from engrain.curve import MEASURES, RoundScores
from engrain.svg import Estimate, Point, Series, curve, estimates
from engrain.ui.training import number
from memory.records import EvaluationRecord, ItemEffect


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


def evaluations(rows: Sequence[EvaluationRecord], versions: Mapping[str, int] | None = None) -> Markup:
    """Accuracies with their 95% intervals, one a row; `versions` are the numbers of knowledge texts by id."""

    numbered = [(row, (versions or {}).get(row.knowledge or "")) for row in rows]
    names = [row.name + (f", version {version}" if version else "") for row, version in numbered]
    worlds = defaultdict(set)
    for row, name in zip(rows, names, strict=True):
        worlds[name].add(row.env)
    labels = [f"{name} ({row.env})" if len(worlds[name]) > 1 else name for row, name in zip(rows, names, strict=True)]
    return estimates(
        [Estimate(label, row.accuracy, row.low, row.high) for label, row in zip(labels, rows, strict=True)],
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


def training(steps: Sequence[Mapping[str, Any]]) -> Markup:
    """Divergence to the teacher by training step."""
    noted = ((number(row.get("step")), number(row.get("divergence"))) for row in steps)
    return curve(
        [Series("divergence", [Point(x, y) for x, y in noted if x is not None and y is not None])],
        title="Divergence between student and teacher by training step",
        x_label="training step",
        y_label="divergence (nats a token)",
    )


def validation(scores: Mapping[int, float]) -> Markup | None:
    """Accuracy on validation tasks by training step; None where none was validated."""
    if not scores:
        return None
    return curve(
        [Series("validation", [Point(float(step), score) for step, score in sorted(scores.items())])],
        title="Accuracy on validation tasks by training step",
        x_label="training step",
        y_label="accuracy on validation tasks",
        y_range=(0, 1),
    )
