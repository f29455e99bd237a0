"""What OPCD is compared with: samples of the teacher, who plays with the knowledge in its context.

`off_policy` meets the teacher's distributions on those samples ("context distillation"), `sft` learns the sampled
tokens, `mixed` takes a share of each batch from the student's own play.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

from torch import nn

from agent.engines.base import Engine
from agent.episode import Episode, SamplingParams
from agent.renderer import Renderer
from distill.adapters import teacher_weights
from distill.distributed import play
from distill.errors import DistillConfigError
from distill.packing import Sample
from distill.source import Batch, Source, allowed_in, check_pair, deal, opening, step_seed
from envs.base import Task

#: How many batches may be played for one step before it is given up that an episode succeeds.
TRIES = 4


def teacher_sample(episode: Episode, renderer: Renderer, max_context: int) -> Sample:
    """Pair an episode played with knowledge with the bare prompt: its own prompt ids are the teacher's.

    Raises:
        DistillConfigError: as `distill.source.check_pair`.
    """
    own = episode.token_ids[: episode.prompt_length]
    sample = Sample.from_episode(episode, own, allowed_in(episode, renderer))
    sample = replace(sample, student_prompt=tuple(renderer.prompt(opening(episode))))
    check_pair(sample, renderer, max_context)
    return sample


class TeacherSource:
    """The teacher plays a batch of tasks with the knowledge.

    Args:
        tasks: the training pool.
        engine: samples for the teacher: from the model below, or from a second model.
        knowledge: the text in its context.
        knowledge_id: its id, which the episodes carry, so that nobody takes them for bare ones.
        model: the student whose teacher samples (adapter off, or the teacher's adapter); None if the engine's weights
            are the teacher's anyway.
        batch_size: episodes a step.
        sampling: how the teacher samples.
        seed: fixes task order and sampling.
        only_successes: drop samples of failed episodes; a step without any success is played again, with other
            samples, at most four times in all.
        renderer: the student's, for the bare prompt; None is the engine's.
        namespace: prefix of the episode ids.
        max_context: most tokens of either sequence; None is the engine's context.
        on_episode: told each finished episode.

    Raises:
        DistillConfigError: there are no tasks.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        engine: Engine,
        knowledge: str,
        *,
        knowledge_id: str,
        model: nn.Module | None,
        batch_size: int,
        sampling: SamplingParams,
        seed: int,
        only_successes: bool = False,
        renderer: Renderer | None = None,
        namespace: str = "teacher",
        max_context: int | None = None,
        on_episode: Callable[[Episode], None] | None = None,
    ) -> None:
        if not tasks:
            raise DistillConfigError("no training tasks were given; ask for at least one")
        self.tasks, self.engine, self.model = list(tasks), engine, model
        self.knowledge, self.knowledge_id = knowledge, knowledge_id
        self.batch_size, self.sampling, self.seed, self.only_successes = batch_size, sampling, seed, only_successes
        self.namespace, self.on_episode = namespace, on_episode
        self.renderer = renderer or Renderer(engine.tokenizer)
        self.max_context = max_context or engine.max_context

    def __call__(self, step: int) -> Batch:
        """Play the batch of `step`.

        Raises:
            DistillConfigError: only successes are wanted and there are none.
        """
        episodes: list[Episode] = []
        for attempt in range(TRIES if self.only_successes else 1):
            episodes += self._play(step, attempt)
            kept = [e for e in episodes if e.sampled and (e.success or not self.only_successes)]
            if kept or not self.only_successes:
                return Batch(tuple(teacher_sample(e, self.renderer, self.max_context) for e in kept), tuple(episodes))
        raise DistillConfigError(
            f"none of the teacher's {len(episodes)} episodes of step {step + 1} succeeded; use better knowledge, or "
            "train on all of them (only_successes=False)"
        )

    def _play(self, step: int, attempt: int) -> list[Episode]:
        with teacher_weights(self.model) if self.model is not None else nullcontext():
            return play(
                deal(self.tasks, step, self.batch_size, self.seed),
                self.engine,
                sampling=self.sampling,
                namespace=f"{self.namespace}/{step}" + (f"/again-{attempt}" if attempt else ""),
                knowledge=self.knowledge,
                knowledge_id=self.knowledge_id,
                seed=step_seed(self.seed, step, attempt),
                on_episode=self.on_episode,
                lockstep=True,  # a resumed run must see the very same samples
            )


class MixedSource:
    """Each step's batch is the batches of several sources side by side, such as the student's and the teacher's."""

    def __init__(self, *sources: Source) -> None:
        self.sources = sources

    def __call__(self, step: int) -> Batch:
        """All their samples and episodes, in the order of the sources; as stale as the stalest."""
        batches = [source(step) for source in self.sources]
        return Batch(
            tuple(sample for batch in batches for sample in batch.samples),
            tuple(episode for batch in batches for episode in batch.episodes),
            max(batch.staleness for batch in batches),
        )
