"""What one item does: a causal effect with an interval, from playing with and without it on validation tasks.

Two designs. *Leave one out* plays a knowledge text whole and without one item: the effect of the item among the others,
at the price of one more pass over the tasks for each item. *Randomised inclusion* plays each task twice, with a random
half of the items and with the other half: all main effects at the price of two passes, however many items there are.

Both give one difference a task, D_t in {-1, 0, 1}. With x_ti = 1 where item i stood on the first side and -1 where it
stood on the second, and effects beta that add up,

    D_t = sum_i x_ti beta_i + noise

is solved by least squares. Leave one out is the case of one item with x = 1. Half of the items against the other half
is a fold-over: whatever two items do together falls on both sides alike and cancels.

A round tests many items, and of many harmless ones some look harmful by chance. `holm` holds the chance of any such
mistake in a round at 5%. It is the family-wise error that counts and not the share of mistakes (Benjamini and
Hochberg), because a mistake is not made good later: a harmful item stays so however it is worded. And it asks nothing
of how the tests hang together, which those of one text taken apart do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import hadamard
from scipy.stats import t as student_t

from envs.errors import UsageError

#: The most items of one randomised design; more would leave each knowledge text too few tasks.
MOST = 16


@dataclass(frozen=True)
class Effect:
    """A difference of accuracies in [-1, 1] with its 95% interval, from `n` tasks.

    `p_value`, two-sided, is below 0.05 where the interval excludes zero.
    """

    effect: float
    low: float
    high: float
    n: int
    p_value: float = 1.0

    @property
    def helps(self) -> bool:
        """Whether the interval excludes zero from above."""
        return self.low > 0

    @property
    def harms(self) -> bool:
        """Whether the interval excludes zero from below."""
        return self.high < 0

    def __str__(self) -> str:
        return f"{self.effect:+z.2f} [{self.low:+z.2f}, {self.high:+z.2f}] (n={self.n})"


@dataclass(frozen=True)
class Block:
    """Tasks that are played twice: with the items of `first`, and with those of `second`. Positions, not ids."""

    tasks: tuple[int, ...]
    first: tuple[int, ...]
    second: tuple[int, ...]


def inclusion(items: int, tasks: int, seed: int) -> list[Block]:
    """A randomised design: which items are in the context of which tasks.

    Items are halved by the rows of a Hadamard matrix, so that over the blocks any two items stand on one side as often
    as on opposite sides; which item, row, side and task go together is drawn by `seed`. Every task is in one block.

    Raises:
        UsageError: fewer than 2 or more than `MOST` items, or fewer tasks than blocks (the next power of two from
            `items` on, at least 4).
    """
    if not 2 <= items <= MOST:
        raise UsageError(f"randomised inclusion takes 2 to {MOST} items, not {items}; measure fewer of them at once")
    size = max(4, 1 << (items - 1).bit_length())
    if tasks < size:
        raise UsageError(f"randomised inclusion of {items} items needs at least {size} validation tasks, not {tasks}")
    generator = np.random.default_rng(seed)
    signs_PI = np.asarray(hadamard(size))[:, generator.permutation(size)[:items]]
    signs_PI = signs_PI[generator.permutation(size)] * generator.choice((-1, 1), items)
    shares = np.array_split(generator.permutation(tasks), size)
    return [
        Block(
            tasks=tuple(sorted(share.tolist())),
            first=tuple(np.flatnonzero(row > 0).tolist()),
            second=tuple(np.flatnonzero(row < 0).tolist()),
        )
        for row, share in zip(signs_PI, shares, strict=True)
    ]


def randomised(
    items: int, blocks: Sequence[Block], first: Sequence[Sequence[bool]], second: Sequence[Sequence[bool]]
) -> list[Effect]:
    """Each item's main effect from a design that was played.

    Args:
        items: how many there are.
        blocks: the design.
        first: by block, success per task of that block with the items of `first`.
        second: the same with the items of `second`.

    Raises:
        ValueError: outcomes are missing.
    """
    rows: list[list[int]] = []
    differences: list[int] = []
    for block, with_first, with_second in zip(blocks, first, second, strict=True):
        row = [1 if item in block.first else -1 for item in range(items)]
        for one, other in zip(with_first, with_second, strict=True):
            rows.append(row)
            differences.append(int(one) - int(other))
    return _solve(np.array(rows, dtype=float).reshape(-1, items), np.array(differences, dtype=float))


def paired(without: Sequence[bool], with_it: Sequence[bool]) -> Effect:
    """The effect of what differs between two passes over the same tasks.

    Raises:
        ValueError: the passes differ in length.
    """
    differences = [int(b) - int(a) for a, b in zip(without, with_it, strict=True)]
    return _solve(np.ones((len(differences), 1)), np.array(differences, dtype=float))[0]


def holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which of several null hypotheses fall, the chance of rejecting any true one being at most `level`.

    Holm's step-down (Scandinavian Journal of Statistics 6, 1979): the smallest of m p-values must be at most
    level / m, the next one at most level / (m - 1), and so on until one is not.
    """
    rejected = [False] * len(p_values)
    for left, place in zip(
        range(len(p_values), 0, -1), sorted(range(len(p_values)), key=p_values.__getitem__), strict=True
    ):
        if p_values[place] > level / left:
            break
        rejected[place] = True
    return rejected


def closed(before: Effect, after: Effect, share: float = 0.25) -> bool:
    """Whether a gap has closed: in the context of the trained model the knowledge no longer helps measurably, and what
    it seems to add is at most `share` of what it added before."""
    return not after.helps and after.effect <= share * before.effect


def _solve(signs_TI: np.ndarray, differences_T: np.ndarray, confidence: float = 0.95) -> list[Effect]:
    """Least squares with t intervals; where nothing was played the interval is [-1, 1].

    Two imaginary tasks, one for and one against, enter the variance (after Bonett and Price, 2012), so that an interval
    stays open where all tasks agree.
    """
    tasks, items = signs_TI.shape
    if tasks <= items:
        return [Effect(0.0, -1.0, 1.0, tasks)] * items
    beta_I, *_ = np.linalg.lstsq(signs_TI, differences_T, rcond=None)
    residual_T = differences_T - signs_TI @ beta_I
    variance = (float(residual_T @ residual_T) + 2) / (tasks + 2 - items)
    spread_I = np.sqrt(variance * np.diag(np.linalg.pinv(signs_TI.T @ signs_TI)))
    freedom = tasks + 2 - items
    reach = float(student_t.ppf((1 + confidence) / 2, freedom))
    chance_I = 2 * student_t.sf(np.abs(beta_I) / spread_I, freedom)
    return [
        Effect(
            effect=float(np.clip(beta, -1, 1)),
            low=float(np.clip(beta - reach * spread, -1, 1)),
            high=float(np.clip(beta + reach * spread, -1, 1)),
            n=tasks,
            p_value=chance,
        )
        for beta, spread, chance in zip(beta_I.tolist(), spread_I.tolist(), chance_I.tolist(), strict=True)
    ]
