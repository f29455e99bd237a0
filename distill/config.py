"""Settings of one distillation job."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from agent.episode import SamplingParams
from distill.errors import DistillConfigError
from distill.monitor import GuardConfig
from distill.objective import Divergence, divergence_named
from distill.registered import known_objective

#: A built-in divergence, cross_entropy, or one that somebody registered (`distill.registered`).
ObjectiveName = Annotated[str, AfterValidator(known_objective)]
Method = Literal["opcd", "off_policy", "sft", "mixed"]
TeacherKind = Literal["frozen", "previous_checkpoint", "ema"]


class LoraSettings(BaseModel):
    """A PEFT LoRA adapter on all linear layers but the output head."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1, description="updates are scaled by alpha / rank")


class DistillConfig(BaseModel):
    """One distillation job. Defaults follow the paper where it trains, and LoRA practice where it does not.

    The objective is another: forward KL learned no less than the paper's reverse KL (`reverse_kl`) on any world that we
    measured, and also where the student gives the teacher's opening no mass.

    `method` says who samples and what is compared:

    - `opcd`: the student samples without the knowledge and meets the teacher's distribution on its own tokens;
    - `off_policy`: the teacher samples with the knowledge, the student meets its distribution there ("context
      distillation");
    - `sft`: the teacher samples, the student learns the sampled tokens by cross-entropy;
    - `mixed`: `on_policy_fraction` of each batch as in opcd, the rest as in off_policy.

    `teacher_kind` says whose weights the teacher has: `previous_checkpoint`, what the student starts from (the base
    model in a first round); `frozen`, the base model in every round; `ema`, a moving average of the student that starts
    where it starts. A teacher that follows fast collapses (the paper's live self-teacher), so keep `ema_rate` small.

    Raises:
        DistillConfigError: settings that contradict each other.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method = "opcd"
    on_policy_fraction: float = Field(0.5, gt=0, lt=1, description="mixed: share of a batch that the student samples")
    only_successes: bool = Field(False, description="of the teacher's episodes, train on those that succeeded")
    teacher: str | None = Field(None, description="name of a second model that teaches; None is the student's own base")
    teacher_kind: TeacherKind = "previous_checkpoint"
    ema_rate: float = Field(0.01, gt=0, le=1, description="share of the student in each step of the ema teacher")

    objective: ObjectiveName = Field("forward_kl", description="a divergence; cross_entropy is sft's")
    beta: float = Field(0.5, ge=0, le=1, description="share of the teacher in jsd's mixture")
    alpha: float = Field(0.1, ge=0, lt=1, description="share of the teacher in skew_kl's mixture")
    top_k: int = Field(256, ge=1, description="tokens kept by topk; the rest is one bucket")
    normalize: Literal["sequence", "token"] = Field("sequence", description="the paper's 1/|y|, or every token alike")

    steps: int = Field(50, ge=1)
    batch_size: int = Field(128, ge=1, description="episodes a step")
    learning_rate: float = Field(
        2e-4, gt=0, allow_inf_nan=False, description="for LoRA; full weights want about 1e-6 to 5e-6"
    )
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    max_grad_norm: float = Field(1.0, gt=0)
    micro_batch_tokens: int = Field(2048, ge=1, description="tokens packed into one forward; batches accumulate")
    gradient_checkpointing: bool = False
    lora: LoraSettings | None = Field(default_factory=LoraSettings, description="None trains all weights")

    sampling: SamplingParams = SamplingParams(temperature=1.0, max_tokens=1024)
    seed: int = 0
    save_every: int = Field(10, ge=1, description="steps between checkpoints; the last step always makes one")
    sync_every: int = Field(1, ge=1, description="steps between refreshes of an engine that samples from a copy")
    guard: GuardConfig = GuardConfig()

    @model_validator(mode="before")
    @classmethod
    def _usual_objective(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("objective") is None:
            return {**given, "objective": "cross_entropy" if given.get("method") == "sft" else "forward_kl"}
        return given

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.method == "sft") != (self.objective == "cross_entropy"):
            raise DistillConfigError(
                f"method {self.method} and objective {self.objective} do not go together: sft trains on cross_entropy, "
                "and only sft does"
            )
        if self.teacher_kind == "ema" and (self.teacher is not None or self.lora is None):
            raise DistillConfigError(
                "an ema teacher follows the student's adapter: it needs lora and no second teacher model"
            )
        if self.method == "mixed" and not 0 < self.on_policy_samples < self.batch_size:
            raise DistillConfigError(
                f"{self.on_policy_fraction:g} of a batch of {self.batch_size} leaves nothing to mix; use a larger batch"
            )
        if self.save_every % self.sync_every:  # a resumed run must sample from the weights an unbroken one would
            raise DistillConfigError(
                f"save_every {self.save_every} is no multiple of sync_every {self.sync_every}: change either"
            )
        return self

    def matches(self, stored: Mapping[str, Any]) -> bool:
        """Whether stored settings are these; what an older version did not know yet counts as the usual value."""
        try:
            return DistillConfig.model_validate(stored).model_dump(mode="json") == self.model_dump(mode="json")
        except (ValidationError, DistillConfigError):
            return False

    @property
    def on_policy_samples(self) -> int:
        """Episodes of a step that the student plays."""
        share = {"opcd": 1.0, "mixed": self.on_policy_fraction}.get(self.method, 0.0)
        return round(share * self.batch_size)

    def divergence(self, name: str) -> Divergence:
        """A divergence with this job's parameters."""
        return divergence_named(name, beta=self.beta, alpha=self.alpha, k=self.top_k)

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of optimiser step `step` (from 0): linear warm-up, then constant or a half cosine to 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
