"""Listeners of a round put together, and the one that notices when the round has to end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from agent.rollout import RolloutStats
from distill.monitor import StepMetrics
from engrain.rounds import Listener


class Several:
    """Tells all of them, in order. A `rounds.Listener`."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self.listeners = tuple(listeners)

    def stage(self, name: str, text: str) -> None:
        """A stage begins."""
        self._tell("stage", name, text)

    def note(self, text: str) -> None:
        """Something worth a line."""
        self._tell("note", text)

    def rollout(self, what: str, stats: RolloutStats) -> None:
        """Episodes are being played."""
        self._tell("rollout", what, stats)

    def step(self, metrics: StepMetrics, total: int) -> None:
        """A training step is over."""
        self._tell("step", metrics, total)

    def _tell(self, what: str, *arguments: Any) -> None:
        for listener in self.listeners:
            getattr(listener, what)(*arguments)


class SafePoints:
    """Calls `checks` wherever ending the round loses nothing: each raises if it has to end. A `rounds.Listener`."""

    def __init__(self, *checks: Callable[[], None]) -> None:
        self.checks = checks

    def stage(self, name: str, text: str) -> None:
        """Everything before it is stored."""
        self._check()

    def note(self, text: str) -> None:
        """No safe point: something may be half done."""

    def rollout(self, what: str, stats: RolloutStats) -> None:
        """Episodes that ended are stored."""
        self._check()

    def step(self, metrics: StepMetrics, total: int) -> None:
        """The trainer writes a checkpoint when this raises."""
        self._check()

    def _check(self) -> None:
        for check in self.checks:
            check()
