"""Settings of one distillation job."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from agent.episode import SamplingParams
from distill.monitor import GuardConfig
from distill.objective import Divergence, divergence_named

ObjectiveName = Literal["reverse_kl", "forward_kl", "jsd", "skew_kl", "topk"]


class LoraSettings(BaseModel):
    """A PEFT LoRA adapter on all linear layers but the output head."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1, description="updates are scaled by alpha / rank")


class DistillConfig(BaseModel):
    """One OPCD job. Defaults follow the paper where it trains, and LoRA practice where it does not."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    objective: ObjectiveName = "reverse_kl"
    beta: float = Field(0.5, ge=0, le=1, description="share of the teacher in jsd's mixture")
    alpha: float = Field(0.1, ge=0, lt=1, description="share of the teacher in skew_kl's mixture")
    top_k: int = Field(256, ge=1, description="tokens kept by topk; the rest is one bucket")
    normalize: Literal["sequence", "token"] = Field("sequence", description="the paper's 1/|y|, or every token alike")

    steps: int = Field(50, ge=1)
    batch_size: int = Field(128, ge=1, description="episodes a step")
    learning_rate: float = Field(2e-4, gt=0, description="for LoRA; full weights want about 1e-6 to 5e-6")
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    micro_batch_tokens: int = Field(2048, ge=1, description="tokens packed into one forward; batches accumulate")
    gradient_checkpointing: bool = False
    lora: LoraSettings | None = Field(default_factory=LoraSettings, description="None trains all weights")

    sampling: SamplingParams = SamplingParams(temperature=1.0, max_tokens=1024)
    seed: int = 0
    save_every: int = Field(10, ge=1, description="steps between checkpoints; the last step always makes one")
    guard: GuardConfig = GuardConfig()

    def divergence(self) -> Divergence:
        """The objective as a function."""
        return divergence_named(self.objective, beta=self.beta, alpha=self.alpha, k=self.top_k)

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of optimiser step `step` (from 0): linear warm-up, then constant or a half cosine to 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
