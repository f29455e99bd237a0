"""Promotion statistics: is the distilled student better on the same held-out tasks, and did it forget nothing?

All comparisons are paired by task. The test of the gain is group-sequential: tasks are played in batches, and after
each batch (a *look*) it may end.

- **Promotion** needs an exact McNemar test at the look's level, and an interval at that level that excludes zero. The
  levels are those of Haybittle (British Journal of Radiology 44, 1971) and Peto et al. (British Journal of Cancer 34,
  1976): 1/25 of `alpha` at every look but the last, which has what is left. They add up to `alpha`, so the chance to
  promote a student that is no better is at most `alpha` whatever the dependence between looks is (Bonferroni), exactly
  and not only for many tasks. Ten gains without a loss are enough at any look; the last look tests at 0.022 where one
  test of all tasks would at 0.025, which costs next to no power.
- **Futility**: where the Bayesian predictive probability (Spiegelhalter, Freedman and Blackburn, Controlled Clinical
  Trials 7, 1986; Jeffreys' prior) that all tasks would lead to a promotion is below 5%, playing on is given up. That
  can only make a promotion rarer.
- **Other worlds**, all their tasks together: the loss is clear where the whole interval at the look's level lies below
  minus the margin, and clearly within it where the whole interval lies above; at the last look the estimate decides.
  That is no proof of non-inferiority: dozens of tasks cannot give one for a margin of a few percent. Besides, no single
  world may lose more than the margin where the exact test at the look's level finds a loss there, so that what one
  world gains does not pay for another that is forgotten.

What is reported after an early stop is the repeated confidence interval of that look (Jennison and Turnbull, JRSS B 51,
1989): all looks' intervals together hold with 95%, so the one at which we stopped does too. It is wider than a plain
one. The estimate itself leans to the side on which the test stopped; where a figure is to be published, play all tasks
(`looks=1`, which is the plain test of all of them).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy.stats import betabinom, binom, binomtest

ALPHA = 0.025  # one-sided; of a two-sided 95% interval
MAX_LOOKS = 10
_EARLY = 25  # a look before the last has this part of alpha
_FUTILE = 0.05


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
    """The paired difference of two success rates, `after - before`, on the same tasks.

    `low..high` holds with `confidence`, which is more than 95% where a test was ended early.
    """

    model_config = ConfigDict(frozen=True)

    difference: float
    low: float
    high: float
    p_value: float  # exact McNemar, two-sided
    gained: int  # tasks that only `after` solves
    lost: int  # tasks that only `before` solves
    n: int
    confidence: float = 0.95

    @property
    def positive(self) -> bool:
        """Whether the interval excludes zero from above."""
        return self.low > 0

    def __str__(self) -> str:
        level = "" if self.confidence == 0.95 else f", {self.confidence:.1%} interval"
        interval = f"[{self.low:+z.2f}, {self.high:+z.2f}]"
        return f"{self.difference:+z.2f} {interval} (n={self.n}, p={self.p_value:.2g}{level})"


class Finding(StrEnum):
    """What a look says of one of the two questions."""

    YES = "yes"
    NO = "no"
    OPEN = "open"  # more tasks must be played


class Look(BaseModel):
    """One look at the paired outcomes so far: what each question came to, and by which limits.

    A question that is settled is not asked again: its gain stays that of the look that settled it.
    """

    model_config = ConfigDict(frozen=True)

    number: int  # from 1
    of: int
    level: float  # one-sided chance of error that this look may take
    gain: Gain
    gained: Finding  # is the student better?
    chance: float | None  # predictive probability of a promotion with all tasks; None where it was not asked
    ood: Gain  # all other worlds together
    worlds: Mapping[str, Gain]
    kept: Finding  # is the loss in other worlds within the margin?

    @property
    def last(self) -> bool:
        """Whether nothing is left to play for."""
        return Finding.NO in (self.gained, self.kept) or Finding.OPEN not in (self.gained, self.kept)


class Verdict(BaseModel):
    """The gate's decision and its evidence."""

    model_config = ConfigDict(frozen=True)

    promoted: bool
    reason: str
    gain: Gain
    ood: Gain
    looks: tuple[Look, ...] = ()
    alpha: float = ALPHA
    ood_margin: float | None = None


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
        return Gain(difference=0.0, low=-1.0, high=1.0, p_value=1.0, gained=0, lost=0, n=0, confidence=confidence)
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
        difference=difference,
        low=max(-1.0, low),
        high=min(1.0, high),
        p_value=p_value,
        gained=gained,
        lost=lost,
        n=n,
        confidence=confidence,
    )


