"""Experiment trackers, by Accelerate's classes: every number of every step, and every validation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from distill.distributed import is_main
from distill.errors import DistillConfigError
from distill.monitor import StepMetrics

#: Trackers by name; the extra and the package to import are called the same.
TRACKERS = ("tensorboard", "wandb", "trackio")


class Tracker(Protocol):
    """Is told what a run does, in the main process."""

    def step(self, metrics: StepMetrics) -> None:
        """A step is over."""

    def validation(self, step: int, score: float) -> None:
        """The student was scored after so many steps."""


class Trackers:
    """Accelerate's trackers, all told the same.

    A step's numbers are `train/<name>` at its number, as in `StepMetrics`, the name of its objective included; a
    validation is `validation/score` at the number of steps before it. A run that is resumed logs anew the steps that it
    takes anew.
    """

    def __init__(self, trackers: Sequence[Any]) -> None:
        self.trackers = list(trackers)

    def step(self, metrics: StepMetrics) -> None:
        """Log all of its numbers."""
        values = {f"train/{name}": value for name, value in metrics.model_dump(exclude={"step"}).items()}
        self._log(values, metrics.step)

    def validation(self, step: int, score: float) -> None:
        """Log the score."""
        self._log({"validation/score": score}, step)

    def _log(self, values: dict[str, Any], step: int) -> None:
        for tracker in self.trackers:
            tracker.log(values, step=step)


def check_trackers(names: Sequence[str]) -> None:
    """Refuse what cannot be opened, before hours are spent on a run.

    Raises:
        DistillConfigError: a name is unknown, or its package is not installed; the message names the extra.
    """
    for name in names:
        if name not in TRACKERS:
            raise DistillConfigError(f"unknown tracker {name!r}; use one of {', '.join(TRACKERS)}")
        if find_spec(name) is None:
            raise DistillConfigError(f"tracker {name} is not installed; run: pip install 'engrain[{name}]'")


@contextmanager
def open_trackers(names: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> Iterator[Trackers | None]:
    """The named trackers, started, and finished at the end; None for no names, and in all but the main process.

    TensorBoard writes to `folder/tensorboard`; W&B and trackio log to a project `engrain`, in a run named after the
    folder. What else they need, such as a key, they take from their own environment variables.

    Args:
        names: some of `TRACKERS`.
        folder: the run's folder.
        settings: the run's settings, which the trackers show beside its numbers.

    Raises:
        DistillConfigError: as `check_trackers`.
    """
    check_trackers(names)
    if not names or not is_main():
        yield None
        return
    PartialState()  # trackers ask it which process is the main one
    started: list[Any] = []
    try:
        for name in dict.fromkeys(names):
            tracker = _make(name, folder)
            tracker.start()
            started.append(tracker)
            tracker.store_init_configuration(_flat(settings))
        yield Trackers(started)
    finally:
        for tracker in started:
            tracker.finish()


def _make(name: str, folder: Path) -> Any:
    kind: Any = LOGGER_TYPE_TO_CLASS[name]
    if kind.requires_logging_directory:
        return kind(name, str(folder))
    return kind("engrain", name=folder.name)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level, `lora.rank`, in the types that every tracker takes."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
