"""An engine that takes a fixed time a call and says where it runs; imported by players on a cluster."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent.engines.base import Completion
from agent.episode import FinishReason, SamplingParams
from agent.errors import EngineFailedError, ModelLoadError


class StandIn:
    """Answers each prompt with its length and seed, `seconds` a call. `fault`: "load" cannot be made, "run" fails."""

    model = "stand-in"
    max_context = 100_000

    def __init__(self, tokenizer: Any, seconds: float = 0.0, fault: str = "") -> None:
        if fault == "load":
            raise ModelLoadError("no weights here")
        self.tokenizer, self.seconds, self.fault = tokenizer, seconds, fault
        self.checkpoint: str | None = None
        self.end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]) -> list[Completion]:
        time.sleep(self.seconds)
        if self.fault == "run":
            raise EngineFailedError("out of numbers")
        return [self._answer(prompt, params) for prompt, params in zip(prompts, sampling, strict=True)]

    def _answer(self, prompt: Sequence[int], params: SamplingParams) -> Completion:
        text = f"{len(prompt)} {params.seed}"
        ids = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end][: params.max_tokens]
        return Completion(tuple(ids), (-0.5,) * len(ids), FinishReason.STOP, cached_tokens=len(prompt) // 2)

    def load(self, checkpoint: Path | None) -> None:
        if checkpoint is not None and not checkpoint.exists():
            raise ModelLoadError(f"no checkpoint at {checkpoint}")
        self.checkpoint = checkpoint and checkpoint.name

    def close(self) -> None: ...
