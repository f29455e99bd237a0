"""Processes that play envs which may crash or hang, at the price of one episode.

A few worker processes hold many envs each. When a worker dies or is killed over a call that took too long, that call's
episode is over; the others that lived there are played again, action by action, in the next worker, and must say the
same again. Envs of a worker that is busy for long move in the same way, so that one slow env does not hold up others.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import cache
from typing import Any

from envs.base import Env, Observation, Step, Task
from envs.errors import EnvFailedError
from envs.home import engrain_home

_REGISTRY = "envs.registry:make"
_START = "import sys; sys.path[:] = sys.argv[2:]; from envs.env_worker import main; main(sys.argv[1])"
_START_SECONDS = 300.0
#: The worker's own alarm comes first; the parent's kill is for a worker that is stuck in the kernel.
_GRACE_SECONDS = 5.0
#: A start may take this many times as long as a step: games are made then, and their libraries imported.
_START_FACTOR = 5
#: How long an env waits for its own worker before another one takes it over.
_PATIENCE = 1.0
_FORGET_SECONDS = 10.0
_NUMBERS = itertools.count()


#: What calls an env, and the env; None where envs that were left behind are to be closed.
_Job = tuple["RemoteEnv | None", Callable[[], None]]


class _GoneError(Exception):
    """A worker process is no more; why."""


class _Process:
    """One worker process, used by one thread at a time."""

    def __init__(self, target: str) -> None:
        # The child looks for modules where this process does, whatever this process was started from.
        command = [sys.executable, "-P", "-c", _START, target, *sys.path]
        self._popen = subprocess.Popen(  # noqa: S603 - our own code, no shell
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # interpreters that a game started go with it
        )
        assert self._popen.stdin is not None  # noqa: S101
        assert self._popen.stdout is not None  # noqa: S101
        self._requests, self._replies = self._popen.stdin, self._popen.stdout
        self._buffer = b""
        self._ready = False
        self._hung_up = False
        self.leavings: deque[int] = deque()  # envs to close at the next occasion

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def alive(self) -> bool:
        return self._popen.poll() is None

    def call(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """One request and its answer.

        Raises:
            _GoneError: the process died over it, or was killed because it took longer than `seconds`.
        """
        if not self._ready:
            if self._line(_START_SECONDS) is None:
                self.kill()
                raise _GoneError("the worker process did not start")
            self._ready = True
        forget = [self.leavings.popleft() for _ in range(len(self.leavings))]
        whole = {**request, "seconds": seconds, "forget": forget, "home": str(engrain_home())}
        with suppress(OSError):  # a process that is gone does not answer either
            self._requests.write(json.dumps(whole).encode() + b"\n")
            self._requests.flush()
        line = self._line(seconds + _GRACE_SECONDS)
        if line is not None:
            answer: dict[str, Any] = json.loads(line)
            return answer
        died = self.kill()
        if died is None or died == -signal.SIGALRM:
            raise _GoneError(f"it gave no answer within its limit of {seconds:.3g} s")
        raise _GoneError(f"its process died ({_cause(died)})")

    def _line(self, seconds: float) -> bytes | None:
        """The next line; None where the process ends or the time is up."""
        deadline = time.monotonic() + seconds
        ready = select.poll()
        ready.register(self._replies, select.POLLIN)
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not ready.poll(1000 * left):
                return None
            piece = os.read(self._replies.fileno(), 1 << 16)
            if not piece:
                self._hung_up = True
                return None
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def kill(self) -> int | None:
        """End the process and all that it started. How it had ended by itself; None where it had not."""
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(_GRACE_SECONDS if self._hung_up else 0.0)  # who hangs up is about to be gone
        ended = self._popen.returncode
        self.end()
        for pipe in (self._requests, self._replies):
            with suppress(OSError):
                pipe.close()
        return ended

    def end(self) -> None:
        """End the process; safe while another thread waits for its answer."""
        with suppress(OSError):
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()


class _Worker:
    """A thread's place: its current process, and since when it has been busy."""

    def __init__(self, target: str, changed: threading.Condition) -> None:
        self._target = target
        self.changed = changed
        self.process: _Process | None = None
        self.busy_since: float | None = time.monotonic()

    def running(self) -> _Process:
        """Its process, started where there is none."""
        if self.process is None or not self.process.alive:
            self.stop()
            self.process = _Process(self._target)
        return self.process

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process = None


