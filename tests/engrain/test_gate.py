"""The statistics agree with published examples and never claim more than the data."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from engrain.gate import (
    MAX_LOOKS,
    Finding,
    Gate,
    Look,
    Verdict,
    paired_gain,
    predicted,
    recovery,
    sizes,
    wilson,
)
from memory.effect import Effect

BOOLS = st.lists(st.booleans(), min_size=1, max_size=60)


def pairs(both: int, only_after: int, only_before: int, neither: int) -> tuple[list[bool], list[bool]]:
    before = [True] * both + [False] * only_after + [True] * only_before + [False] * neither
    after = [True] * both + [True] * only_after + [False] * only_before + [False] * neither
    return before, after


def test_wilson_is_the_textbook_interval() -> None:
    rate = wilson([True] * 8 + [False] * 2)
    assert (rate.low, rate.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson([]).high == 1.0


@pytest.mark.parametrize(
    ("table", "expected"),
    # Newcombe 1998, table III, method 10: cells e, f, g, h and the limits printed there
    [
        ((36, 12, 2, 0), (0.0569, 0.3404)),
        ((36, 14, 0, 0), (0.1528, 0.4167)),
        ((0, 30, 0, 0), (0.8395, 1.0)),
    ],
)
def test_paired_interval_is_newcombes(table, expected) -> None:
    gain = paired_gain(*pairs(*table))
    assert (gain.low, gain.high) == (pytest.approx(expected[0], abs=2e-4), pytest.approx(expected[1], abs=2e-4))


@pytest.mark.parametrize("cells", [(0.4, 0.3, 0.1, 0.2), (0.05, 0.6, 0.02, 0.33), (0.1, 0.05, 0.05, 0.8)])
def test_the_interval_covers_the_truth_as_often_as_it_says(cells) -> None:
    random = np.random.default_rng(0)
    truth, covered = cells[1] - cells[2], 0
    for counts in random.multinomial(64, cells, size=1500):
        gain = paired_gain(*pairs(*counts))
        covered += gain.low <= truth <= gain.high
    assert 0.935 <= covered / 1500 <= 0.985


def test_nothing_is_shown_as_minus_zero() -> None:
    gain = paired_gain([True] * 300 + [False], [True] * 300 + [False]).model_copy(update={"low": -0.001})
    assert str(gain).startswith("+0.00 [+0.00, ")
    assert str(Effect(-1e-17, -0.004, 0.0, 9)) == "+0.00 [+0.00, +0.00] (n=9)"


def test_mcnemar_is_exact() -> None:
    assert paired_gain(*pairs(5, 8, 2, 5)).p_value == pytest.approx(0.109375)
    assert paired_gain(*pairs(5, 0, 0, 5)).p_value == 1.0


@given(BOOLS, st.randoms(use_true_random=False))
def test_the_interval_holds_the_difference_and_mirrors(before: list[bool], random) -> None:
    after = [random.random() < 0.5 for _ in before]
    gain, back = paired_gain(before, after), paired_gain(after, before)
    assert -1 <= gain.low <= gain.difference <= gain.high <= 1
    assert (gain.low, gain.high) == (pytest.approx(-back.high), pytest.approx(-back.low))
    assert (gain.gained, gain.lost) == (back.lost, back.gained)


def flags(count: int, of: int) -> list[bool]:
    return [True] * count + [False] * (of - count)


def worlds(*other: list[bool]) -> dict[str, tuple[list[bool], list[bool]]]:
    """One other world, before and after, or none."""
    return {"other": (other[0], other[1])} if other else {}


def test_what_one_world_gains_does_not_pay_for_another_that_is_forgotten() -> None:
    gate = Gate(40, looks=1, ood_margin=0.1)
    others = {"plain": (flags(16, 24), flags(16, 24)), "sums": (flags(0, 12), flags(11, 12)),
              "products": (flags(6, 12), flags(0, 12))}  # fmt: skip
    verdict = gate.verdict([gate.look(flags(0, 40), flags(30, 40), others)])
    assert verdict.ood.difference > 0  # all together they gained
    assert not verdict.promoted
    assert "fell by more than 0.1: products -0.50" in verdict.reason
    few = others | {"products": (flags(6, 12), flags(3, 12))}  # three of twelve may be chance
    assert gate.verdict([gate.look(flags(0, 40), flags(30, 40), few)]).promoted


def test_the_gate_wants_a_clear_gain_and_no_forgetting() -> None:
    gate = Gate(40, looks=1)
    same = flags(20, 40)

    def judged(before: list[bool], after: list[bool], *other: list[bool]) -> Verdict:
        return gate.verdict([gate.look(before, after, worlds(*other))])

    assert judged(flags(0, 40), flags(30, 40), same, same).promoted
    assert "no clear gain" in judged(flags(0, 40), flags(1, 40), same, same).reason
    worse = judged(flags(0, 40), flags(30, 40), same, flags(10, 40))
    assert not worse.promoted
    assert "out-of-distribution accuracy fell by more than 0.05" in worse.reason
    assert not judged([], []).promoted
    assert judged(flags(0, 40), flags(30, 40)).promoted  # no other worlds


@pytest.mark.parametrize("looks", [1, 2, 4, MAX_LOOKS])
def test_all_looks_together_may_err_as_often_as_was_asked_for(looks: int) -> None:
    gate = Gate(96, looks, alpha=0.025)
    levels = [gate.level(number) for number in range(1, looks + 1)]
    assert sum(levels) == pytest.approx(0.025)
    assert min(levels) == (0.025 if looks == 1 else 0.001)
    steps = sizes(97, looks)
    assert (len(steps), steps[-1]) == (looks, 97)
    assert max(np.diff([0, *steps])) <= -(-97 // looks)


def test_ten_gains_end_it_at_once_and_nine_do_not() -> None:
    gate = Gate(96, looks=4, ood_margin=0.1)
    same = flags(8, 16)
    clear = gate.look(flags(0, 24), flags(10, 24), worlds(same, same))
    assert (clear.gained, clear.kept, clear.last) == (Finding.YES, Finding.OPEN, False)
    assert clear.gain.low > 0
    assert clear.gain.confidence == pytest.approx(0.998)
    assert "99.8% interval" in str(clear.gain)
    unclear = gate.look(flags(0, 24), flags(9, 24), worlds(same, same))
    assert unclear.gained is Finding.OPEN
    assert unclear.chance is not None
    assert unclear.chance > 0.95


def test_what_is_settled_stays_and_the_last_look_settles_the_rest() -> None:
    gate = Gate(96, looks=2, ood_margin=0.1)
    first = gate.look(flags(0, 48), flags(30, 48), worlds(flags(8, 16), flags(7, 16)))
    assert (first.gained, first.kept) == (Finding.YES, Finding.OPEN)
    second = gate.look(flags(0, 48), flags(0, 48), worlds(flags(16, 32), flags(15, 32)), first)
    assert (second.gained, second.kept, second.last) == (Finding.YES, Finding.YES, True)
    assert second.gain == first.gain  # no test task was played for the second look
    verdict = gate.verdict([first, second])
    assert verdict.promoted
    assert verdict.looks == (first, second)
    assert "after look 2 of 2" in verdict.reason


def test_a_clear_loss_elsewhere_ends_it_though_the_gain_is_open() -> None:
    gate = Gate(96, looks=4, ood_margin=0.05)
    look = gate.look(flags(5, 24), flags(9, 24), worlds(flags(40, 40), flags(10, 40)))
    assert (look.gained, look.kept, look.last) == (Finding.OPEN, Finding.NO, True)
    assert not gate.verdict([look]).promoted
    assert look.ood.high < -0.05


def test_the_predictive_probability_is_that_of_playing_on() -> None:
    random = np.random.default_rng(0)
    seen, left, level = paired_gain(*pairs(4, 7, 2, 11)), 40, 0.022
    draws = random.dirichlet([7 + 0.5, 2 + 0.5, 15 + 0.5], size=20_000)
    more = np.array([random.multinomial(left, p) for p in draws])
    gains, losses = 7 + more[:, 0], 2 + more[:, 1]
    wins = binom.sf(gains - 1, gains + losses, 0.5) <= level
    assert predicted(seen, left, level) == pytest.approx(wins.mean(), abs=0.012)
    assert predicted(paired_gain(*pairs(0, 30, 0, 0)), 0, level) == 1.0
    assert predicted(paired_gain(*pairs(10, 0, 5, 10)), 20, level) < 0.01


Counts = tuple[int, int, int, int]


@cache
def gained(gate: Gate, number: int, counts: Counts) -> Finding:
    """What a look of that number says of the gain, other worlds left out."""
    before, after = pairs(*counts)
    earlier = None
    if number > 1:
        none = paired_gain([], [])
        earlier = Look(number=number - 1, of=gate.looks, level=0.001, gain=none, gained=Finding.OPEN, chance=0.5,
                       ood=none, worlds={}, kept=Finding.OPEN)  # fmt: skip
    return gate.look(before, after, {}, earlier).gained


def played(gate: Gate, cells: tuple[float, ...], runs: int, seed: int) -> tuple[float, float, float]:
    """Shares of runs that find a gain, by looks and by one test of the same tasks, and mean tasks played.

    `cells` are the chances of a task that both solve, a gain, a loss, and one that neither solves.
    """
    random, fixed = np.random.default_rng(seed), Gate(gate.tasks, looks=1)
    batches = np.diff([0, *sizes(gate.tasks, gate.looks)])
    found = by_all = tasks = 0
    for _ in range(runs):
        counts = np.cumsum([random.multinomial(batch, cells) for batch in batches], axis=0)
        looks = [tuple(int(c) for c in row) for row in counts]
        for number, row in enumerate(looks, 1):
            finding = gained(gate, number, row)
            if finding is not Finding.OPEN:
                break
        found += finding is Finding.YES
        tasks += sum(row)
        by_all += gained(fixed, 1, looks[-1]) is Finding.YES
    return found / runs, by_all / runs, tasks / runs


@pytest.mark.parametrize("cells", [(0.3, 0.1, 0.1, 0.5), (0.2, 0.3, 0.3, 0.2)])
def test_a_student_that_is_no_better_is_promoted_no_more_often_than_alpha(cells: tuple[float, ...]) -> None:
    error, _, tasks = played(Gate(48, looks=4), cells, runs=1500, seed=0)
    assert error <= 0.025 + 3 * math.sqrt(0.025 * 0.975 / 1500)
    assert tasks < 48  # futility ends some of them early


@pytest.mark.parametrize("cells", [(0.3, 0.25, 0.05, 0.4), (0.1, 0.2, 0.02, 0.68)])
def test_looking_early_costs_little_power(cells: tuple[float, ...]) -> None:
    early, fixed, tasks = played(Gate(64, looks=4), cells, runs=600, seed=1)
    assert 0.5 < fixed < 0.99  # there is something to lose
    assert early >= fixed - 0.05
    assert tasks < 60


def test_a_clear_case_needs_a_fraction_of_the_tasks() -> None:
    power, _, tasks = played(Gate(96, looks=4), (0.02, 0.85, 0.01, 0.12), runs=200, seed=2)
    assert power == 1.0
    assert tasks < 26


RANK = {Finding.NO: 0, Finding.OPEN: 1, Finding.YES: 2}
CELLS = st.tuples(*[st.integers(0, 12)] * 4).filter(lambda cells: sum(cells) > 0)


@given(CELLS, st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_solving_one_task_more_never_makes_a_verdict_worse(cells: Counts, number: int) -> None:
    both, only_after, only_before, neither = cells
    gate = Gate(60, looks=4)
    now = gained(gate, number, cells)
    if neither:
        assert RANK[gained(gate, number, (both, only_after + 1, only_before, neither - 1))] >= RANK[now]
    if only_before:
        assert RANK[gained(gate, number, (both + 1, only_after, only_before - 1, neither))] >= RANK[now]


@given(CELLS, CELLS, st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_a_promotion_is_never_without_a_gain_and_the_end_is_an_end(cells: Counts, others: Counts, looks: int) -> None:
    gate = Gate(sum(cells), looks=looks, ood_margin=0.1)
    found: list[Look] = []
    while not found or not found[-1].last:
        found.append(gate.look(*pairs(*cells), worlds(*pairs(*others)), found[-1] if found else None))
    assert len(found) <= looks
    verdict = gate.verdict(found)
    assert verdict.promoted == (found[-1].gained is found[-1].kept is Finding.YES)
    if verdict.promoted:
        assert verdict.gain.low > 0
        assert verdict.gain.p_value <= 0.05
        assert verdict.ood.difference >= -0.1
    assert Verdict.model_validate_json(verdict.model_dump_json()) == verdict


def test_recovery_is_none_without_a_gap() -> None:
    assert recovery(0.0, 0.8, 0.6) == pytest.approx(0.75)
    assert recovery(0.5, 0.5, 0.9) is None
