"""Log-probabilities of an episode's sampled tokens after one prompt or another, made as training makes them.

The ids after the first prompt are the episode's own; only the prompt is exchanged, rendered by `agent.renderer`. The
forward is the training step's: a packed row through the backbone, the output head at sampled positions alone, and
restricted replies normalised over what was allowed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from agent.engines.transformers import TransformersEngine
from agent.episode import Episode
from agent.renderer import Renderer
from distill.backbone import Backbone
from distill.chunked import chunked_cross_entropy
from distill.packing import Sample, pack
from distill.source import allowed_in, check_pair, opening
from engrain.errors import NothingSampledError


class Scorer:
    """Scores episodes with the weights that its engine has loaded at the time.

    Args:
        engine: in this process, of the model that played the episodes.
    """

    def __init__(self, engine: TransformersEngine) -> None:
        self.engine = engine
        self.renderer: Renderer = engine.renderer
        self.forwards = 0
        self._backbone: Backbone | None = None
        self._seen: tuple[Any, str | None] = (None, None)

    def sample(self, episode: Episode, knowledge: str) -> Sample:
        """The episode as training pairs it: after the bare prompt, and after the one with the knowledge first.

        Raises:
            NothingSampledError: no token of it was sampled by this model.
            DistillConfigError: it does not fit the model's context with the knowledge.
        """
        if episode.model != self.engine.model or not episode.sampled:
            raise NothingSampledError(
                f"episode {episode.id[:10]} holds no token that {self.engine.model} sampled, so there is nothing to "
                "score; let the agent play"
            )
        messages = opening(episode)
        sample = Sample.from_episode(
            episode, self.renderer.prompt(messages, knowledge), allowed_in(episode, self.renderer)
        )
        if episode.knowledge is not None:  # its own prompt holds a text
            sample = replace(sample, student_prompt=tuple(self.renderer.prompt(messages)))
        check_pair(sample, self.renderer, self.engine.max_context)
        return sample

    @torch.no_grad()
    def logprobs(self, sample: Sample, prompt: tuple[int, ...]) -> tuple[float, ...]:
        """Natural log of each sampled token's probability after this prompt, in order: one forward."""
        backbone = self._of_now()
        packed = pack([prompt], [sample], device=backbone.device)
        hidden_RD = backbone.hidden(packed)[packed.predict_R]
        loss_R, _ = chunked_cross_entropy(hidden_RD, backbone.head_VD, packed.target_R, allowed=packed.allowed)
        self.forwards += 1
        return tuple(-loss for loss in loss_R.tolist())

    def _of_now(self) -> Backbone:
        """The loaded weights' backbone; tried out once after every change of weights."""
        seen = (self.engine.network, self.engine.checkpoint)
        if self._backbone is None or seen[0] is not self._seen[0] or seen[1] != self._seen[1]:
            self._backbone, self._seen = Backbone(self.engine.network), seen
        return self._backbone
