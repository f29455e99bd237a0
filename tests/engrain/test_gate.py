"""The statistics agree with published examples and never claim more than the data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engrain.gate import judge, paired_gain, recovery, wilson

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


def test_the_gate_wants_a_clear_gain_and_no_forgetting() -> None:
    none, clear = [False] * 40, [True] * 30 + [False] * 10
    same = [True] * 20 + [False] * 20
    assert judge(none, clear, same, same, ood_margin=0.05).promoted
    assert "no clear gain" in judge(none, [True] + [False] * 39, same, same, ood_margin=0.05).reason
    worse = judge(none, clear, same, [True] * 10 + [False] * 30, ood_margin=0.05)
    assert not worse.promoted
    assert "out-of-distribution" in worse.reason
    assert not judge([], [], [], [], ood_margin=0.05).promoted


def test_recovery_is_none_without_a_gap() -> None:
    assert recovery(0.0, 0.8, 0.6) == pytest.approx(0.75)
    assert recovery(0.5, 0.5, 0.9) is None