@dataclass(frozen=True)
class Gate:
    """The rule by which a student is promoted.

    Args:
        tasks: held-out tasks that there are.
        looks: batches in which they are played, at most `MAX_LOOKS`; 1 plays all and decides once.
        alpha: the chance to promote a student that is no better.
        ood_margin: accuracy that it may lose in other worlds.
    """

    tasks: int
    looks: int = 1
    alpha: float = ALPHA
    ood_margin: float = 0.05

    def level(self, number: int) -> float:
        """The one-sided chance of error of look `number` (from 1); all of them add up to `alpha`."""
        early = self.alpha / _EARLY
        return self.alpha - early * (self.looks - 1) if number == self.looks else early

    def look(
        self,
        before: Sequence[bool],
        after: Sequence[bool],
        others: Mapping[str, tuple[Sequence[bool], Sequence[bool]]],
        earlier: Look | None = None,
    ) -> Look:
        """What the outcomes so far say.

        Args:
            before: outcomes of the test tasks without the training, from the first task on.
            after: with it.
            others: the same two lists of each other world.
            earlier: the look before this one.
        """
        number = earlier.number + 1 if earlier else 1
        level, final = self.level(number), number == self.looks
        gained: Finding
        kept: Finding
        if earlier is not None and earlier.gained is not Finding.OPEN:
            gain, gained, chance = earlier.gain, earlier.gained, earlier.chance
        else:
            gain = paired_gain(before, after, 1 - 2 * level)
            gained, chance = self._gained(gain, level, final=final)
        if earlier is not None and earlier.kept is not Finding.OPEN:
            ood, worlds, kept = earlier.ood, earlier.worlds, earlier.kept
        else:
            all_before, all_after = ([won for pair in others.values() for won in pair[side]] for side in (0, 1))
            ood = paired_gain(all_before, all_after, 1 - 2 * level)
            worlds = {name: paired_gain(*pair, 1 - 2 * level) for name, pair in others.items()}
            forgotten = any(self._forgot(world, level) for world in worlds.values())
            kept = Finding.NO if forgotten else self._kept(ood, final=final)
        return Look(
            number=number,
            of=self.looks,
            level=level,
            gain=gain,
            gained=gained,
            chance=chance,
            ood=ood,
            worlds=worlds,
            kept=kept,
        )

    def verdict(self, looks: Sequence[Look]) -> Verdict:
        """The decision of the last of these looks."""
        end = looks[-1]
        early = f"; after look {end.number} of {end.of}" if end.of > 1 else ""
        if end.gained is Finding.NO:
            reason = f"no clear gain on held-out tasks: {end.gain}{early}"
        elif end.kept is not Finding.YES:
            lost = {name: world for name, world in end.worlds.items() if self._forgot(world, end.level)}
            where = ", ".join(f"{name} {world}" for name, world in lost.items()) or str(end.ood)
            reason = f"out-of-distribution accuracy fell by more than {self.ood_margin:g}: {where}{early}"
        else:
            reason = f"gain {end.gain}; out of distribution {end.ood}{early}"
        return Verdict(
            promoted=end.gained is Finding.YES and end.kept is Finding.YES,
            reason=reason,
            gain=end.gain,
            ood=end.ood,
            looks=tuple(looks),
            alpha=self.alpha,
            ood_margin=self.ood_margin,
        )

    def _gained(self, gain: Gain, level: float, *, final: bool) -> tuple[Finding, float | None]:
        # the two-sided exact p-value is twice the one-sided one, the coin of the test being fair
        if gain.positive and gain.p_value <= 2 * level:
            return Finding.YES, None
        if final:
            return Finding.NO, None
        chance = predicted(gain, self.tasks - gain.n, self.level(self.looks))
        return (Finding.NO if chance < _FUTILE else Finding.OPEN), chance

    def _forgot(self, world: Gain, level: float) -> bool:
        """Whether one world by itself lost clearly, and more than the margin."""
        return world.difference < -self.ood_margin and world.p_value <= 2 * level

    def _kept(self, ood: Gain, *, final: bool) -> Finding:
        if not ood.n:  # there are no other worlds
            return Finding.YES
        if final:
            return Finding.YES if ood.difference >= -self.ood_margin else Finding.NO
        if ood.low > -self.ood_margin:
            return Finding.YES
        return Finding.NO if ood.high < -self.ood_margin else Finding.OPEN


def sizes(tasks: int, looks: int) -> list[int]:
    """How many of the tasks are played at each look, as evenly as may be; all at the last one."""
    return [math.ceil(tasks * number / looks) for number in range(1, looks + 1)]


def predicted(gain: Gain, left: int, level: float) -> float:
    """Predictive probability that the exact test at `level` rejects once `left` more tasks are played.

    Gains, losses and ties have a Dirichlet(1/2, 1/2, 1/2) prior; the counts to come are Dirichlet-multinomial: a
    beta-binomial number of pairs that differ, and a beta-binomial number of gains among them.
    """
    differ = gain.gained + gain.lost
    more = np.arange(left + 1)
    weights = betabinom.pmf(more, left, differ + 1.0, gain.n - differ + 0.5)
    # the fewest gains of so many differing pairs that reject: P(X >= c) <= level for X ~ Binomial(pairs, 1/2)
    needed = binom.isf(level, differ + more, 0.5) + 1
    wins = betabinom.sf(needed - gain.gained - 1, more, gain.gained + 0.5, gain.lost + 0.5)
    return float(np.clip(np.sum(weights * wins), 0.0, 1.0))


def recovery(bare: float, in_context: float, distilled: float) -> float | None:
    """Share of the in-context gap that stands in the weights, (distilled - bare) / gap; None where there is no gap."""
    gap = in_context - bare
    return (distilled - bare) / gap if gap > 0 else None
