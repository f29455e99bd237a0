"""The learning curve over rounds: what each measured on test tasks, gathered from the store and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from envs.errors import UsageError
from memory.records import CheckpointStatus, EvaluationRecord, RoundRecord
from memory.store import Store

#: What a round measures on test tasks, in the order in which it happens.
MEASURES = ("bare", "in_context", "distilled")


class RoundScores(BaseModel):
    """One round's evaluations on test tasks, by measure, and whether its checkpoint was promoted."""

    model_config = ConfigDict(frozen=True)

    round: RoundRecord
    scores: dict[str, EvaluationRecord]
    promoted: bool

    def plain(self) -> dict[str, Any]:
        """Accuracies with their intervals as plain data."""
        kept = {"accuracy", "low", "high", "n"}
        return {name: score.model_dump(include=kept) for name, score in self.scores.items()}


def gather(store: Store, rounds: Sequence[RoundRecord]) -> list[RoundScores]:
    """The scores of these rounds, in their order."""
    by_round: dict[str | None, dict[str, EvaluationRecord]] = {}
    names = [f"test/{measure}" for measure in MEASURES]
    for evaluation in store.evaluations(names=names, results=False):
        by_round.setdefault(evaluation.round_id, {})[evaluation.name.removeprefix("test/")] = evaluation
    kept = {c.round_id for c in store.checkpoints() if c.promoted_at and c.status is not CheckpointStatus.REJECTED}
    return [
        RoundScores(
            round=record,
            scores={name: found[name] for name in MEASURES if name in found},
            promoted=record.id in kept,
        )
        for record in rounds
        for found in [by_round.get(record.id, {})]
    ]


def draw(scores: Sequence[RoundScores], path: Path) -> None:
    """Write the curve as a picture: accuracy on test tasks by round, with 95% intervals.

    Raises:
        UsageError: no round has measured anything, or the file cannot be written.
    """
    if not any(row.scores for row in scores):
        raise UsageError(f"no round has measured test tasks yet, so {path} would be empty; `engrain improve` does")
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(figsize=(7, 4), dpi=130, layout="constrained")
    colours = {"bare": "#8a8a8a", "in_context": "#e9a03b", "distilled": "#1f6f8b"}
    for name in MEASURES:
        found = [(row.round.number, row.scores[name]) for row in scores if name in row.scores]
        if found:
            x, y = [number for number, _ in found], [score.accuracy for _, score in found]
            errors = [[s.accuracy - s.low for _, s in found], [s.high - s.accuracy for _, s in found]]
            label = name.replace("_", " ")
            axes.errorbar(x, y, yerr=errors, fmt="o-", capsize=3, color=colours[name], label=label, linewidth=1.5)
    axes.set(xlabel="round", ylabel="accuracy on test tasks", ylim=(-0.03, 1.03))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=8)
    axes.set_title("Learning curve, 95% intervals", loc="left", fontsize=10)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Software": None} if path.suffix.lower() == ".png" else None)
    except (OSError, ValueError) as error:
        raise UsageError(f"--png {path} cannot be written: {error}") from error
    finally:
        plt.close(figure)
