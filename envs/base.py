"""What a world is to the rest of Engrain: frozen tasks, and envs that play one episode of text.

A `World` (configured once) lists `Task`s by split and makes an `Env` from a task alone. An `Env` instance plays
one episode and is thrown away: it holds no state that a reset would have to undo.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


class Split(StrEnum):
    """Which pool a task belongs to. No two splits of a world share a task."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"
    OOD = "ood"


class Task(BaseModel):
    """One episode's starting point, complete in itself: any process can rebuild the env from it.

    `id` is a digest of env, seed and parameters but not of the split, so that a task that slipped into two splits
    is seen.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    env: str
    split: Split
    seed: int
    parameters: Mapping[str, Any]

    @classmethod
    def create(cls, env: str, split: Split, seed: int, parameters: Mapping[str, Any]) -> Task:
        """Make a task and derive its id from its content."""
        content = json.dumps([env, seed, parameters], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        return cls(id=f"{env}-{digest}", env=env, split=split, seed=seed, parameters=dict(parameters))

    def __hash__(self) -> int:
        return hash(self.id)


@dataclass(frozen=True)
class Observation:
    """What the player reads. `admissible` lists the actions the env would accept, where it knows them."""

    text: str
    admissible: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Step:
    """The env's answer to one action.

    `reward` is this step's gain. `feedback` is said after the episode (never part of a later observation): what a
    learner may read when it looks back, such as why an answer did not count.
    """

    observation: Observation
    reward: float
    done: bool
    feedback: str = ""


class Env(ABC):
    """Plays one episode of one task in text.

    Call `reset` once, then `step` until `done`; `close` frees what it holds. `score` lies in [0, 1] at any time and
    is normalised so that 1 is the best possible outcome; `success` says whether the episode counts as solved.
    """

    #: Instructions to the player that hold for the whole episode: the system message, "" for none.
    system: str = ""
    #: The most actions one episode may take.
    max_turns: int = 1

    def __init__(self, task: Task) -> None:
        self.task = task

    @abstractmethod
    def reset(self) -> Observation:
        """Start the episode."""

    @abstractmethod
    def step(self, text: str) -> Step:
        """Play the model's whole reply as one action. Bad actions are answered in text, not raised."""

    @property
    @abstractmethod
    def score(self) -> float:
        """Outcome so far in [0, 1]."""

    @property
    def success(self) -> bool:
        """Whether the episode counts as solved."""
        return self.score >= 1.0

    def close(self) -> None:  # noqa: B027 - most envs hold nothing
        """Free processes and files."""


class World(ABC):
    """A family of tasks under one name and one configuration."""

    #: Registry name, equal to `Task.env`.
    name: ClassVar[str]
    #: Whether rollouts play its episodes in worker processes, so that one that crashes or hangs costs itself only.
    #: False suits worlds that can do neither. The worker imports this class by its registered name.
    isolated: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def configure(cls, options: Mapping[str, Any]) -> World:
        """Build from options as the command line gives them (values may be strings).

        Raises:
            UsageError: an option is unknown or its value is out of range; the message names both.
        """

    @abstractmethod
    def tasks(self, split: Split, count: int, seed: int = 0) -> list[Task]:
        """The first `count` tasks of a split in an order fixed by `seed`; a longer list extends a shorter one.

        Raises:
            UsageError: the split holds fewer tasks than asked for; the message says how many there are.
        """

    @classmethod
    @abstractmethod
    def make(cls, task: Task) -> Env:
        """Build the env that plays `task`."""
