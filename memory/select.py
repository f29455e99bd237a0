"""Choosing among candidate knowledge texts by what they do for the agent on validation tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from envs.errors import UsageError
from memory.records import Knowledge


@dataclass(frozen=True)
class Score:
    """One candidate's outcomes, task by task in the order that the scorer keeps for all candidates."""

    knowledge: Knowledge
    outcomes: tuple[bool, ...]

    @property
    def successes(self) -> int:
        """Number of tasks solved."""
        return sum(self.outcomes)

    @property
    def accuracy(self) -> float:
        """Share of tasks solved in [0, 1]; 0 without tasks."""
        return self.successes / len(self.outcomes) if self.outcomes else 0.0


@dataclass(frozen=True)
class Selection:
    """The best candidate and what all of them scored, in the order in which they were given."""

    best: Score
    scores: tuple[Score, ...]


def select(
    candidates: Sequence[Knowledge],
    score: Callable[[Knowledge], Sequence[bool]],
    on_score: Callable[[Score], None] | None = None,
) -> Selection:
    """Score every candidate on the same validation tasks and take the most accurate.

    Ties go to fewer tokens, then to the earlier candidate.

    Args:
        candidates: at least one.
        score: plays the validation tasks with a candidate in context; success per task.
        on_score: told each result as it comes.

    Raises:
        UsageError: there is no candidate, or candidates were scored on different numbers of tasks.
    """
    if not candidates:
        raise UsageError("no candidate knowledge to select from: no item was extracted, or none fits the budget")
    scores: list[Score] = []
    for candidate in candidates:
        result = Score(candidate, tuple(bool(outcome) for outcome in score(candidate)))
        if scores and len(result.outcomes) != len(scores[0].outcomes):
            counts = f"{len(scores[0].outcomes)} and {len(result.outcomes)}"
            raise UsageError(f"candidates were scored on {counts} tasks; use the same tasks for all")
        scores.append(result)
        if on_score is not None:
            on_score(result)
    best = min(range(len(scores)), key=lambda i: (-scores[i].successes, scores[i].knowledge.tokens, i))
    return Selection(scores[best], tuple(scores))