class RemoteEnv(Env):
    """An env that lives in a worker process. `Workers.submit` says where; only what it runs may call this.

    Args:
        task: what is played.
        turn_seconds: the most time that one step may take; the start may take five times as long.
        episode_seconds: the most time from the start on; None is no limit.
    """

    def __init__(self, task: Task, turn_seconds: float, episode_seconds: float | None = None) -> None:
        super().__init__(task)
        self.worker: _Worker | None = None
        self.closed = False
        self._number = next(_NUMBERS)
        self._turn_seconds, self._episode_seconds = turn_seconds, episode_seconds
        self._deadline: float | None = None
        self._process: _Process | None = None
        self._start: Observation | None = None
        self._steps: list[tuple[str, Observation]] = []
        self._score, self._success = 0.0, False

    def reset(self) -> Observation:
        """Start the episode.

        Raises:
            EnvFailedError: the env's own error, or its process died or was killed over the time limit.
        """
        if self._episode_seconds is not None:
            self._deadline = time.monotonic() + self._episode_seconds
        answer = self._ask({"task": self.task.model_dump(mode="json")})
        self.system, self.max_turns = answer["system"], answer["max_turns"]
        self._start = _observation(answer)
        return self._start

    def step(self, text: str) -> Step:
        """Play one reply.

        Raises:
            EnvFailedError: as `reset`, or the env had to move and did not say the same again.
        """
        answer = self._ask({"action": text})
        step = Step(_observation(answer), answer["reward"], answer["done"], answer["feedback"])
        self._steps.append((text, step.observation))
        return step

    @property
    def score(self) -> float:
        """As of the last answer."""
        return self._score

    @property
    def success(self) -> bool:
        """As of the last answer."""
        return self._success

    def close(self) -> None:
        """Let the worker close the env when it next has time; does not wait."""
        self.closed = True
        if self.worker is not None and self._process is not None:
            with self.worker.changed:
                self._process.leavings.append(self._number)
                self.worker.changed.notify_all()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.worker is not None  # noqa: S101
        process = self.worker.running()
        if self._process is not process:
            if self._process is not None:
                self._process.leavings.append(self._number)
            self._process = process
            if self._start is not None:
                self._again()
        return self._call(request)

    def _again(self) -> None:
        """Bring the env to where it was, in another process."""
        expected = [self._start, *(observation for _, observation in self._steps)]
        actions: list[dict[str, Any]] = [{"task": self.task.model_dump(mode="json")}]
        actions += [{"action": text} for text, _ in self._steps]
        for request, before in zip(actions, expected, strict=True):
            if _observation(self._call(request)) != before:
                raise EnvFailedError(
                    "its worker process was lost to another episode, and played again it went another way"
                )

    def _call(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process is not None  # noqa: S101
        seconds = self._turn_seconds * (_START_FACTOR if "task" in request else 1)
        if self._deadline is not None:
            seconds = min(seconds, self._deadline - time.monotonic())
            if seconds <= 0:
                raise EnvFailedError(f"the episode took longer than its limit of {self._episode_seconds:g} s")
        try:
            answer = self._process.call({"game": self._number, **request}, seconds)
        except _GoneError as gone:
            raise EnvFailedError(f"the env of task {self.task.id} failed: {gone}") from None
        if "error" in answer:
            raise EnvFailedError(answer["error"])
        self._score, self._success = answer["score"], answer["success"]
        return answer


class Workers:
    """Threads, each with a worker process, that run calls of envs.

    A process is started when it is first needed, lives until `close` or the end of this process, and is replaced when
    it breaks.

    Args:
        count: how many; None is one a core, at least 2 and at most 8.
        target: `module:function` that makes the env of a task; it must import where this process imports.
    """

    def __init__(self, count: int | None = None, target: str = _REGISTRY) -> None:
        self._target = target
        self._count = count or min(8, max(2, os.cpu_count() or 1))
        self._workers: list[_Worker] = []
        self._jobs: list[tuple[RemoteEnv, Callable[[], None]]] = []
        self._changed = threading.Condition()
        self._closed = False

    def submit(self, env: RemoteEnv, work: Callable[[], None]) -> None:
        """Run `work`, which calls `env` and does not raise, in one of the threads."""
        with self._changed:
            self._jobs.append((env, work))
            idle = sum(worker.busy_since is None for worker in self._workers)
            if len(self._jobs) > idle and len(self._workers) < self._count:
                worker = _Worker(self._target, self._changed)
                self._workers.append(worker)
                threading.Thread(target=self._drive, args=(worker,), name="env-worker", daemon=True).start()
            self._changed.notify_all()

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers that run."""
        processes = [worker.process for worker in self._workers]
        return [process.pid for process in processes if process is not None and process.alive]

    def close(self) -> None:
        """End the processes; envs that live there are lost. Jobs that were submitted may not run."""
        with self._changed:
            self._closed = True
            processes = [worker.process for worker in self._workers]
            self._changed.notify_all()
        for process in processes:
            if process is not None:
                process.end()

    def _drive(self, worker: _Worker) -> None:
        while (job := self._wait(worker)) is not None:
            env, work = job
            if env is None:
                with suppress(_GoneError):
                    worker.running().call({}, _FORGET_SECONDS)
            elif not env.closed:
                env.worker = worker
                work()
        worker.stop()

    def _wait(self, worker: _Worker) -> _Job | None:
        """The next job of this worker; one without an env where envs are to be closed; None at the end."""
        with self._changed:
            worker.busy_since = None
            while not self._closed:
                job = self._next(worker)
                process = worker.process
                if job is None and process is not None and process.leavings and process.alive:
                    job = (None, lambda: None)
                if job is not None:
                    worker.busy_since = time.monotonic()
                    return job
                self._changed.wait(_PATIENCE if self._jobs else None)
            return None

    def _next(self, worker: _Worker) -> _Job | None:
        """The job that this worker should do: of an env that lives here, a new one, or one that waits in vain."""
        now = time.monotonic()

        def rank(env: RemoteEnv) -> int | None:
            if env.worker is worker:
                return 0
            if env.worker is None:
                return 1
            since = env.worker.busy_since
            return 2 if since is not None and now - since > _PATIENCE else None

        ranked = [(order, place) for place, (env, _) in enumerate(self._jobs) if (order := rank(env)) is not None]
        return self._jobs.pop(min(ranked)[1]) if ranked else None


_ONE = threading.Lock()  # `cache` alone lets two threads make two


def shared_workers() -> Workers:
    """This process's workers for envs that `envs.registry` makes; ended when the process ends."""
    with _ONE:
        return _shared(os.getpid())


@cache
def _shared(owner: int) -> Workers:  # a forked child must not talk into its parent's pipes
    workers = Workers()
    atexit.register(workers.close)
    return workers


def forget(envs: Collection[Env | None]) -> None:
    """Close envs that will not be called again, wherever they are."""
    for env in envs:
        if env is not None:
            with suppress(Exception):  # their episodes are over
                env.close()


def _observation(answer: dict[str, Any]) -> Observation:
    admissible = answer["admissible"]
    return Observation(answer["text"], None if admissible is None else tuple(admissible))


def _cause(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"
