"""A world for the foreground: in a worker process where it may crash or hang, called as if it were here."""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from agent.workers import RemoteEnv, shared_workers
from envs import registry
from envs.base import Env, Observation, Step, Task

#: The most seconds that one step may take; the start may take five times as long.
_TURN_SECONDS = 120.0


def open_env(task: Task) -> Env:
    """The task's env, in a worker process where its world may crash or hang."""
    return Nearby(task) if registry.isolated(task) else registry.make(task)


class Nearby(Env):
    """An env in a worker process, called from here as if it were here."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._env = RemoteEnv(task, _TURN_SECONDS)

    def reset(self) -> Observation:
        """Start the episode there."""
        observation: Observation = self._there(self._env.reset)
        self.system, self.max_turns = self._env.system, self._env.max_turns
        return observation

    def step(self, text: str) -> Step:
        """Play one reply there."""
        step: Step = self._there(lambda: self._env.step(text))
        return step

    @property
    def score(self) -> float:
        """As of the last answer."""
        return self._env.score

    @property
    def success(self) -> bool:
        """As of the last answer."""
        return self._env.success

    def close(self) -> None:
        """Let the worker close the env; does not wait."""
        self._env.close()

    def _there(self, call: Callable[[], Any]) -> Any:
        answers: SimpleQueue[tuple[Any, Exception | None]] = SimpleQueue()

        def work() -> None:
            try:
                answers.put((call(), None))
            except Exception as error:
                answers.put((None, error))

        shared_workers().submit(self._env, work)
        answer, error = answers.get()
        if error is not None:
            raise error
        return answer
