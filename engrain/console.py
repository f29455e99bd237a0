"""Live progress in the terminal; plain lines where there is none."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from agent.rollout import RolloutStats
from distill.monitor import StepMetrics, opening_advice
from engrain.terminal import printable


class ConsoleListener:
    """Draws a round as it goes: one bar for what is running, one line for what is over. A `rounds.Listener`.

    Args:
        console: where to draw; standard error keeps standard output for data.
        quiet: say nothing.
    """

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.console, self.quiet = console, quiet
        self.progress = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("[dim]{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=quiet,
        )
        self._task: TaskID | None = None
        self._what = ""
        self._started = time.monotonic()

    def __enter__(self) -> ConsoleListener:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def stage(self, name: str, text: str) -> None:
        """A stage begins: one line with the time since the start."""
        self._clear()
        if not self.quiet:
            minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
            clock = f"{minutes:02d}:{seconds:02d}"
            self.console.print(f"[dim]{clock}[/] [bold]{name:<11}[/] {escape(printable(text))}", highlight=False)

    def note(self, text: str) -> None:
        """An indented line."""
        if not self.quiet:
            self.console.print(f"{'':17} {printable(text)}", markup=False, highlight=False, soft_wrap=True)

    def rollout(self, what: str, stats: RolloutStats) -> None:
        """Episodes done so far."""
        detail = f"{stats.successes} solved"
        if stats.episodes > stats.known:
            detail += f", {stats.episodes_per_second:.2g} episodes/s"
        if stats.engine_seconds:
            detail += f", {stats.tokens_per_second:.0f} tok/s"
        if stats.cached_tokens:
            detail += f", {stats.prefix_hit_rate:.0%} of prompts cached"
        self._bar(what, stats.episodes, stats.total, detail)

    def step(self, metrics: StepMetrics, total: int) -> None:
        """Training steps done so far; after the first one, how near the untrained student was, or what stands in its
        way."""
        if metrics.step == 1:
            near = (
                f"before training, at the first token: the student gives the teacher's choice "
                f"{metrics.student_mass:.1%}, the teacher gives the student's {metrics.teacher_mass:.1%}"
            )
            self.note(opening_advice(metrics) or near)
        detail = (
            f"divergence {metrics.divergence:.3f}, success {metrics.success:.2f}, "
            f"student's mass on teacher's first token {metrics.student_mass:.2f}"
        )
        if metrics.staleness:
            detail += f", samples {metrics.staleness} steps old"
        self._bar("steps", metrics.step, total, detail)

    def _bar(self, what: str, done: int, total: int, detail: str) -> None:
        if self._task is None or what != self._what:
            self._clear()
            self._what, self._task = what, self.progress.add_task(what, total=total, detail=detail)
        self.progress.update(self._task, completed=done, total=total, detail=detail)

    def _clear(self) -> None:
        if self._task is not None:
            self.progress.remove_task(self._task)
        self._task = None
