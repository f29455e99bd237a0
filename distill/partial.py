"""Partial rollouts (OEL, arXiv 2603.16856): the student continues stored episodes by one reply; no env is needed.

An episode is cut before one of its replies. What was said until then stands in both prompts, after the knowledge in
the teacher's; the student samples the reply anew, and only that reply is trained on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from agent.constraint import allowed_ids
from agent.engines.base import Engine
from agent.episode import Episode, SamplingParams
from agent.renderer import Renderer
from agent.rollout import request_seed
from distill.distributed import generate
from distill.errors import DistillConfigError
from distill.packing import Sample
from distill.source import Batch, check_pair, deal, opening, step_seed, vocabulary

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Prefix:
    """What comes before one reply of an episode, as both sides read it."""

    id: str
    student_prompt: tuple[int, ...]
    teacher_prompt: tuple[int, ...]
    choices: tuple[str, ...] | None = None  # what the reply was restricted to, and is again


class PrefixSource:
    """The student samples the next reply after prefixes of stored episodes.

    Args:
        episodes: played by this model, with or without knowledge: the ids after their first prompt are used as they
            are, the prompt is the bare one. Those without ids or replies are passed over.
        engine: samples from the weights under training.
        knowledge: the text the teacher will read.
        batch_size: replies a step.
        sampling: how the student samples.
        seed: fixes the order of the prefixes and the sampling.
        max_context: most tokens of the teacher's sequence; None is the engine's context.

    Raises:
        DistillConfigError: an episode is of another model, or no prefix is left: those whose teacher prompt leaves no
            room for a reply are passed over, with a warning that counts them.
    """

    def __init__(
        self,
        episodes: Sequence[Episode],
        engine: Engine,
        knowledge: str,
        *,
        batch_size: int,
        sampling: SamplingParams,
        seed: int,
        max_context: int | None = None,
    ) -> None:
        self.engine, self.batch_size, self.sampling, self.seed = engine, batch_size, sampling, seed
        self.renderer = Renderer(engine.tokenizer)
        self.max_context = max_context or engine.max_context
        found = [prefix for episode in episodes for prefix in self._cut(episode, knowledge)]
        self.prefixes = [p for p in found if len(p.teacher_prompt) < self.max_context]
        if len(self.prefixes) < len(found):
            logger.warning(
                "%d of %d prefixes leave no room for a reply in a context of %d tokens and are not trained on",
                len(found) - len(self.prefixes),
                len(found),
                self.max_context,
            )
        if not self.prefixes:
            raise DistillConfigError(
                f"{len(episodes)} episodes give no prefix to continue; play some first, or use smaller knowledge"
            )

    def __call__(self, step: int) -> Batch:
        """Sample the replies of `step`. No episode is played, so the batch has none."""
        prefixes = deal(self.prefixes, step, self.batch_size, self.seed)
        seed = step_seed(self.seed, step)
        sampling = [
            self.sampling.model_copy(
                update={
                    "max_tokens": min(self.sampling.max_tokens, self.max_context - len(prefix.teacher_prompt)),
                    "seed": request_seed(seed, prefix.id, place, 0),
                    "choices": prefix.choices,
                }
            )
            for place, prefix in enumerate(prefixes)
        ]
        replies = generate(self.engine, [prefix.student_prompt for prefix in prefixes], sampling)
        samples = []
        for prefix, reply in zip(prefixes, replies, strict=True):
            if reply.token_ids and reply.exact:
                mask = (True,) * len(reply.token_ids)
                ids = reply.token_ids
                choices = prefix.choices
                allowed = tuple(allowed_ids(vocabulary(self.renderer), choices, ids)) if choices else ()
                sample = Sample(prefix.id, prefix.student_prompt, prefix.teacher_prompt, ids, mask, allowed)
                check_pair(sample, self.renderer, self.max_context)
                samples.append(sample)
        return Batch(tuple(samples), ())

    def _cut(self, episode: Episode, knowledge: str) -> list[_Prefix]:
        if not episode.sampled:
            return []
        if episode.model != self.engine.model:
            raise DistillConfigError(
                f"episode {episode.id} was played by {episode.model} and its ids mean nothing to {self.engine.model}"
            )
        messages, start = opening(episode), episode.prompt_length
        own = episode.token_ids[:start] if episode.knowledge is None else tuple(self.renderer.prompt(messages))
        taught = tuple(self.renderer.prompt(messages, knowledge))
        return [
            _Prefix(f"{episode.id}/{number}", own + before, taught + before, turn.choices)
            for number, turn in enumerate(episode.turns)
            for before in [episode.token_ids[start : turn.start]]
        ]
