"""An episode as it was played: text for people, and the very token ids that were sampled for training.

The ids are one append-only sequence. `token_ids[:prompt_length]` is the first prompt; from there on sampled tokens
(with `loss_mask` True and their log-probability) alternate with what the env said. Nothing is ever re-tokenised.
"""

from __future__ import annotations

import hashlib
import operator
from datetime import datetime
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from envs.base import Task


class StopReason(StrEnum):
    """Why an episode ended."""

    DONE = "done"  # the env said so
    MAX_TURNS = "max_turns"
    LENGTH = "length"  # the next prompt would not fit the model's context or the episode's token limit
    ERROR = "error"  # the env or the engine failed; `Episode.error` says how
    INTERRUPTED = "interrupted"


class FinishReason(StrEnum):
    """Why one generation ended."""

    STOP = "stop"  # end of turn
    LENGTH = "length"  # max_tokens


class Message(BaseModel):
    """One chat message."""

    model_config = ConfigDict(frozen=True)

    role: Literal["system", "user", "assistant"]
    content: str


class SamplingParams(BaseModel):
    """How to sample. Temperature 0 is greedy. `seed` makes one request repeatable by itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0 keeps all")
    max_tokens: int = Field(256, ge=1)
    seed: int | None = None
    admissible_only: bool = Field(
        False, exclude_if=operator.not_, description="each reply is one of the actions that the env lists, if it does"
    )
    choices: tuple[str, ...] | None = Field(
        None, exclude_if=operator.not_, description="this reply is one of these texts; rollouts fill it in"
    )


class Turn(BaseModel):
    """One observation and the action taken on it. `start:end` is the action's span in `Episode.token_ids`."""

    model_config = ConfigDict(frozen=True)

    observation: str
    action: str
    start: int
    end: int
    finish_reason: FinishReason
    reward: float = 0.0
    feedback: str = ""
    seconds: float = 0.0  # the env's own step time
    choices: tuple[str, ...] | None = Field(None, exclude_if=operator.not_)  # what the reply was restricted to


class Episode(BaseModel):
    """One played task. A failed one is kept too, with `stop_reason=error` and the error's text."""

    model_config = ConfigDict(frozen=True)

    id: str
    task: Task
    messages: tuple[Message, ...]
    turns: tuple[Turn, ...]
    token_ids: tuple[int, ...]
    prompt_length: int
    loss_mask: tuple[bool, ...]  # True exactly at sampled tokens, end of turn included
    #: Natural log, untempered model distribution (in a restricted reply: among the ids allowed); 0.0 where not sampled.
    logprobs: tuple[float, ...]
    reward: float
    score: float
    success: bool
    feedback: str
    stop_reason: StopReason
    error: str | None = None
    model: str
    checkpoint: str | None = None  # id of the adapter or weights that sampled; None is the base model
    knowledge: str | None = None  # id of the knowledge version in the system message
    sampling: SamplingParams
    started_at: datetime
    seconds: float
    human: bool = False

    @model_validator(mode="after")
    def _aligned(self) -> Episode:
        if not len(self.token_ids) == len(self.loss_mask) == len(self.logprobs):
            raise ValueError("token_ids, loss_mask and logprobs differ in length")
        if any(self.loss_mask[: self.prompt_length]):
            raise ValueError("a prompt token is marked as sampled")
        return self

    @property
    def sampled(self) -> int:
        """Number of sampled tokens whose very ids are known: those that can be trained on."""
        return sum(self.loss_mask)

    @property
    def exact(self) -> bool:
        """Whether all replies stand here as the ids that were sampled; if not, some were made from text."""
        return all(all(self.loss_mask[turn.start : turn.end]) for turn in self.turns)


def episode_id(namespace: str, task: Task, sample: int = 0) -> str:
    """Deterministic id, so that a stage that is played again writes the same row, not a second one."""
    return hashlib.sha256(f"{namespace}\0{task.id}\0{sample}".encode()).hexdigest()[:20]
