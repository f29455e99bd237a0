"""Playing many tasks together: whichever envs wait for a reply share the engine.

An episode's outcome depends on its task, its sample number and the seed only, not on who was in the batch (up to the
rounding of the model's matrix products). `agent.scheduler` does the work, `agent.cluster` the same on many machines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Unpack

from agent.engines.base import Engine, steady
from agent.episode import Episode, episode_id
from agent.game import Game, request_seed
from agent.options import PlayOptions, scheduled
from agent.scheduler import MakeEnv
from agent.stats import RolloutStats
from agent.workers import Workers
from envs.base import Task

__all__ = ["MakeEnv", "PlayOptions", "RolloutStats", "play", "request_seed"]


def play(
    tasks: Sequence[Task],
    engine: Engine,
    *,
    processes: Workers | None = None,
    on_episode: Callable[[Episode], None] | None = None,
    progress: Callable[[RolloutStats], None] | None = None,
    stats: RolloutStats | None = None,
    skip: Collection[str] = (),
    lockstep: bool = False,
    **options: Unpack[PlayOptions],
) -> list[Episode]:
    """Play every task `samples` times; the episodes in the order of the tasks, samples of one task together.

    Args:
        tasks: what to play; a task that stands there again counts as its next sample.
        engine: who plays. A `StreamingEngine` is kept full; any other gets those requests together that are ready.
        processes: worker processes that play all tasks; None shares one set of them among all calls.
        on_episode: called in this thread with every episode as soon as it is over, failed ones too. What it got
            before an interrupt is complete.
        progress: called in this thread after every engine call.
        stats: filled in as the play goes on.
        skip: ids of episodes that are not to be played (again); they are missing in the result.
        lockstep: before every engine call wait for all open envs, so that batches, and with them the rounding of the
            model's arithmetic, do not depend on timing: the same bits again, at the pace of the slowest env.
        options: see `agent.options.PlayOptions`; `sampling` and `namespace` are needed.

    Raises:
        UsageError: a sampling parameter is out of range, or the model's chat template cannot be used.
        EngrainError: the engine failed. What an env raises costs its episode only, and so does a request that fails
            by itself.
    """
    finished: dict[int, Episode] = {}

    def on_end(game: Game, episode: Episode) -> None:
        finished[game.order] = episode
        if on_episode is not None:
            on_episode(episode)

    stats = stats if stats is not None else RolloutStats()
    scheduler = scheduled(
        engine, options, on_end=on_end, progress=progress, stats=stats, processes=processes, lockstep=lockstep
    )
    games = [
        Game(scheduler.plan, order, identity, task, sample)
        for order, (identity, task, sample) in enumerate(
            identified(tasks, options["namespace"], options.get("samples", 1))
        )
        if identity not in skip
    ]
    stats.total += len(games)
    with steady(engine):
        scheduler.play(games)
    return [finished[order] for order in sorted(finished)]


def identified(tasks: Sequence[Task], namespace: str, samples: int = 1) -> list[tuple[str, Task, int]]:
    """Every episode that is to be played: its id, task and sample number, in the order of the tasks."""
    seen: Counter[str] = Counter()
    episodes = []
    for task in (task for task in tasks for _ in range(samples)):
        episodes.append((episode_id(namespace, task, seen[task.id]), task, seen[task.id]))
        seen[task.id] += 1
    return episodes
