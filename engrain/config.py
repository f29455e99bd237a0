"""Settings of one round, validated at the door. The command line fills in the few that people change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from agent.episode import SamplingParams
from distill.config import DistillConfig
from distill.errors import DistillConfigError
from engrain.gate import ALPHA, MAX_LOOKS
from envs.base import Split
from memory.prompts import known_mode


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class WorldSpec(_Frozen):
    """A world and its options, as `engrain eval ENV -o key=value` takes them."""

    env: str
    options: Mapping[str, Any] = {}


class OodSpec(WorldSpec):
    """Tasks the agent did not learn on, which must not get worse."""

    split: Split = Split.OOD
    tasks: int = Field(32, ge=1)


class PlayConfig(_Frozen):
    """Stage 1: what is played to learn from."""

    tasks: int = Field(64, ge=1, description="training tasks played, and the pool that training draws from")
    episodes: int = Field(16, ge=1, description="of these, played for extraction")
    sampling: SamplingParams = SamplingParams(temperature=0.7, max_tokens=256)


class ExtractConfig(_Frozen):
    """Stage 2 and 3: how episodes become candidate knowledge."""

    mode: Annotated[str, AfterValidator(known_mode)] = Field(
        "examples",
        description="examples (worked ones, for small models), paper, contrastive (several episodes side by side), "
        "or a registered prompt",
    )
    coach: str | None = Field(
        None, min_length=1, description="MODEL or MODEL@URL that reads the episodes; None: the model itself"
    )
    episodes: int = Field(12, ge=1, description="episodes read, failed and successful ones in turn")
    max_items: int = Field(32, ge=1, description="most new items a round; those that most episodes teach come first")
    arrivals: int = Field(
        12, ge=0, description="most episodes from elsewhere that are read besides: the newest since the last round"
    )
    embeddings: str = Field(
        "auto", description="folder of a sentence encoder; auto: that of the extra; none: words only"
    )
    effects: Literal["leave_one_out", "randomised", "none"] = Field(
        "leave_one_out", description="how each item's effect is measured on validation tasks; see memory.effect"
    )
    budget_tokens: int = Field(1024, ge=1, description="most tokens of a knowledge text; whole items are dropped")
    candidates: int = Field(6, ge=1, description="knowledge texts scored on validation tasks")


class EvaluationConfig(_Frozen):
    """Stages 4 and 6: held-out tasks, played greedily unless said otherwise."""

    validation_tasks: int = Field(32, ge=1)
    test_tasks: int = Field(128, ge=1, description="fewer are played where the verdict is clear before")
    looks: int = Field(
        4, ge=1, le=MAX_LOOKS, description="batches of test tasks, each followed by a test; 1 always plays all of them"
    )
    alpha: float = Field(ALPHA, gt=0, lt=0.5, description="chance to promote a checkpoint that is no better, one-sided")
    sampling: SamplingParams = SamplingParams(temperature=0.0, max_tokens=256)
    ood: tuple[OodSpec, ...] = ()
    ood_margin: float = Field(0.05, ge=0, le=1, description="out-of-distribution accuracy that a promotion may cost")


class ImproveConfig(_Frozen):
    """One round of `engrain improve`."""

    model: str
    world: WorldSpec
    knowledge: str | None = Field(
        None,
        min_length=1,
        description="a text file, such as a written system prompt, or a stored version, that is consolidated as it is: "
        "nothing is played for it, extracted or chosen",
    )
    seed: int = 0
    play: PlayConfig = PlayConfig()
    extract: ExtractConfig = ExtractConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    distill: DistillConfig = DistillConfig()

    @model_validator(mode="after")
    def _taught_by_itself(self) -> Self:
        if self.distill.teacher is not None:
            raise DistillConfigError(
                f"distill.teacher {self.distill.teacher}: in a round the model teaches itself; leave it out, or let "
                "another model teach with `engrain distill --teacher MODEL`"
            )
        return self
