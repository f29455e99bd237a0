"""What is watched in every step, and when training must stop before it does harm.

Self-distillation can collapse (arXiv 2606.04703): responses shorten, entropy falls, the KL climbs. The guard compares
each step with the first ones of the run and stops on the bounds a configuration sets; the trainer then keeps the best
checkpoint by validation.

Entropy can be bounded from above too, and is not unless asked for: a student that learns another form is unsure for a
while. In docs/results/recovery_products.json it went from 0.54 to 1.40 nats in a run that carried over nine tenths of
the gap, and in round 3 of docs/results/rounds.json, which lost all other worlds, from 0.99 to 1.32 only. What such a
round costs elsewhere is the gate's to find.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise

from pydantic import BaseModel, ConfigDict, Field

#: Words of a student that talks about its context instead of using it (a teacher prompt that asks for citations
#: teaches them).
LEAK_PHRASES = re.compile(
    r"(according to|based on|as (?:stated|mentioned) in|from|per) (?:the|my|our|these|earlier|past|previous)?\s*"
    r"(?:given |provided |earlier |past |previous )?(?:experience|knowledge|guideline|rule)s?\b(?: items?)?",
    re.IGNORECASE,
)


class StepMetrics(BaseModel):
    """One optimiser step. Divergences and entropies are means over sampled tokens, in nats."""

    model_config = ConfigDict(frozen=True)

    step: int
    objective: str = ""  # the divergence
    loss: float  # the objective as trained, averaged as configured
    divergence: float  # the objective, mean over tokens
    opening_share: float  # share of the summed divergence that falls on the first four tokens of each response
    student_entropy: float
    teacher_entropy: float
    teacher_mass: float  # teacher's probability of the student's most likely token, at the first token
    student_mass: float  # student's probability of the teacher's most likely token, at the first token
    opening_overlap: float = 0.0  # sum_v min(s, t) at the first token: 1 where they are equal, 0 where disjoint
    response_tokens: float  # mean sampled tokens of a sequence
    distinct_2: float  # distinct token bigrams over all, in the batch's responses
    leak_rate: float  # share of responses that cite their experience
    success: float  # share of the step's episodes that succeeded; 0 where none was played
    grad_norm: float  # before clipping
    learning_rate: float
    sequences: int
    dropped: int  # rollouts that gave no sample, such as failed ones
    staleness: int = 0  # optimiser steps between the weights that sampled and the weights that are trained
    tokens_per_second: float  # tokens through the student's forward and backward, scoring and update only
    seconds_sampling: float
    seconds_teacher: float
    seconds_prefix: float = 0.0  # of these, on prompts all samples share: once a job, each step if the teacher moves
    seconds_student: float
    peak_memory_bytes: int


#: Divergences whose gradient at a token vanishes with the student's own probability of it, however much the teacher
#: gives. (skew_kl's does too, once that probability is small beside alpha times the teacher's.)
_BLIND = ("reverse_kl", "jsd", "skew_kl", "topk")


def opening_advice(metrics: StepMetrics, floor: float = 0.05) -> str | None:
    """What to know before training goes on, read off a first step (its metrics are those of the untrained student).

    Every divergence but forward KL finds little to pull on where the student gives the teacher's opening no mass.
    None: all is well.

    Args:
        metrics: of the first step, or of `Trainer.measure`.
        floor: least mass of the student on the teacher's first token that needs no remark.
    """
    if metrics.objective not in _BLIND or metrics.student_mass >= floor:
        return None
    return (
        f"the student gives the teacher's first token {metrics.student_mass:.1%} of its mass, and the pull of "
        f"{metrics.objective} vanishes with that mass: it may never get there; forward_kl's does not vanish"
    )


#: Nats by which the entropy may rise whatever the ratio says: a student that begins sure of every token opens some
#: for a while as it learns another form.
_SLACK = 0.5
_WATCHED = ("student_entropy", "response_tokens", "distinct_2")


class GuardConfig(BaseModel):
    """When to stop. None turns a check off. A run that was stopped still has its best checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    warmup_steps: int = Field(5, ge=1, description="steps whose mean is the reference of the ratios below")
    min_entropy_ratio: float | None = Field(0.1, description="of the reference or the teacher's entropy, the lower")
    max_entropy_ratio: float | None = Field(
        None, gt=1, description="mean of two steps, of the first step's or the teacher's entropy there, the higher"
    )
    min_length_ratio: float | None = Field(0.1, description="of the reference response length")
    max_length_ratio: float | None = Field(4.0, description="of the reference response length")
    min_distinct_ratio: float | None = Field(0.2, description="of the reference distinct-2")
    rising_steps: int | None = Field(20, description="stop when the divergence rose this many steps in a row")
    max_sampled_tokens: int | None = Field(
        None, ge=1, description="a budget: stop after the step in which so many were sampled in all"
    )


