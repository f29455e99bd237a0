"""What a step adds up over its micro-batches and processes, on the way to `StepMetrics`."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from distill.chunked import Overlap
from distill.monitor import StepMetrics, distinct_n, leak_rate
from distill.source import Batch

#: Tokens of a response that count as its opening.
OPENING = 4


@dataclass
class Tally:
    """Sums over a share of a batch, and what that share took. Seconds and bytes are this process's own."""

    loss: float = 0.0
    divergence: float = 0.0
    opening: float = 0.0
    student_entropy: float = 0.0
    teacher_entropy: float = 0.0
    teacher_mass: float = 0.0  # these three at the first token of each response
    student_mass: float = 0.0
    shared_mass: float = 0.0
    seconds: float = 0.0
    seconds_sampling: float = 0.0
    seconds_teacher: float = 0.0
    seconds_prefix: float = 0.0
    peak_memory_bytes: int = 0

    def add(self, loss: float, d_R: Tensor, overlap: Overlap, lengths: Sequence[int]) -> None:
        """A micro-batch: its loss, the divergence and overlap of its positions, and its responses' lengths."""
        self.loss += loss
        self.divergence += float(d_R.sum())
        self.student_entropy += float(overlap.student_entropy_P.sum())
        self.teacher_entropy += float(overlap.teacher_entropy_P.sum())
        start = 0
        for length in lengths:
            self.opening += float(d_R[start : start + min(length, OPENING)].sum())
            self.teacher_mass += float(overlap.teacher_mass_P[start])
            self.student_mass += float(overlap.student_mass_P[start])
            self.shared_mass += float(overlap.shared_mass_P[start])
            start += length

    @classmethod
    def of_all(cls, tallies: Sequence[Tally]) -> Tally:
        """All processes' together: sums are added, of seconds and bytes the most counts."""
        most = {"peak_memory_bytes"} | {name for f in fields(cls) if (name := f.name).startswith("seconds")}
        columns = {f.name: [getattr(tally, f.name) for tally in tallies] for f in fields(cls)}
        return cls(**{name: max(column) if name in most else sum(column) for name, column in columns.items()})

    def metrics(
        self,
        batch: Batch,
        *,
        step: int,
        objective: str,
        grad_norm: float,
        learning_rate: float,
        decode: Callable[[Sequence[int]], str] | None,
    ) -> StepMetrics:
        """The step's numbers; this tally and the batch are those of all processes."""
        samples, tokens = batch.samples, sum(sample.sampled for sample in batch.samples)
        responses = [[t for t, m in zip(s.continuation, s.mask, strict=True) if m] for s in samples]
        read = sum(len(s.student_prompt) + len(s.continuation) for s in samples)
        return StepMetrics(
            step=step,
            objective=objective,
            loss=self.loss,
            divergence=self.divergence / tokens,
            opening_share=self.opening / self.divergence if self.divergence else 0.0,
            student_entropy=self.student_entropy / tokens,
            teacher_entropy=self.teacher_entropy / tokens,
            teacher_mass=self.teacher_mass / len(samples),
            student_mass=self.student_mass / len(samples),
            opening_overlap=self.shared_mass / len(samples),
            response_tokens=tokens / len(samples),
            distinct_2=distinct_n(responses),
            leak_rate=leak_rate([decode(ids) for ids in responses]) if decode else 0.0,
            success=sum(e.success for e in batch.episodes) / max(1, len(batch.episodes)),
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            sequences=len(samples),
            dropped=batch.dropped,
            staleness=batch.staleness,
            tokens_per_second=read / self.seconds,
            seconds_sampling=self.seconds_sampling,
            seconds_teacher=self.seconds_teacher,
            seconds_prefix=self.seconds_prefix,
            seconds_student=self.seconds - self.seconds_teacher,
            peak_memory_bytes=self.peak_memory_bytes,
        )


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
