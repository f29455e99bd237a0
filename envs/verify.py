"""Whether an answer equals the expected one, at a bounded price whatever the answer is.

Plain numbers and equal texts are decided here. The rest goes to math-verify (SymPy) in a worker process with a time
and a memory limit: an answer such as `9**9**9**9` costs a second and the worker, not the run.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from envs.answers import plain_number
from envs.errors import EnvFailedError

#: No right answer is longer; a longer one is wrong without a look.
MAX_CHARACTERS = 2000
#: What SymPy's parser must never see: attribute access, dunders, quotes and statements.
_UNSAFE = re.compile(r"__|[\"'`;@#]|\.\s*[A-Za-z_]|\b(?:import|lambda|exec|eval|open)\b")
#: Arithmetic left undone: echoing the question is not an answer where a number is asked for.
_UNDONE = re.compile(r"[\d)}]\s*(?:[-+*/^×÷·]|\*\*|\\times|\\cdot|\\div)\s*[({\d-]")
_START_SECONDS = 60.0
#: The worker's own alarm comes first; the parent's kill is for a worker that is stuck in the kernel.
_GRACE_SECONDS = 1.0


class _Worker:
    """One child process. `ask` returns None when the child died or was killed over it."""

    def __init__(self, seconds: float, memory_bytes: int) -> None:
        script = Path(__file__).with_name("verify_worker.py")
        # -P keeps this folder off the child's path: `envs/math.py` must not stand before the standard `math`.
        command = [sys.executable, "-P", str(script), str(memory_bytes), str(seconds)]
        self._seconds = seconds
        self._ready = False
        self._process = subprocess.Popen(  # noqa: S603 - our own script, no shell
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
        if self._process.stdin is None or self._process.stdout is None:
            raise EnvFailedError("the answer checker has no pipes")
        self._requests, self._replies = self._process.stdin, self._process.stdout

    def ask(self, answer: str, expected: str) -> bool | None:
        if not self._ready:
            if self._line(_START_SECONDS) != b"ready":
                self.kill()
                raise EnvFailedError("the answer checker did not start: is math-verify installed?")
            self._ready = True
        try:
            request = json.dumps({"answer": answer, "expected": expected})
            self._requests.write(request.encode() + b"\n")
            self._requests.flush()
        except OSError:
            return None
        return {b"1": True, b"0": False}.get(self._line(self._seconds + _GRACE_SECONDS))

    def _line(self, seconds: float) -> bytes:
        descriptor = self._replies.fileno()
        deadline = time.monotonic() + seconds
        ready = select.poll()  # `select.select` knows no descriptor from 1024 on, and many connections may be open
        ready.register(descriptor, select.POLLIN)
        line = b""
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not ready.poll(1000 * left):
                return b""
            piece = os.read(descriptor, 64)
            if not piece:
                return b""
            line += piece
        return line.strip()

    def kill(self) -> None:
        self._process.kill()
        for pipe in (self._requests, self._replies):
            with suppress(OSError):
                pipe.close()
        self._process.wait()


class AnswerChecker:
    """Compares answers; safe to share between threads. The worker starts with the first answer that needs it.

    Args:
        seconds: time limit of one comparison; a comparison that runs out of it is "not equal".
        memory_bytes: the worker's address space.
    """

    def __init__(self, seconds: float = 1.0, memory_bytes: int = 1 << 30) -> None:
        self._seconds = seconds
        self._memory_bytes = memory_bytes
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._owner = os.getpid()

    def equal(self, answer: str, expected: str) -> bool:
        """Whether the two are the same number, expression or (case aside) text.

        Raises:
            EnvFailedError: the worker cannot be started at all.
        """
        decided = _decide(answer, expected)
        if decided is not None:
            return decided
        answer = _bare(answer)
        if plain_number(_bare(expected)) is not None:
            answer = answer.rpartition("=")[2].strip()
        with self._lock:
            return self._ask(answer, _bare(expected))

    def _ask(self, answer: str, expected: str) -> bool:
        if self._owner != os.getpid():  # a forked child must not talk into its parent's pipe
            self._worker, self._owner = None, os.getpid()
        worker = self._worker or self._start()
        same = worker.ask(answer, expected)
        if same is None:
            worker.kill()
            self._start()  # the next one finds it warm
            return False
        return same

    def _start(self) -> _Worker:
        self._worker = _Worker(self._seconds, self._memory_bytes)
        return self._worker

    def close(self) -> None:
        """End the worker; the next answer that needs one starts another."""
        with self._lock:
            if self._worker is not None and self._owner == os.getpid():
                self._worker.kill()
            self._worker = None


def _bare(text: str) -> str:
    return text.strip().strip("$").strip().rstrip(".").strip()


def _decide(answer: str, expected: str) -> bool | None:
    """The verdict where it needs no algebra, else None."""
    if len(answer) > MAX_CHARACTERS:
        return False
    answer, expected = _bare(answer), _bare(expected)
    if not answer or not expected:
        return False
    if answer.casefold() == expected.casefold():
        return True
    wanted = plain_number(expected)
    given = plain_number(answer)
    if wanted is not None and given is None:
        last = answer.rpartition("=")[2].strip()
        given = plain_number(last)
        if given is None and (_UNDONE.search(last) or not re.search(r"\d|\\", last)):
            return False
    if wanted is not None and given is not None:
        return wanted == given
    if _UNSAFE.search(answer) or _UNSAFE.search(expected):  # a data set's answer is as foreign as a model's
        return False
    return None


@cache
def shared_checker() -> AnswerChecker:
    """This process's one checker with the default limits."""
    checker = AnswerChecker()
    atexit.register(checker.close)
    return checker
