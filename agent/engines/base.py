"""The border between agents and language models: token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from agent.episode import FinishReason, SamplingParams


@dataclass(frozen=True)
class Completion:
    """What was sampled after one prompt. The end-of-turn token, if it was sampled, is the last id."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # natural log of each sampled id under the untempered model distribution
    finish_reason: FinishReason


class Engine(Protocol):
    """Anything that continues token ids. Implementations batch the requests of one call as they see fit."""

    #: Name of the base model, as the user gave it.
    model: str
    #: Id of the loaded checkpoint, None for the base model.
    checkpoint: str | None
    #: The model's own Hugging Face tokenizer, chat template included.
    tokenizer: Any

    @property
    def max_context(self) -> int:
        """Longest prompt plus completion, in tokens."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]) -> list[Completion]:
        """Continue every prompt; results in the order of the prompts.

        Raises:
            UsageError: a prompt plus its max_tokens exceeds max_context.
        """
        ...

    def load(self, checkpoint: Path | None) -> None:
        """Sample from this checkpoint folder (LoRA adapter or full weights) from now on; None is the base model."""
        ...

    def close(self) -> None:
        """Free the model's memory."""
        ...
