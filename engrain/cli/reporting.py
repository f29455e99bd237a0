"""Where a loop's news go: the terminal, JSON logs, metrics. And the options that say so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from envs.errors import EngrainError

if TYPE_CHECKING:
    from engrain.console import ConsoleListener
    from engrain.logs import LogListener
    from engrain.metrics import MetricsListener
    from engrain.rounds import Listener, RoundResult
    from memory.records import RoundRecord

LogOption = Annotated[bool, typer.Option("--log-json", help="Log to standard error, one JSON object a line.")]
PortOption = Annotated[
    int | None,
    typer.Option("--metrics-port", min=0, max=65535, help="Serve /metrics (Prometheus) and /healthz on this port."),
]
HostOption = Annotated[str, typer.Option("--metrics-host", help="Address for them; other machines reach 0.0.0.0.")]


class News:
    """Tells everyone who listens to a loop."""

    def __init__(self, console: ConsoleListener, log: LogListener | None, metrics: MetricsListener | None) -> None:
        self._console, self._log, self._metrics = console, log, metrics
        self._said_waiting = False

    def listener(self, check: Callable[[], None]) -> Listener:
        """For the round; `check` raises where the round has to end."""
        from engrain.watch import SafePoints, Several

        told = [listener for listener in (self._console, self._log, self._metrics) if listener is not None]
        return Several([*told, SafePoints(check)])

    def begin(self, record: RoundRecord) -> None:
        """A round begins or goes on."""
        for listener in (self._log, self._metrics):
            if listener is not None:
                listener.begin(record.number, record.seed)

    def end(self, result: RoundResult) -> None:
        """A round is over."""
        self._said_waiting = False
        for listener in (self._log, self._metrics):
            if listener is not None:
                listener.end(result)

    def waiting(self, arrived: int, left: float) -> None:
        """No round is due; said once a wait, measured at every look."""
        if not self._said_waiting:
            self._said_waiting = True
            text = f"next round in {left:.0f} s at the earliest; {arrived} new episodes so far"
            self._console.stage("waiting", text)
            if self._log is not None:
                self._log.say("waiting", text, arrived=arrived, seconds=round(left, 1))
        if self._metrics is not None:
            self._metrics.waiting(arrived)

    def failed(self, error: EngrainError | OSError, pause: float) -> None:
        """A round failed for reasons outside; it will be tried again."""
        text = f"{error}; trying again in {pause:.0f} s"
        self._console.note(text)
        if self._log is not None:
            self._log.say("failed", text, seconds=pause)
        if self._metrics is not None:
            self._metrics.failed()

    def disk(self, kept: int, freed: int, over: bool) -> None:
        """Checkpoints were cleaned up."""
        if freed or over:
            text = f"checkpoints: {freed / 1e6:.1f} MB removed, {kept / 1e6:.1f} MB stay"
            text += ", more than the budget, and all needed" if over else ""
            self._console.note(text)
            if self._log is not None:
                self._log.say("pruned", text, kept_bytes=kept, freed_bytes=freed, over_budget=over)
        if self._metrics is not None:
            self._metrics.disk(kept)


@contextmanager
def news(
    model: str,
    *,
    quiet: bool,
    log_json: bool,
    metrics_host: str,
    metrics_port: int | None,
    check: Callable[[], None],
) -> Iterator[News]:
    """Open what was asked for. `check` raises where the loop is not well.

    Raises:
        UsageError: the port cannot be opened.
    """
    from engrain.console import ConsoleListener

    log, metrics = None, None
    with ExitStack() as stack:
        if log_json:
            from engrain.logs import LogListener, json_logs

            stack.enter_context(json_logs())
            log = LogListener(model)
        if metrics_port is not None:
            from engrain.metrics import MetricsListener, serve_metrics

            metrics = MetricsListener(model)
            port = stack.enter_context(serve_metrics(metrics, metrics_host, metrics_port, check))
            if log is not None:
                log.say("serving", f"metrics and health at {metrics_host}:{port}", port=port)
        console = stack.enter_context(ConsoleListener(Console(stderr=True), quiet=quiet or log_json))
        yield News(console, log, metrics)
