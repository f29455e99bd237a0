"""How far the training of a round is: what its run noted in its folder, and what the store knows of its validations.

The trainer writes its history beside each checkpoint, the latest of which is there as often as a twentieth of the time
allows; the store gets it when training is over. Validations are episodes, and stand in the store at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memory.records import RunRecord

_LARGEST = 2**24  # bytes of a history that are read
_FINITE = 2.0**1000
_VALIDATION = re.compile(r"validation/step-(\d{1,9})", re.ASCII)
_STEP = re.compile(r"\d{1,9}", re.ASCII)


@dataclass(frozen=True)
class Validation:
    """Validation tasks after so many steps; `planned` is None where the settings do not say how many there are."""

    step: int
    episodes: int
    solved: int
    planned: int | None

    @property
    def accuracy(self) -> float:
        """Of those played so far."""
        return self.solved / self.episodes

    @property
    def over(self) -> bool:
        """Whether all were played."""
        return self.planned is None or self.episodes >= self.planned


@dataclass(frozen=True)
class Training:
    """A run: its steps as far as they are known, how many there are to be, and its validations by step."""

    run: RunRecord
    steps: tuple[Mapping[str, Any], ...]
    planned: int | None
    validations: tuple[Validation, ...]

    @property
    def step(self) -> int:
        """The last step that is known."""
        return len(self.steps)

    def at(self, place: int, name: str) -> float | None:
        """What was noted at a step, counted from 0 or from the end; None where that is no number."""
        return number(self.steps[place].get(name)) if self.steps else None

    @property
    def scores(self) -> dict[int, float]:
        """Accuracy by step, of the validations that are over."""
        return {validation.step: validation.accuracy for validation in self.validations if validation.over}

    @property
    def mark(self) -> tuple[object, ...]:
        """Changes whenever something that is shown does."""
        return (self.run.id, self.step, *self.validations)

    @classmethod
    def of(cls, run: RunRecord, played: Iterable[tuple[str, int, int]], validation_tasks: int | None) -> Training:
        """That of a run, with what its round has `played`: stage, episodes, solved."""
        found = (
            Validation(int(match[1]), episodes, solved, validation_tasks)
            for stage, episodes, solved in played
            if (match := _VALIDATION.fullmatch(stage or "")) and episodes
        )
        planned = run.config.get("steps")
        return cls(
            run,
            run.metrics or noted(run.folder),
            planned if isinstance(planned, int) and planned > 0 else None,
            tuple(sorted(found, key=lambda validation: validation.step)),
        )


def is_validation(stage: str) -> bool:
    """Whether a round's episodes of this stage validate a step."""
    return _VALIDATION.fullmatch(stage or "") is not None


def noted(folder: str) -> tuple[Mapping[str, Any], ...]:
    """The steps that the newest checkpoint in a run's folder tells of; none where it is not on this machine.

    The folder is another process's and changes meanwhile: what cannot be read now is read the next time.
    """
    try:
        newest = max(Path(folder).glob("step-" + 6 * "[0-9]" + "/trainer_state.json"), default=None)
        if newest is None or newest.stat().st_size > _LARGEST:
            return ()
        history = json.loads(newest.read_bytes()).get("history", [])
        return tuple(row for row in history if isinstance(row, Mapping))
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return ()


def recorded(state: Mapping[str, Any]) -> dict[int, float]:
    """Accuracy on validation tasks by step, as a round's notebook has it when training is over."""
    noted = state.get("consolidate")
    found = noted.get("validation") if isinstance(noted, Mapping) else None
    if not isinstance(found, Mapping):
        return {}
    scores = {int(step): number(score) for step, score in found.items() if _STEP.fullmatch(str(step))}
    return {step: score for step, score in scores.items() if score is not None}


def number(value: object) -> float | None:
    """A finite number, None where it is none: another program's notes may hold anything."""
    return float(value) if isinstance(value, int | float) and -_FINITE < value < _FINITE else None
