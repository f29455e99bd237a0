"""Playing into the store, and measuring: nothing that is already there is played again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from agent.cluster import Cluster
from agent.engines.base import Engine, StreamingEngine
from agent.episode import Episode, SamplingParams, StopReason, episode_id
from agent.rollout import RolloutStats, play
from engrain.gate import wilson
from envs.base import Task
from memory.records import EvaluationRecord, EvaluationResult, Knowledge
from memory.store import Store

Progress = Callable[[RolloutStats], None]


def play_stored(
    store: Store,
    tasks: Sequence[Task],
    engine: Engine | Cluster,
    *,
    sampling: SamplingParams,
    namespace: str,
    stage: str,
    round_id: str | None = None,
    knowledge: Knowledge | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    again: bool = False,
) -> list[Episode]:
    """Play the tasks whose episodes the store lacks, each stored as it ends; all of them, in the tasks' order.

    `again` plays those anew that an error ended, in place of what was stored of them.
    """
    ids = [episode_id(namespace, task) for task in tasks]
    known = {id_: store.episode(id_) for id_ in store.has_episodes(ids)}
    for broken in failures(list(known.values())) if again else ():
        store.forget("episode", broken.id, "engrain", "it broke off, and is played again")
        del known[broken.id]
    solved = sum(episode.success for episode in known.values())
    stats = RolloutStats(total=len(known), episodes=len(known), known=len(known), successes=solved)
    if isinstance(engine, Cluster):
        play_all = engine.play
    else:
        # In lockstep the same command gives the same numbers. Engines that fill their batches as they go cannot promise
        # that, and are kept full instead.
        play_all = partial(play, engine=engine, lockstep=not isinstance(engine, StreamingEngine))
    played = play_all(
        tasks,
        sampling=sampling,
        namespace=namespace,
        knowledge=knowledge.text if knowledge else None,
        knowledge_id=knowledge.id if knowledge else None,
        seed=seed,
        on_episode=lambda episode: _keep(store, episode, round_id, stage),
        progress=progress,
        stats=stats,
        skip=known,
    )
    found = known | {episode.id: episode for episode in played}
    return [found[id_] for id_ in ids]


def _keep(store: Store, episode: Episode, round_id: str | None, stage: str) -> None:
    store.add_episodes([episode], round_id=round_id, stage=stage)


def measure(
    name: str,
    episodes: Sequence[Episode],
    *,
    checkpoint: str | None,
    knowledge: str | None = None,
    round_id: str | None = None,
) -> EvaluationRecord:
    """Accuracy of played episodes with its Wilson interval. A failed episode counts as not solved.

    Raises:
        ValueError: there are no episodes, or they are of several worlds or splits.
    """
    places = {(episode.task.env, episode.task.split) for episode in episodes}
    if len(places) != 1:
        raise ValueError(f"one evaluation is of one world and one split, not {sorted(places)}")
    ((env, split),) = places
    rate = wilson([episode.success for episode in episodes])
    return EvaluationRecord(
        name=name,
        round_id=round_id,
        checkpoint=checkpoint,
        knowledge=knowledge,
        env=env,
        split=split.value,
        n=rate.n,
        successes=sum(episode.success for episode in episodes),
        accuracy=rate.accuracy,
        low=rate.low,
        high=rate.high,
        mean_score=sum(episode.score for episode in episodes) / len(episodes),
        results=tuple(
            EvaluationResult(task_id=e.task.id, episode_id=e.id, success=e.success, score=e.score) for e in episodes
        ),
    )


def outcomes(evaluation: EvaluationRecord) -> list[bool]:
    """Success task by task, in the order of the tasks."""
    return [result.success for result in evaluation.results]


def failures(episodes: Sequence[Episode]) -> list[Episode]:
    """Episodes that an error ended."""
    return [episode for episode in episodes if episode.stop_reason is StopReason.ERROR]
