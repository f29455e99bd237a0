"""Envs for worker processes that crash, hang, dawdle or chatter when their task says so; imported by the worker."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from envs.base import Env, Observation, Step, Task
from envs.errors import EnvFailedError


class _NoText(str):
    """Becomes something that is no JSON when it is joined to a text."""

    def __radd__(self, other: str) -> object:
        return object()


class Breaking(Env):
    """Says back what it hears for `turns` turns, and does at turn `at` what `does` says."""

    system = "Echo."
    max_turns = 20

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.options = dict(task.parameters)
        self.turn = 0

    def reset(self) -> Observation:
        self._do()
        return Observation(f"start {self.task.seed}", ("go on", "stop"))

    def step(self, text: str) -> Step:
        self.turn += 1
        time.sleep(self.options.get("wait", 0.0))
        said = f"heard {text!r}" + self._do()
        done = self.turn >= self.options.get("turns", 3)
        return Step(Observation(said), 0.5, done, feedback="well done" if done else "")

    @property
    def score(self) -> float:
        return 1.0 if self.turn >= self.options.get("turns", 3) else 0.0

    def close(self) -> None:
        if "closes" in self.options:
            with Path(self.options["closes"]).open("a") as file:
                file.write(f"{self.task.seed}\n")

    def _do(self) -> str:
        if self.turn != self.options.get("at"):
            return f" {random.random()}" if self.options.get("does") == "drift" else ""
        match self.options["does"]:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "segfault":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "leave":
                os._exit(3)
            case "exit":
                sys.exit("enough")
            case "hang":
                time.sleep(600)
            case "hang deaf":  # not even its own alarm reaches it
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
                time.sleep(600)
            case "raise":
                raise RuntimeError("went\nwrong")
            case "fail":
                raise EnvFailedError("a fault of the world")
            case "no text":
                return _NoText()
            case "chatter":
                os.write(1, b"{}\n" * 1000)
                print("{}", flush=True)
                return f" {sys.stdin.read()!r}"
            case "tell":
                return f" {sorted({'torch', 'transformers', 'numpy'} & set(sys.modules))} {os.getpid()}"
        return ""


def make(task: Task) -> Env:
    return Breaking(task)
