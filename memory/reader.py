"""Who reads the episodes: an engine of ours, or any model that is asked in messages and answers in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from agent.engines.base import Engine
from agent.episode import FinishReason, Message, SamplingParams
from agent.renderer import Renderer


@dataclass(frozen=True)
class Reply:
    """What a reader wrote, and whether it came to its own end."""

    text: str
    finished: bool


@runtime_checkable
class Reader(Protocol):
    """A model that is asked in messages. What it writes is never trained on, so its tokens do not matter."""

    @property
    def model(self) -> str:
        """Its name, as it stands with what it wrote."""

    @property
    def checkpoint(self) -> str | None:
        """What it was trained to be; None for the model as it came."""

    def fits(self, messages: Sequence[Message], max_tokens: int) -> bool:
        """Whether these messages leave room for an answer of so many tokens."""

    def reply(self, conversations: Sequence[Sequence[Message]], sampling: Sequence[SamplingParams]) -> list[Reply]:
        """One answer to each conversation, in order."""

    def close(self) -> None:
        """Let go of what it holds."""


class EngineReader:
    """An engine that is asked in messages."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._renderer = Renderer(engine.tokenizer)

    @property
    def model(self) -> str:
        """The engine's model."""
        return self._engine.model

    @property
    def checkpoint(self) -> str | None:
        """The checkpoint that it samples from."""
        return self._engine.checkpoint

    def fits(self, messages: Sequence[Message], max_tokens: int) -> bool:
        """By the engine's own tokens and context."""
        return len(self._renderer.prompt(messages)) + max_tokens <= self._engine.max_context

    def reply(self, conversations: Sequence[Sequence[Message]], sampling: Sequence[SamplingParams]) -> list[Reply]:
        """All prompts go to the engine in one call."""
        if not conversations:
            return []
        prompts = [self._renderer.prompt(messages) for messages in conversations]
        return [
            Reply(self._renderer.decode(completion.token_ids), completion.finish_reason is FinishReason.STOP)
            for completion in self._engine.generate(prompts, sampling)
        ]

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()