class Guard:
    """Says why training must stop, or None. Feed it every step in order."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self._seen: list[StepMetrics] = []

    def check(self, metrics: StepMetrics) -> str | None:
        """Reason to stop after this step, in one line."""
        self._seen.append(metrics)
        for name in ("loss", "grad_norm"):
            if not math.isfinite(getattr(metrics, name)):
                return f"{name} is {getattr(metrics, name)} at step {metrics.step}"
        config, first = self.config, self._seen[: self.config.warmup_steps]
        if config.max_sampled_tokens is not None:
            spent = round(sum(m.response_tokens * m.sequences for m in self._seen))
            if spent >= config.max_sampled_tokens:
                return f"{spent} tokens were sampled by step {metrics.step}, the budget is {config.max_sampled_tokens}"
        if config.rising_steps and len(self._seen) > config.rising_steps:
            tail = self._seen[-config.rising_steps - 1 :]
            if all(a.divergence < b.divergence for a, b in pairwise(tail)):
                return f"the divergence rose {config.rising_steps} steps in a row, to {metrics.divergence:.3g} nats"
        if len(self._seen) <= config.warmup_steps:
            return None
        if config.max_entropy_ratio is not None:
            # the teacher reads what the student wrote: once that comes apart, its own entropy is no measure any more
            began = max(first[0].student_entropy, first[0].teacher_entropy)
            bound = max(config.max_entropy_ratio * began, began + _SLACK)
            latest = sum(m.student_entropy for m in self._seen[-2:]) / 2
            if latest > bound:
                return f"student_entropy rose from {began:.3g} above {bound:.3g}: {latest:.3g} at step {metrics.step}"
        start = {name: sum(getattr(m, name) for m in first) / len(first) for name in _WATCHED}
        # a student may well grow as sure as its teacher is; only below that is it a collapse
        start["student_entropy"] = min(start["student_entropy"], metrics.teacher_entropy)
        for name, ratio, below in (
            ("student_entropy", config.min_entropy_ratio, True),
            ("response_tokens", config.min_length_ratio, True),
            ("response_tokens", config.max_length_ratio, False),
            ("distinct_2", config.min_distinct_ratio, True),
        ):
            bound, value = (ratio or 0) * start[name], getattr(metrics, name)
            if ratio is not None and (value < bound if below else value > bound):
                word = "fell below" if below else "rose above"
                return f"{name} {word} {bound:.3g}, {ratio:g} of its reference, to {value:.3g} at step {metrics.step}"
        return None


def distinct_n(responses: Sequence[Sequence[int]], n: int = 2) -> float:
    """Distinct n-grams over all n-grams of the responses together; 1.0 when there are none."""
    grams = [tuple(ids[i : i + n]) for ids in responses for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def leak_rate(texts: Sequence[str]) -> float:
    """Share of texts in which the student cites the experience it was given."""
    return sum(bool(LEAK_PHRASES.search(text)) for text in texts) / len(texts) if texts else 0.0
