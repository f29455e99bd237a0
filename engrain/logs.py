"""Logs for machines: one JSON object a line on standard error, without secrets."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TextIO

from agent.rollout import RolloutStats
from distill.monitor import StepMetrics
from engrain.redaction import redact, redacted
from engrain.rounds import RoundResult

LOGGER = "engrain"
_EVERY = 30.0  # seconds between two lines about episodes under way
_STEP_FIELDS = {
    "step", "loss", "divergence", "student_entropy", "response_tokens", "success", "grad_norm", "tokens_per_second",
    "staleness",
}  # fmt: skip


class JsonFormatter(logging.Formatter):
    """A record as one line: time, level, logger, event, message, and the fields given as `extra={"fields": ...}`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line of JSON; secrets are hidden, also in tracebacks."""
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return json.dumps(redacted(fields), ensure_ascii=False, default=str)


@contextmanager
def json_logs(stream: TextIO | None = None) -> Iterator[logging.Logger]:
    """Within this block everything that is logged, by libraries too from WARNING on, is a line of JSON."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    root, ours = logging.getLogger(), logging.getLogger(LOGGER)
    handlers, level = root.handlers[:], ours.level
    root.handlers[:] = [handler]
    ours.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield ours
    finally:
        logging.captureWarnings(False)
        root.handlers[:] = handlers
        ours.setLevel(level)


class LogListener:
    """Writes a round into the log. A `rounds.Listener`."""

    def __init__(self, model: str) -> None:
        self.model = model
        self._log = logging.getLogger(LOGGER)
        self._round: int | None = None
        self._spoke = 0.0

    def begin(self, number: int, seed: int) -> None:
        """A round begins or goes on."""
        self._round = number
        self._write("round", f"round {number} of {self.model}", seed=seed)

    def stage(self, name: str, text: str) -> None:
        """A stage begins."""
        self._write("stage", text, stage=name)

    def note(self, text: str) -> None:
        """Something worth a line."""
        self._write("note", text)

    def rollout(self, what: str, stats: RolloutStats) -> None:
        """Episodes: a line when all are played, and every half minute until then."""
        if stats.episodes >= stats.total or time.monotonic() - self._spoke > _EVERY:
            self._spoke = time.monotonic()
            self._write(
                "episodes",
                f"{stats.episodes} of {stats.total}",
                what=what,
                episodes=stats.episodes,
                total=stats.total,
                successes=stats.successes,
                failed=stats.failed,
                sampled_tokens=stats.sampled_tokens,
            )

    def step(self, metrics: StepMetrics, total: int) -> None:
        """A training step is over."""
        self._write("step", f"step {metrics.step} of {total}", **metrics.model_dump(include=_STEP_FIELDS))

    def end(self, result: RoundResult) -> None:
        """A round is over."""
        self._write(
            "round_end",
            result.reason,
            status=result.status,
            promoted=bool(result.verdict and result.verdict.promoted),
            checkpoint=result.checkpoint.id if result.checkpoint else None,
            seconds=round(result.seconds, 1),
            **{name: evaluation.accuracy for name, evaluation in result.evaluations.items()},
        )

    def say(self, event: str, text: str, **fields: Any) -> None:
        """Anything else that happens to the loop."""
        self._write(event, text, **fields)

    def _write(self, event: str, text: str, **fields: Any) -> None:
        fields = {"event": event, "model": self.model, "round": self._round, **fields}
        self._log.info("%s", redact(text), extra={"fields": fields})
