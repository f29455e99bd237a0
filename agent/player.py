"""One of the players of `agent.cluster`: what runs on each machine of a Ray cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from agent.engines.base import Engine
from agent.episode import Episode, StopReason
from agent.game import Game
from agent.options import PlayOptions, scheduled
from agent.scheduler import Scheduler
from agent.stats import RolloutStats
from envs.base import Task


@dataclass(frozen=True)
class Job:
    """What all episodes of one `Cluster.play` share; travels to the players. `checkpoint` is a folder, or the base."""

    number: int
    options: PlayOptions
    checkpoint: Path | None
    checkpoint_id: str | None


@dataclass(eq=False)
class Item:
    """One episode that is to be played; `tries` are the players that were lost with it."""

    order: int
    id: str
    task: Task
    sample: int
    tries: int = 0


class Player:
    """The actor: one engine in a thread of its own, and the scheduler of the job it has."""

    def __init__(self, make_engine: Callable[[], Engine]) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._making = self._thread.submit(make_engine)
        self._number: int | None = None
        self._scheduler: Scheduler | None = None
        self._futures: dict[str, Future[Episode]] = {}
        self._broken: BaseException | None = None
        self._folder: Path | None = None  # that the engine has loaded

    async def ready(self) -> None:
        """Wait for the engine; raises what kept it from being made."""
        await asyncio.wrap_future(self._making)

    async def play(self, job: Job, item: Item) -> tuple[Episode, RolloutStats]:
        """Play one episode beside the others; also what this player has done in this job so far."""
        scheduler = self._start(job)
        future = self._futures[item.id] = Future()
        if self._broken is not None:  # looked up last: what breaks later finds the future there
            raise self._broken
        scheduler.add(Game(scheduler.plan, item.order, item.id, item.task, item.sample))
        return await asyncio.wrap_future(future), replace(scheduler.stats)

    async def give_up(self, job: Job, item: Item, why: str) -> tuple[Episode, RolloutStats]:
        """The episode of a task that is not to be tried again."""
        scheduler = self._start(job)
        game = Game(scheduler.plan, item.order, item.id, item.task, item.sample)
        return game.episode(StopReason.ERROR, why), replace(scheduler.stats)

    def _start(self, job: Job) -> Scheduler:
        if self._scheduler is not None and self._number == job.number:
            return self._scheduler
        if self._scheduler is not None:
            self._scheduler.stop()
        scheduler = scheduled(self._making.result(), job.options, on_end=self._ended)
        self._number, self._scheduler = job.number, scheduler
        self._thread.submit(self._serve, scheduler, job)
        return scheduler

    def _serve(self, scheduler: Scheduler, job: Job) -> None:
        engine = scheduler.plan.engine
        try:
            if (engine.checkpoint, self._folder) != (job.checkpoint_id, job.checkpoint):  # runs name folders alike
                engine.load(job.checkpoint)
                engine.checkpoint, self._folder = job.checkpoint_id, job.checkpoint
            scheduler.serve()
        except BaseException as error:
            self._broken = error
            while self._futures:
                self._futures.popitem()[1].set_exception(error)

    def _ended(self, game: Game, episode: Episode) -> None:
        if future := self._futures.pop(game.id, None):
            future.set_result(episode)
