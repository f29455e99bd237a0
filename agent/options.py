"""How episodes are played, wherever that is: the options that `agent.rollout.play` and `Cluster.play` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Required, TypedDict

from agent.engines.base import Engine
from agent.episode import Episode, SamplingParams
from agent.game import Game, Plan
from agent.renderer import Renderer
from agent.scheduler import MakeEnv, Scheduler
from agent.stats import RolloutStats
from agent.workers import Workers

#: The most requests under way in an engine, or in each copy of one that has several, unless told otherwise.
BATCH = 64


class PlayOptions(TypedDict, total=False):
    """What an episode's outcome, and its time, may depend on besides the task and the engine.

    Args:
        sampling: its `seed` is ignored: every request gets its own, from `seed`, task, sample and turn. With
            `admissible_only` each reply is one of the actions that the env lists.
        namespace: part of every episode's id; the same namespace, task and sample give the same id.
        knowledge: text placed first in the system message. It is not part of `Episode.messages`.
        knowledge_id: its id, as `Episode.knowledge`.
        samples: episodes a task; 1 if not given.
        max_tokens_per_episode: the most tokens after the first prompt; None is as many as the context holds.
        turn_seconds: the most time that one step of an env may take where it plays in a worker process, and a fifth of
            what its start may take; one that takes longer is killed, and its episode ends with an error. 120 if not
            given.
        episode_seconds: the most time an episode may take, waiting for the engine included; checked at every turn, and
            while an env steps in a worker process. It ends with an error. None is no limit.
        batch: the most requests under way in the engine, 64 for each of its copies if not given; twice as many envs are
            open at most.
        workers: threads that make and step envs that need no process of their own; 8 if not given.
        seed: fixes all sampling; 0 if not given.
        make_env: None is `envs.registry.make`, in worker processes where the task's world is `isolated`. Envs of any
            other function play in threads of this process.
    """

    sampling: Required[SamplingParams]
    namespace: Required[str]
    knowledge: str | None
    knowledge_id: str | None
    samples: int
    max_tokens_per_episode: int | None
    turn_seconds: float
    episode_seconds: float | None
    batch: int
    workers: int
    seed: int
    make_env: MakeEnv | None


def scheduled(
    engine: Engine,
    options: PlayOptions,
    *,
    on_end: Callable[[Game, Episode], None],
    progress: Callable[[RolloutStats], None] | None = None,
    stats: RolloutStats | None = None,
    processes: Workers | None = None,
    lockstep: bool = False,
) -> Scheduler:
    """A scheduler that plays with these options; see `agent.rollout.play` for the rest."""
    plan = Plan(
        engine=engine,
        renderer=Renderer(engine.tokenizer),
        sampling=options["sampling"].model_copy(update={"seed": options.get("seed", 0)}),
        knowledge=options.get("knowledge"),
        knowledge_id=options.get("knowledge_id"),
        max_new=options.get("max_tokens_per_episode"),
        episode_seconds=options.get("episode_seconds"),
    )
    return Scheduler(
        plan,
        on_end=on_end,
        progress=progress,
        stats=stats,
        batch=options.get("batch", BATCH * getattr(engine, "copies", 1)),
        threads=options.get("workers", 8),
        make_env=options.get("make_env"),
        workers=processes,
        turn_seconds=options.get("turn_seconds", 120.0),
        lockstep=lockstep,
    )
