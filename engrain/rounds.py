"""What a round is made of: the tasks it will play, how it is opened, who is told, and what it comes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from agent.rollout import RolloutStats
from distill.monitor import StepMetrics
from engrain.config import ImproveConfig
from engrain.errors import RoundConflictError
from engrain.gate import Gain, Verdict
from engrain.redaction import redacted
from envs import registry
from envs.base import Split, Task
from memory.records import CheckpointRecord, EvaluationRecord, Knowledge, RoundRecord, RoundStatus
from memory.store import Store


class Listener(Protocol):
    """Is told what happens; the command line draws it."""

    def stage(self, name: str, text: str) -> None:
        """A stage begins."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def rollout(self, what: str, stats: RolloutStats) -> None:
        """Episodes are being played."""

    def step(self, metrics: StepMetrics, total: int) -> None:
        """A training step is over."""


@dataclass(frozen=True)
class RoundTasks:
    """All tasks of a round, drawn before anything is written. `play` is the beginning of `pool`."""

    play: list[Task]
    pool: list[Task]
    validation: list[Task]
    test: list[Task]
    ood: dict[str, list[Task]]  # by a name that says which world it is

    @classmethod
    def draw(cls, config: ImproveConfig) -> RoundTasks:
        """The tasks that the settings ask for.

        Raises:
            UsageError: a world or an option is unknown, or a split holds fewer tasks; the message says how many.
        """
        world = registry.world(config.world.env, config.world.options)
        settings, seed = config.evaluation, config.seed
        pool = world.tasks(Split.TRAIN, max(config.play.tasks, config.play.episodes), seed)
        ood: dict[str, list[Task]] = {}
        for spec in settings.ood:
            name = f"{spec.env}/{spec.split.value}"
            if name in ood:
                name += f" ({len(ood) + 1})"
            ood[name] = registry.world(spec.env, spec.options).tasks(spec.split, spec.tasks, seed)
        return cls(
            play=pool[: config.play.episodes],
            pool=pool[: config.play.tasks],
            validation=world.tasks(Split.VALIDATION, settings.validation_tasks, seed),
            test=world.tasks(Split.TEST, settings.test_tasks, seed),
            ood=ood,
        )


def open_round(store: Store, config: ImproveConfig, *, fresh: bool = False) -> RoundRecord:
    """The unfinished round of this model if its settings are these, else a new one.

    Args:
        store: holds the rounds.
        config: the round's settings.
        fresh: give up an unfinished round instead of going on with it.

    Raises:
        RoundConflictError: an unfinished round has other settings, and `fresh` is not set.
    """
    unfinished = store.unfinished_round(config.model)
    if unfinished is not None and fresh:
        store.update_round(unfinished.id, status=RoundStatus.STOPPED, verdict="given up for a new round")
    elif unfinished is not None:
        if not same_settings(unfinished.config, config):
            raise RoundConflictError(
                f"round {unfinished.number} of {config.model} is unfinished and has other settings; "
                "run it with its own settings, or pass --fresh to give it up"
            )
        return unfinished
    return store.create_round(redacted(config.model_dump(mode="json")), config.seed, config.model)


def same_settings(stored: Mapping[str, Any], config: ImproveConfig) -> bool:
    """Whether a round was begun with these settings; those that it does not know yet count as the usual ones."""
    settings = redacted(config.model_dump(mode="json"))
    if dict(stored) == settings:
        return True
    try:
        return bool(redacted(ImproveConfig.model_validate(dict(stored)).model_dump(mode="json")) == settings)
    except ValidationError:
        return False


class OodResult(BaseModel):
    """One other world: bare, with the knowledge in context, and distilled. What the knowledge itself costs there
    shows in context; what training costs on top shows after."""

    model_config = ConfigDict(frozen=True)

    before: EvaluationRecord
    in_context: EvaluationRecord
    after: EvaluationRecord


class RoundResult(BaseModel):
    """What a round came to. Evaluations are by name: `bare`, `in_context`, `distilled` on test tasks."""

    model_config = ConfigDict(frozen=True)

    round: RoundRecord
    status: str
    reason: str
    knowledge: Knowledge | None = None
    gap: Gain | None = None
    verdict: Verdict | None = None
    checkpoint: CheckpointRecord | None = None
    evaluations: dict[str, EvaluationRecord] = {}
    ood: dict[str, OodResult] = {}
    validation: dict[int, float] = {}
    history: tuple[StepMetrics, ...] = ()
    seconds: float
