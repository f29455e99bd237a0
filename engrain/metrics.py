"""Metrics for Prometheus, and whether the loop is well: GET /metrics and GET /healthz on one port."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from agent.rollout import RolloutStats
from distill.monitor import StepMetrics
from engrain.errors import MetricsPortError
from engrain.loop import STAGES
from engrain.rounds import RoundResult


class MetricsListener:
    """Counts what a loop does. A `rounds.Listener` with a registry of its own."""

    def __init__(self, model: str) -> None:
        self.registry = registry = CollectorRegistry()
        self.model = model
        self.doing = "starting"
        self.round: int | None = None
        self._last = time.time()
        self._counted: dict[str, tuple[int, int]] = {}
        self._rounds = Counter("engrain_rounds", "Rounds that ended.", ["outcome"], registry=registry)
        self._stage = Gauge("engrain_stage", "1 for the stage that is running.", ["stage"], registry=registry)
        self._number = Gauge("engrain_round_number", "The round that is running, or ran last.", registry=registry)
        self._episodes = Counter("engrain_episodes", "Episodes played.", registry=registry)
        self._tokens = Counter("engrain_sampled_tokens", "Tokens sampled in episodes.", registry=registry)
        self._steps = Counter("engrain_training_steps", "Training steps.", registry=registry)
        self._divergence = Gauge("engrain_divergence_nats", "Divergence at the last step.", registry=registry)
        self._entropy = Gauge("engrain_student_entropy_nats", "Student's entropy at the last step.", registry=registry)
        self._accuracy = Gauge(
            "engrain_accuracy", "On the last judged round's test tasks.", ["measured"], registry=registry
        )
        self._waiting = Gauge("engrain_arrived_episodes", "New episodes that wait for a round.", registry=registry)
        self._failures = Counter("engrain_failures", "Rounds broken off, to be tried again.", registry=registry)
        self._disk = Gauge("engrain_checkpoint_bytes", "Disk that checkpoints take.", registry=registry)
        seen = Gauge("engrain_last_event_timestamp_seconds", "When the loop last did something.", registry=registry)
        seen.set_function(lambda: self._last)
        for stage in (*STAGES, "waiting"):
            self._stage.labels(stage).set(0)

    def begin(self, number: int, seed: int) -> None:
        """A round begins or goes on."""
        self.round = number
        self._number.set(number)
        self._counted.clear()
        self._at("starting")

    def stage(self, name: str, text: str) -> None:
        """A stage begins."""
        self._at(name)

    def note(self, text: str) -> None:
        """A sign of life."""
        self._last = time.time()

    def rollout(self, what: str, stats: RolloutStats) -> None:
        """Episodes since the last call; those that were there before are not counted."""
        now = (stats.episodes - stats.known, stats.sampled_tokens)
        played, tokens = (max(a - b, 0) for a, b in zip(now, self._counted.get(what, (0, 0)), strict=True))
        self._counted[what] = now
        self._episodes.inc(played)
        self._tokens.inc(tokens)
        self._last = time.time()

    def step(self, metrics: StepMetrics, total: int) -> None:
        """A training step is over."""
        self._steps.inc()
        self._divergence.set(metrics.divergence)
        self._entropy.set(metrics.student_entropy)
        self._last = time.time()

    def end(self, result: RoundResult) -> None:
        """A round is over."""
        judged = {True: "promoted", False: "rejected"}
        self._rounds.labels(judged[result.verdict.promoted] if result.verdict else result.status).inc()
        for name, evaluation in result.evaluations.items():
            self._accuracy.labels(name).set(evaluation.accuracy)
        self._at("waiting")

    def waiting(self, episodes: int) -> None:
        """Nothing to do yet; so many episodes arrived."""
        self._waiting.set(episodes)
        self._at("waiting")

    def failed(self) -> None:
        """A round was broken off by something outside."""
        self._failures.inc()
        self._at("waiting")

    def disk(self, size: int) -> None:
        """Checkpoints take so many bytes."""
        self._disk.set(size)

    def health(self) -> dict[str, Any]:
        """What /healthz says when all is well."""
        return {
            "status": "ok",
            "model": self.model,
            "round": self.round,
            "doing": self.doing,
            "seconds_since_last_event": round(time.time() - self._last, 1),
        }

    def _at(self, stage: str) -> None:
        for other in (*STAGES, "waiting"):
            self._stage.labels(other).set(other == stage)
        self.doing, self._last = stage, time.time()


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""


@contextmanager
def serve_metrics(
    listener: MetricsListener, host: str, port: int, check: Callable[[], None] = lambda: None
) -> Iterator[int]:
    """Serve the listener's metrics and health in a thread; yields the port, which 0 lets the system choose.

    Args:
        listener: what is served.
        host: address to bind; the loopback one keeps other machines out.
        port: the port.
        check: raises where the loop is not well: /healthz answers 503 with the message then.

    Raises:
        MetricsPortError: the port is taken, or the address is not this machine's.
    """
    metrics: Callable[..., Iterable[bytes]] = make_wsgi_app(listener.registry)

    def app(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            return metrics(environ, start)
        if path != "/healthz":
            start("404 Not Found", [("Content-Type", "text/plain")])
            return [b"/metrics or /healthz\n"]
        health, status = listener.health(), "200 OK"
        try:
            check()
        except Exception as error:
            health, status = {**health, "status": "failing", "reason": str(error)}, "503 Service Unavailable"
        start(status, [("Content-Type", "application/json")])
        return [json.dumps(health).encode() + b"\n"]

    try:
        server = make_server(host, port, app, ThreadingWSGIServer, _Quiet)
    except (OSError, OverflowError) as error:
        raise MetricsPortError(
            f"metrics cannot be served at {host}:{port}: {error}; choose another --metrics-port"
        ) from error
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        yield int(server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=2.0)
