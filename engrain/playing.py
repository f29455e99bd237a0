"""Playing within a round: with which weights and which text, and how it came out. All of it goes through the store."""

from __future__ import annotations

from collections.abc import Sequence

from agent.cluster import Cluster
from agent.engines.base import Engine
from agent.episode import Episode, SamplingParams
from engrain.config import ImproveConfig
from engrain.evaluate import failures, measure, play_stored
from engrain.play import load as load
from engrain.rounds import Listener
from envs.base import Task
from memory.records import CheckpointRecord, EvaluationRecord, Knowledge
from memory.store import Store


class Playing:
    """Plays for one round; an episode that the round has played before is found, not played again.

    Args:
        store: keeps the episodes and evaluations.
        player: who plays unless said otherwise.
        config: the round's settings.
        round_id: the round.
        listener: is told how far it is.
    """

    def __init__(
        self, store: Store, player: Engine | Cluster, config: ImproveConfig, round_id: str, listener: Listener
    ) -> None:
        self.store, self.player, self.config, self.round_id, self.listener = store, player, config, round_id, listener

    def play(
        self,
        name: str,
        tasks: Sequence[Task],
        knowledge: Knowledge | None = None,
        *,
        sampling: SamplingParams | None = None,
        engine: Engine | None = None,
    ) -> list[Episode]:
        """Episodes of the tasks in their order.

        Args:
            name: what they are played for; the same name, task and knowledge is the same episode.
            tasks: what to play.
            knowledge: stands in the context.
            sampling: None is that of evaluations.
            engine: who plays instead.
        """
        episodes = play_stored(
            self.store,
            tasks,
            engine or self.player,
            sampling=sampling or self.config.evaluation.sampling,
            namespace=f"{self.round_id}/{name}/{knowledge.id if knowledge else ''}",
            stage=name,
            round_id=self.round_id,
            knowledge=knowledge,
            seed=self.config.seed,
            progress=lambda stats: self.listener.rollout(name, stats),
        )
        if failed := failures(episodes):
            self.listener.note(f"{len(failed)} of {len(episodes)} episodes failed, the first: {failed[0].error}")
        return episodes

    def evaluate(
        self,
        name: str,
        tasks: Sequence[Task],
        checkpoint: CheckpointRecord | None,
        knowledge: Knowledge | None = None,
    ) -> EvaluationRecord:
        """Play the tasks and keep the accuracy; `checkpoint` is what plays."""
        return self.keep(name, self.play(name, tasks, knowledge), checkpoint, knowledge)

    def keep(
        self,
        name: str,
        episodes: Sequence[Episode],
        checkpoint: CheckpointRecord | None,
        knowledge: Knowledge | None = None,
    ) -> EvaluationRecord:
        """Keep the accuracy of episodes that were played with this checkpoint."""
        return self.store.add_evaluation(
            measure(
                name,
                episodes,
                checkpoint=checkpoint.id if checkpoint else None,
                knowledge=knowledge.id if knowledge else None,
                round_id=self.round_id,
            )
        )
