"""Intervals for outcomes that hang together, such as messages from one template or one prompt asked for every seed.

Tasks of one group are counted as what they are worth together: rates have Wilson's interval for the effective number of
tasks, n divided by the design effect and by (t/z)^2 for few groups (Korn and Graubard, Survey Methodology 24, 1998);
differences have the t interval of the group totals. Where every task is a group of its own, both are those of
`engrain.gate`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence

from scipy.stats import norm, t

from engrain.gate import paired_gain, wilson

#: A value with the ends of its 95% interval.
Interval = tuple[float, float, float]

_LEVEL = 0.975
_Z = float(norm.ppf(_LEVEL))


def rate(outcomes: Sequence[bool], groups: Sequence[Hashable]) -> Interval:
    """The success rate.

    Raises:
        ValueError: no outcomes, or not one group each.
    """
    places = _places(outcomes, groups)
    n, count = len(outcomes), len(places)
    if count == n:
        found = wilson(outcomes)
        return found.accuracy, found.low, found.high
    p = sum(outcomes) / n
    if count == 1:
        return p, 0.0, 1.0
    variance = _variance([outcome - p for outcome in outcomes], list(places.values()))
    worth = float(n)
    if p in (0.0, 1.0):
        worth = float(count)
    elif variance:
        worth = min(worth, p * (1 - p) / variance)
    return p, *_wilson(p, worth * (_Z / float(t.ppf(_LEVEL, count - 1))) ** 2)


def difference(before: Sequence[bool], after: Sequence[bool], groups: Sequence[Hashable]) -> Interval:
    """The paired difference `after - before`.

    Raises:
        ValueError: no outcomes, or not a pair and a group each.
    """
    places = _places(after, groups)
    if len(before) != len(after):
        raise ValueError(f"{len(before)} tasks before and {len(after)} after: not paired")
    n, count = len(after), len(places)
    if count == n:
        gain = paired_gain(before, after)
        return gain.difference, gain.low, gain.high
    apart = [a - b for a, b in zip(after, before, strict=True)]
    mean = sum(apart) / n
    variance = _variance([d - mean for d in apart], list(places.values())) if count > 1 else 0.0
    if not variance:  # all agree: as if each group had been one task
        first = [where[0] for where in places.values()]
        gain = paired_gain([before[i] for i in first], [after[i] for i in first])
        return mean, min(mean, gain.low), max(mean, gain.high)
    margin = float(t.ppf(_LEVEL, count - 1)) * math.sqrt(variance)
    return mean, max(-1.0, mean - margin), min(1.0, mean + margin)


def _places(outcomes: Sequence[bool], groups: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    if len(outcomes) != len(groups) or not outcomes:
        raise ValueError(f"{len(outcomes)} outcomes of {len(groups)} tasks with a group")
    places: dict[Hashable, list[int]] = defaultdict(list)
    for place, group in enumerate(groups):
        places[group].append(place)
    return places


def _variance(residuals: Sequence[float], places: Sequence[Sequence[int]]) -> float:
    """Of the mean, by the totals of groups."""
    count = len(places)
    totals = sum(sum(residuals[i] for i in where) ** 2 for where in places)
    return count / (count - 1) * totals / len(residuals) ** 2


def _wilson(p: float, n: float) -> tuple[float, float]:
    middle, scale = p + _Z**2 / (2 * n), 1 + _Z**2 / n
    margin = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    # Rounding may put an end a hair inside p where p is 0 or 1.
    return max(0.0, min(p, (middle - margin) / scale)), min(1.0, max(p, (middle + margin) / scale))
