"""The border between agents and language models: token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from agent.episode import FinishReason, SamplingParams
from agent.errors import ContextLengthError
from envs.errors import EngrainError


@dataclass(frozen=True)
class Completion:
    """What was sampled after one prompt. The end-of-turn token, if it was sampled, is the last id."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # natural log of each sampled id, untempered; of a restricted reply: among its choices
    finish_reason: FinishReason
    cached_tokens: int = 0  # leading prompt tokens whose keys and values existed already
    exact: bool = True  # False: the ids were made from text, without log-probabilities; they are not trained on


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
        """Sample from this checkpoint folder (LoRA adapter or full weights) from now on; None is the base model.

        Raises:
            UsageError: the folder is no checkpoint of the model, or requests are under way.
        """
        ...

    def close(self) -> None:
        """Free the model's memory."""
        ...


@runtime_checkable
class StreamingEngine(Engine, Protocol):
    """An engine that takes requests while others are under way, so that a scheduler can keep it full.

    Not thread-safe: one thread submits and polls. `generate` works beside it and leaves submitted requests alone.
    """

    @property
    def pending(self) -> int:
        """Requests submitted whose results `poll` has not returned yet."""
        ...

    def submit(self, prompt: Sequence[int], sampling: SamplingParams) -> int:
        """Take one more request without waiting for it; the number that `poll` will name it by.

        Raises:
            UsageError: the prompt plus its max_tokens exceeds max_context.
        """
        ...

    def poll(self, timeout: float = 0.0) -> list[tuple[int, Completion | EngrainError]]:
        """Work until a request is finished, or for about `timeout` seconds; everything finished by then.

        An engine in this process does its work here, at least one token for every running request at each call; one
        in another process works all the time and is only asked. [] where nothing has finished yet. A request that
        failed by itself is returned with its error.

        Raises:
            EngrainError: the engine itself failed; no request will finish.
        """
        ...

    def cancel(self, requests: Sequence[int]) -> None:
        """Give requests up; `poll` does not return them any more. Finished and unknown ones are ignored."""
        ...


def check_length(engine: Engine, prompt: Sequence[int], max_tokens: int) -> None:
    """Refuse a request that the engine's model has no room for.

    Raises:
        ContextLengthError: the prompt is empty, or exceeds max_context with what is to be sampled.
    """
    if not prompt:
        raise ContextLengthError("a prompt is empty; a model needs at least one token to go on from")
    if len(prompt) + max_tokens > engine.max_context:
        raise ContextLengthError(
            f"a prompt of {len(prompt)} tokens plus {max_tokens} to sample exceeds the {engine.max_context} tokens of "
            f"{engine.model}; shorten the knowledge or lower max_tokens"
        )


def steady(engine: Engine) -> AbstractContextManager[None]:
    """A time in which nobody changes the engine's weights or adapters, so that what follows from them is made once.

    Engines that gain from it have a method of this name, and are not to be trained meanwhile; for others it is nothing.
    """
    enter = getattr(engine, "steady", nullcontext)
    context: AbstractContextManager[None] = enter()
    return context


@contextmanager
def asleep(engine: Engine) -> Iterator[None]:
    """A time in which the engine is not asked and its memory is free for others, if it can sleep; see `VllmEngine`."""
    if not getattr(engine, "can_sleep", False):
        yield
        return
    engine.sleep()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        engine.wake()  # type: ignore[attr-defined]


@contextmanager
def awake(engine: Engine) -> Iterator[None]:
    """A time within `asleep` in which the engine may be asked."""
    if not getattr(engine, "can_sleep", False):
        yield
        return
    engine.wake()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        engine.sleep()  # type: ignore[attr-defined]
