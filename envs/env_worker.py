"""The process that plays envs which may crash or hang: run by `agent.workers` and killed at will.

It reads one JSON object a line and answers each with one, after a first line `"ready"`. `{"game": 3, "task": {...}}`
starts an episode, `{"game": 3, "action": "..."}` is its next step, `{"forget": [3]}` (alone, or beside either) closes
envs. Nothing is unpickled. Its own alarm ends it when a request takes longer than its `seconds`, even inside C code
and even when the parent is gone.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import IO, Any

from envs.base import Env, Observation, Step, Task
from envs.errors import EngrainError


class _Games:
    """The envs that are being played here, by the parent's numbers for them."""

    def __init__(self, make: Callable[[Task], Env]) -> None:
        self._make = make
        self._envs: dict[int, Env] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        for number in request.get("forget", ()):
            if env := self._envs.pop(number, None):
                with suppress(Exception):  # the episode is over
                    env.close()
        if "game" not in request:
            return {}
        number = request["game"]
        if "task" in request:
            env = self._envs[number] = self._make(Task.model_validate(request["task"]))
            started = _observed(env.reset())
            return {**started, "system": env.system, "max_turns": env.max_turns, **_outcome(env)}
        env = self._envs[number]
        step = env.step(request["action"])
        return {**_stepped(step), **_outcome(env)}


def _observed(observation: Observation) -> dict[str, Any]:
    return {"text": observation.text, "admissible": observation.admissible}


def _stepped(step: Step) -> dict[str, Any]:
    gain = {"reward": float(step.reward), "done": bool(step.done), "feedback": step.feedback}
    return {**_observed(step.observation), **gain}


def _outcome(env: Env) -> dict[str, Any]:
    return {"score": float(env.score), "success": bool(env.success)}


def _serve(requests: IO[bytes], replies: IO[bytes], target: str) -> None:
    module, _, name = target.partition(":")
    games = _Games(getattr(import_module(module), name))
    replies.write(b'"ready"\n')
    replies.flush()
    for line in requests:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request["seconds"])
        try:
            if "home" in request:
                os.environ["ENGRAIN_HOME"] = request["home"]
            answer = json.dumps(games.answer(request))
        except EngrainError as error:
            answer = json.dumps({"error": str(error)})
        except (Exception, SystemExit) as error:  # whatever an env raises or says costs its episode, not this process
            answer = json.dumps({"error": f"{type(error).__name__}: {' '.join(str(error).split())}"})
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(answer.encode() + b"\n")
        replies.flush()


def main(target: str) -> None:
    """Serve until standard input ends.

    Args:
        target: `module:function` that makes the env of a task.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)  # what a game prints or reads is not for the parent's pipes
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    _serve(requests, replies, target)


if __name__ == "__main__":
    main(sys.argv[1])
