"""Promotion statistics: is the distilled student better on the same held-out tasks, and did it forget nothing?

All comparisons are paired by task. Intervals are 95% unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict
from scipy.stats import binomtest


class Rate(BaseModel):
    """A success rate with its Wilson interval."""

    model_config = ConfigDict(frozen=True)

    accuracy: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.accuracy:.2f} [{self.low:.2f}, {self.high:.2f}] (n={self.n})"


class Gain(BaseModel):
    """The paired difference of two success rates, `after - before`, on the same tasks."""

    model_config = ConfigDict(frozen=True)

    difference: float
    low: float
    high: float
    p_value: float  # exact McNemar, two-sided
    gained: int  # tasks that only `after` solves
    lost: int  # tasks that only `before` solves
    n: int

    @property
    def positive(self) -> bool:
        """Whether the interval excludes zero from above."""
        return self.low > 0

    def __str__(self) -> str:
        return f"{self.difference:+.2f} [{self.low:+.2f}, {self.high:+.2f}] (n={self.n}, p={self.p_value:.2g})"


class Verdict(BaseModel):
    """The gate's decision and its evidence."""

    model_config = ConfigDict(frozen=True)

    promoted: bool
    reason: str
    gain: Gain
    ood: Gain


def wilson(successes: Sequence[bool], confidence: float = 0.95) -> Rate:
    """Success rate with Wilson's score interval; (0, 1) when nothing was tried."""
    n, k = len(successes), sum(successes)
    if n == 0:
        return Rate(accuracy=0.0, low=0.0, high=1.0, n=0)
    interval = binomtest(k, n).proportion_ci(confidence, method="wilson")
    return Rate(accuracy=k / n, low=float(interval.low), high=float(interval.high), n=n)


def paired_gain(before: Sequence[bool], after: Sequence[bool], confidence: float = 0.95) -> Gain:
    """Difference of two paired success rates with its score interval and the exact McNemar test.

    The interval is Newcombe's for paired proportions (Statistics in Medicine 17, 1998, method 10): Wilson's limits of
    both rates, combined with their correlation. Unlike a bootstrap it stays honest when every task agrees.

    Raises:
        ValueError: the two lists differ in length.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} tasks before and {len(after)} after: not paired")
    n = len(before)
    if n == 0:
        return Gain(difference=0.0, low=-1.0, high=1.0, p_value=1.0, gained=0, lost=0, n=0)
    both = sum(a and b for a, b in zip(after, before, strict=True))
    gained = sum(a and not b for a, b in zip(after, before, strict=True))
    lost = sum(b and not a for a, b in zip(after, before, strict=True))
    neither = n - both - gained - lost
    rate_a, rate_b = wilson(after, confidence), wilson(before, confidence)
    difference = rate_a.accuracy - rate_b.accuracy
    margins = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    cross = float(both * neither - gained * lost)
    if cross > 0:  # Newcombe's continuity correction of the correlation
        cross = max(cross - n / 2, 0.0)
    phi = cross / math.sqrt(margins) if margins else 0.0
    down_a, up_a = rate_a.accuracy - rate_a.low, rate_a.high - rate_a.accuracy
    down_b, up_b = rate_b.accuracy - rate_b.low, rate_b.high - rate_b.accuracy
    low = difference - math.sqrt(max(0.0, down_a**2 - 2 * phi * down_a * up_b + up_b**2))
    high = difference + math.sqrt(max(0.0, up_a**2 - 2 * phi * up_a * down_b + down_b**2))
    p_value = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return Gain(
        difference=difference, low=max(-1.0, low), high=min(1.0, high), p_value=p_value, gained=gained, lost=lost, n=n
    )


def judge(
    before: Sequence[bool],
    after: Sequence[bool],
    ood_before: Sequence[bool],
    ood_after: Sequence[bool],
    *,
    ood_margin: float,
) -> Verdict:
    """Promote when the gain's interval excludes zero and the out-of-distribution loss is within the margin."""
    gain, ood = paired_gain(before, after), paired_gain(ood_before, ood_after)
    if not gain.positive:
        return Verdict(promoted=False, reason=f"no clear gain on held-out tasks: {gain}", gain=gain, ood=ood)
    if ood.difference < -ood_margin:
        reason = f"out-of-distribution accuracy fell by more than {ood_margin:g}: {ood}"
        return Verdict(promoted=False, reason=reason, gain=gain, ood=ood)
    return Verdict(promoted=True, reason=f"gain {gain}; out of distribution {ood}", gain=gain, ood=ood)


def recovery(bare: float, in_context: float, distilled: float) -> float | None:
    """Share of the in-context gap that stands in the weights, (distilled - bare) / gap; None where there is no gap."""
    gap = in_context - bare
    return (distilled - bare) / gap if gap > 0 else None
