"""Where a step's samples come from: the student's own play. For the baselines' teacher see `distill.baselines`.

A source is a function of the step number alone, so that a resumed run sees the batches that an unbroken one would.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from agent.constraint import Allowed, Vocabulary, episode_allowed
from agent.engines.base import Engine
from agent.episode import Episode, Message, SamplingParams
from agent.renderer import Renderer
from distill.distributed import play
from distill.errors import DistillConfigError
from distill.packing import Sample
from envs.base import Task


@dataclass(frozen=True)
class Batch:
    """One step's samples and the episodes they were made of. `episodes` may be more: failed ones give no sample."""

    samples: tuple[Sample, ...]
    episodes: tuple[Episode, ...]
    staleness: int = 0  # optimiser steps between the weights that sampled and the weights of now

    @property
    def dropped(self) -> int:
        """Episodes that gave no sample."""
        return max(0, len(self.episodes) - len(self.samples))


T = TypeVar("T")

#: step -> batch
Source = Callable[[int], Batch]


def deal(pool: Sequence[T], step: int, batch_size: int, seed: int) -> list[T]:
    """What a step gets: the pool is dealt out without repeats, and shuffled anew when it is used up."""
    chosen: list[T] = []
    orders: dict[int, list[int]] = {}
    for index in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(index, len(pool))
        if epoch not in orders:
            orders[epoch] = list(range(len(pool)))
            random.Random(f"{seed}:{epoch}").shuffle(orders[epoch])  # noqa: S311 - not for secrets
        chosen.append(pool[orders[epoch][place]])
    return chosen


def step_seed(seed: int, *place: int) -> int:
    """The sampling seed of a step, or of a part of it, in [0, 2**63)."""
    digest = hashlib.sha256("\0".join(map(str, (seed, *place))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def make_sample(episode: Episode, renderer: Renderer, knowledge: str, max_context: int) -> Sample:
    """Pair an episode's sampled ids with both prompts: the bare one and the one with the knowledge first.

    Raises:
        DistillConfigError: the teacher's sequence exceeds `max_context` (nothing is ever cut silently), or the two
            prompts do not end in the same generation header.
    """
    if episode.knowledge is not None:  # its own prompt holds the knowledge
        raise DistillConfigError(f"episode {episode.id} was played with knowledge; use TeacherSource for such episodes")
    teacher_prompt = renderer.prompt(opening(episode), knowledge)
    sample = Sample.from_episode(episode, teacher_prompt, allowed_in(episode, renderer))
    check_pair(sample, renderer, max_context)
    return sample


def allowed_in(episode: Episode, renderer: Renderer) -> list[Allowed | None]:
    """For each sampled token the ids that were allowed there; [] where no reply was restricted.

    Raises:
        ConstraintError: a reply is none of its choices.
    """
    if not any(turn.choices for turn in episode.turns):
        return []
    return episode_allowed(vocabulary(renderer), episode)


@lru_cache(maxsize=4)
def vocabulary(renderer: Renderer) -> Vocabulary:
    """The tokens' bytes, which take a while to read; kept for the last few renderers."""
    return Vocabulary(renderer.tokenizer)


def opening(episode: Episode) -> list[Message]:
    """The messages before the first reply, without the knowledge."""
    count = next((i for i, m in enumerate(episode.messages) if m.role == "assistant"), len(episode.messages))
    return list(episode.messages[:count])


def check_pair(sample: Sample, renderer: Renderer, max_context: int) -> None:
    """Refuse a sample that one of the models could not read whole, or whose two prompts open the reply differently.

    Raises:
        DistillConfigError: in both cases; the message names the lengths or the header.
    """
    for who, prompt in (("teacher", sample.teacher_prompt), ("student", sample.student_prompt)):
        length = len(prompt) + len(sample.continuation)
        if length > max_context:
            raise DistillConfigError(
                f"the {who} would read {length} tokens and the model's context holds {max_context}; "
                "use a smaller knowledge budget or fewer response tokens"
            )
    header = _header(sample.student_prompt, renderer.stop_ids)
    if tuple(sample.teacher_prompt[-len(header) :]) != header:
        raise DistillConfigError(
            "student and teacher prompts end in different generation headers: "
            f"{renderer.tokenizer.decode(header)!r} and "
            f"{renderer.tokenizer.decode(sample.teacher_prompt[-len(header) :])!r}"
        )


def _header(prompt: Sequence[int], stop_ids: Sequence[int] | frozenset[int]) -> tuple[int, ...]:
    """What follows the last end of turn: the header that opens the reply."""
    last = max((i for i, token in enumerate(prompt) if token in stop_ids), default=-1)
    return tuple(prompt[last + 1 :]) or tuple(prompt[-1:])


class OnPolicySource:
    """OPCD's source: the student plays a batch of tasks without the knowledge.

    Args:
        tasks: the training pool.
        engine: samples from the weights under training.
        knowledge: the text the teacher will read.
        batch_size: episodes a step.
        sampling: how the student samples.
        seed: fixes task order and sampling.
        namespace: prefix of the episode ids.
        max_context: most tokens of the teacher's sequence; None is the engine's context.
        on_episode: told each finished episode, for instance to store it.

    Raises:
        DistillConfigError: there are no tasks.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        engine: Engine,
        knowledge: str,
        *,
        batch_size: int,
        sampling: SamplingParams,
        seed: int,
        namespace: str = "opcd",
        max_context: int | None = None,
        on_episode: Callable[[Episode], None] | None = None,
    ) -> None:
        if not tasks:
            raise DistillConfigError("no training tasks were given; ask for at least one")
        self.tasks, self.engine, self.knowledge = list(tasks), engine, knowledge
        self.batch_size, self.sampling, self.seed = batch_size, sampling, seed
        self.namespace, self.on_episode = namespace, on_episode
        self.max_context = max_context or engine.max_context
        self.renderer = Renderer(engine.tokenizer)

    def __call__(self, step: int) -> Batch:
        """Play the batch of `step`."""
        episodes = play(
            deal(self.tasks, step, self.batch_size, self.seed),
            self.engine,
            sampling=self.sampling,
            namespace=f"{self.namespace}/{step}",
            seed=step_seed(self.seed, step),
            on_episode=self.on_episode,
            lockstep=True,  # a resumed run must see the very same samples
        )
        return Batch(
            tuple(make_sample(e, self.renderer, self.knowledge, self.max_context) for e in episodes if e.sampled),
            tuple(episodes),
        )
