"""Playing many tasks together: whichever envs wait for a reply share the engine.

An episode's outcome depends on its task, its sample number and the seed only, not on who was in the batch (up to the
rounding of the model's matrix products). `agent.scheduler` does the work, `agent.cluster` the same on many machines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence

from agent.engines.base import Engine, steady
from agent.episode import Episode, SamplingParams, episode_id
from agent.game import Game, Plan, request_seed
from agent.renderer import Renderer
from agent.scheduler import MakeEnv, Scheduler
from agent.stats import RolloutStats
from agent.workers import Workers
from envs.base import Task

__all__ = ["MakeEnv", "RolloutStats", "play", "request_seed"]


def play(
    tasks: Sequence[Task],
    engine: Engine,
    *,
    sampling: SamplingParams,
    namespace: str,
    knowledge: str | None = None,
    knowledge_id: str | None = None,
    samples: int = 1,
    max_tokens_per_episode: int | None = None,
    turn_seconds: float = 120.0,
    episode_seconds: float | None = None,
    batch: int = 64,
    workers: int = 8,
    seed: int = 0,
    make_env: MakeEnv | None = None,
    processes: Workers | None = None,
    on_episode: Callable[[Episode], None] | None = None,
    progress: Callable[[RolloutStats], None] | None = None,
    stats: RolloutStats | None = None,
    skip: Collection[str] = (),
    lockstep: bool = False,
) -> list[Episode]:
    """Play every task `samples` times; the episodes in the order of the tasks, samples of one task together.

    Args:
        tasks: what to play; a task that stands there again counts as its next sample.
        engine: who plays. A `StreamingEngine` is kept full; any other gets those requests together that are ready.
        sampling: its `seed` is ignored: every request gets its own, from `seed`, task, sample and turn. With
            `admissible_only` each reply is one of the actions that the env lists.
        namespace: part of every episode's id; the same namespace, task and sample give the same id.
        knowledge: text placed first in the system message. It is not part of `Episode.messages`.
        knowledge_id: its id, as `Episode.knowledge`.
        samples: episodes a task.
        max_tokens_per_episode: the most tokens after the first prompt; None is as many as the context holds.
        turn_seconds: the most time that one step of an env may take where it plays in a worker process, and a fifth of
            what its start may take; one that takes longer is killed, and its episode ends with an error.
        episode_seconds: the most time an episode may take, waiting for the engine included; checked at every turn, and
            while an env steps in a worker process. It ends with an error. None is no limit.
        batch: the most requests under way in the engine; twice as many envs are open at most.
        workers: threads that make and step envs that need no process of their own.
        seed: fixes all sampling.
        make_env: None is `envs.registry.make`, in worker processes where the task's world is `isolated`. Envs of any
            other function play in threads of this process.
        processes: worker processes that play all tasks; None shares one set of them among all calls.
        on_episode: called in this thread with every episode as soon as it is over, failed ones too. What it got
            before an interrupt is complete.
        progress: called in this thread after every engine call.
        stats: filled in as the play goes on.
        skip: ids of episodes that are not to be played (again); they are missing in the result.
        lockstep: before every engine call wait for all open envs, so that batches, and with them the rounding of the
            model's arithmetic, do not depend on timing: the same bits again, at the pace of the slowest env.

    Raises:
        UsageError: a sampling parameter is out of range, or the model's chat template cannot be used.
        EngrainError: the engine failed. What an env raises costs its episode only, and so does a request that fails
            by itself.
    """
    plan = Plan(
        engine=engine,
        renderer=Renderer(engine.tokenizer),
        sampling=sampling.model_copy(update={"seed": seed}),
        knowledge=knowledge,
        knowledge_id=knowledge_id,
        max_new=max_tokens_per_episode,
        episode_seconds=episode_seconds,
    )
    games = [
        Game(plan, order, identity, task, sample)
        for order, (identity, task, sample) in enumerate(identified(tasks, namespace, samples))
        if identity not in skip
    ]
    finished: dict[int, Episode] = {}

    def on_end(game: Game, episode: Episode) -> None:
        finished[game.order] = episode
        if on_episode is not None:
            on_episode(episode)

    stats = stats if stats is not None else RolloutStats()
    stats.total += len(games)
    scheduler = Scheduler(
        plan,
        on_end=on_end,
        progress=progress,
        stats=stats,
        batch=batch,
        threads=workers,
        make_env=make_env,
        workers=processes,
        turn_seconds=turn_seconds,
        lockstep=lockstep,
    )
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
