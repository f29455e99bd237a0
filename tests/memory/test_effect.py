"""Designs are balanced, and intervals hold the truth about 95 times of 100."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.errors import UsageError
from memory.effect import MOST, Effect, closed, holm, inclusion, paired, randomised
from memory.normalise import item_id
from memory.records import Item, KnowledgeItem
from memory.render import compose
from memory.select import Score, best_of, leave_one_out, measurable, randomised_inclusion, settle


class ByteTokenizer:
    def __call__(self, text, add_special_tokens):
        return {"input_ids": list(text.encode())}


@given(st.integers(2, MOST), st.integers(0, 60), st.integers(0, 5))
def test_a_design_uses_every_task_once_and_splits_items_evenly(items, extra, seed):
    size = max(4, 1 << (items - 1).bit_length())
    blocks = inclusion(items, size + extra, seed)
    assert blocks == inclusion(items, size + extra, seed)
    assert sorted(task for block in blocks for task in block.tasks) == list(range(size + extra))
    assert all(sorted(block.first + block.second) == list(range(items)) for block in blocks)
    for one in range(items):
        for other in range(one):  # over the blocks, together as often as apart
            together = sum((one in block.first) == (other in block.first) for block in blocks)
            assert together == size // 2


@pytest.mark.parametrize(("items", "tasks"), [(1, 9), (MOST + 1, 99), (5, 7), (2, 3)])
def test_designs_that_cannot_be_are_refused(items, tasks):
    with pytest.raises(UsageError):
        inclusion(items, tasks, 0)


def covered(effects, base, tasks, runs=400):
    """How often each item's interval holds its true effect, when effects add up."""
    truth, draw = np.array(effects), np.random.default_rng(0)
    hits = np.zeros(len(truth))
    for seed in range(runs):
        blocks = inclusion(len(truth), tasks, seed)

        def side(places, block):
            return draw.random(len(block.tasks)) < base + truth[list(places)].sum()

        sides = [[side(getattr(block, name), block) for block in blocks] for name in ("first", "second")]
        found = randomised(len(truth), blocks, *sides)
        hits += [effect.low <= true <= effect.high for effect, true in zip(found, truth, strict=True)]
    return hits / runs


@pytest.mark.parametrize(
    ("effects", "base", "tasks"),
    [((0.3, 0.0, -0.2, 0.1, 0.0), 0.4, 32), ((0.3, 0.0, -0.2, 0.1, 0.0), 0.4, 96), ((0.6, 0.0), 0.2, 32)],
)
def test_randomised_intervals_hold_the_truth_about_95_times_of_100(effects, base, tasks):
    share = covered(effects, base, tasks)
    assert (share > 0.92).all(), share
    assert share.mean() < 0.99, share


@pytest.mark.parametrize(("without", "with_it", "tasks"), [(0.1, 0.5, 32), (0.5, 0.5, 32), (0.9, 0.8, 96)])
def test_paired_intervals_hold_the_truth_about_95_times_of_100(without, with_it, tasks):
    draw = np.random.default_rng(0)
    found = [paired(draw.random(tasks) < without, draw.random(tasks) < with_it) for _ in range(1000)]
    assert 0.93 < np.mean([e.low <= with_it - without <= e.high for e in found]) < 0.985


@settings(max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40))
def test_an_interval_is_open_ordered_and_turns_with_its_sides(pairs):
    before, after = zip(*pairs, strict=True)
    found, turned = paired(before, after), paired(after, before)
    assert -1 <= found.low <= found.effect <= found.high <= 1
    assert found.low < found.high
    assert found.effect == pytest.approx(np.mean(after) - np.mean(before))
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))


def test_nothing_played_says_nothing():
    assert paired([], []) == Effect(0.0, -1.0, 1.0, 0)
    assert paired([True], [False]).low == -1.0
    with pytest.raises(ValueError, match="shorter"):
        paired([True], [])


def test_a_gap_closes_when_little_is_left_and_that_may_be_chance():
    before = Effect(0.6, 0.4, 0.8, 32)
    assert closed(before, Effect(0.05, -0.1, 0.2, 32))
    assert closed(before, Effect(-0.1, -0.3, 0.1, 32))
    assert not closed(before, Effect(0.2, -0.05, 0.45, 32))
    assert not closed(before, Effect(0.1, 0.02, 0.18, 320))


TEXTS = ("Helps much.", "Does nothing.", "Harms badly.", "Helps a bit.")
GAIN = dict(zip((item_id(text) for text in TEXTS), (0.5, 0.0, -0.4, 0.2), strict=True))


def made(items):
    return compose(items, 10_000, ByteTokenizer())


def world(tasks, seed=0):
    """A player whose chance of success is known: 0.4 and what the items in its context add."""
    luck = np.random.default_rng(seed).random((tasks, 2))
    played = []

    def play(knowledge, positions):
        gain = sum(GAIN[item.id] for item in knowledge.items) if knowledge else 0.0
        played.append((knowledge, tuple(positions)))
        noise = luck[list(positions), len(played) % 2]
        return [bool(u < 0.4 + gain) for u in noise]

    return play, played


def test_randomised_inclusion_finds_what_helps_and_what_harms():
    play, played = world(256)
    items = [Item(id=item_id(text), text=text) for text in TEXTS]
    found = randomised_inclusion(items, 256, 3, made, play)
    assert sum(len(positions) for _, positions in played) == 2 * 256
    for id_, effect in found.items():
        assert effect.low <= GAIN[id_] <= effect.high
    assert [found[item.id].helps for item in items] == [True, False, False, True]
    assert [found[item.id].harms for item in items] == [False, False, True, False]


def test_leave_one_out_scores_the_rest_and_takes_bare_for_a_single_item():
    play, _ = world(200)
    everywhere = range(200)
    whole = made([KnowledgeItem(id=item_id(text), text=text) for text in TEXTS[:3]])
    bare = play(None, everywhere)
    score = Score(whole, tuple(play(whole, everywhere)))
    effects, rest = leave_one_out(score, bare, made, lambda k: play(k, everywhere))
    assert [len(s.knowledge.items) for s in rest] == [2, 2, 2]
    assert effects[item_id("Harms badly.")].harms
    assert best_of([score, *rest]).knowledge.items[-1].text == "Does nothing."
    single = Score(made(whole.items[:1]), tuple(play(made(whole.items[:1]), everywhere)))
    effects, rest = leave_one_out(single, bare, made, lambda k: pytest.fail("not played"))
    assert rest == []
    assert effects[item_id("Helps much.")].helps


def test_only_what_fits_together_is_measured_together():
    items = [Item(id=f"i{n}", text="x" * 40) for n in range(20)]
    assert len(measurable(items, 64, made)) == MOST
    assert len(measurable(items, 9, made)) == 8
    assert measurable(items, 3, made) == []
    small = [i.id for i in measurable(items, 64, lambda held: compose(held, 200, ByteTokenizer()))]
    assert small == ["i0", "i1", "i2"]


def test_a_contradiction_is_settled_by_what_each_does_alone():
    one, other, third = (made([KnowledgeItem(id=name, text=name)]) for name in ("a", "b", "c"))
    scores = [
        Score(one, (True,) * 30),
        Score(other, (True,) * 4 + (False,) * 26),
        Score(third, (True,) * 29 + (False,)),
    ]
    sure, open_ = settle({("a", "b"): "why", ("a", "c"): "why", ("a", "z"): "not scored"}, scores)
    assert (sure.winner, sure.loser, sure.by.helps) == ("a", "b", True)
    assert (open_.winner, open_.by.helps, open_.by.p_value > 0.05) == ("a", False, True)
    (settled,) = settle({("b", "c"): "why"}, scores)
    assert (settled.winner, settled.loser, settled.by.helps, settled.by.p_value < 0.05) == ("c", "b", True, True)


def test_holm_steps_down_and_stops_at_the_first_that_may_be_chance():
    assert holm([]) == []
    assert holm([0.05]) == [True]
    assert holm([0.051]) == [False]
    assert holm([0.04, 0.01, 0.03]) == [False, True, False]  # 0.01 <= 0.05/3, 0.03 > 0.05/2
    assert holm([0.04, 0.01, 0.02]) == [True, True, True]
    assert holm([0.02] * 3) == [False] * 3  # each alone would count


def test_of_many_harmless_items_one_is_hardly_ever_taken_for_harmful():
    """Sixteen items on 96 tasks, one of which harms: seen alone, intervals accuse a harmless one in a round of four."""
    truth, draw = np.array([-0.4] + [0.0] * 15), np.random.default_rng(0)
    rounds, found, wrong, uncorrected = 300, 0, 0, 0
    for seed in range(rounds):
        blocks = inclusion(16, 96, seed)

        def side(places, block):
            return draw.random(len(block.tasks)) < 0.5 + truth[list(places)].sum()

        sides = [[side(getattr(block, name), block) for block in blocks] for name in ("first", "second")]
        effects = randomised(16, blocks, *sides)
        sure = holm([effect.p_value for effect in effects])
        harmful = [beyond and effect.harms for beyond, effect in zip(sure, effects, strict=True)]
        found += harmful[0]
        wrong += any(harmful[1:])
        uncorrected += any(effect.harms for effect in effects[1:])
    assert found > 0.95 * rounds
    assert wrong <= 0.05 * rounds
    assert uncorrected > 0.15 * rounds


@settings(max_examples=50)
@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_rejects_what_bonferroni_does_and_nothing_that_alone_would_stand(p_values):
    for p, rejected in zip(p_values, holm(p_values), strict=True):
        assert rejected or p > 0.05 / len(p_values)
        assert not rejected or p <= 0.05


@settings(max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40))
def test_a_p_value_is_below_a_twentieth_where_the_interval_excludes_zero(pairs):
    found = paired(*zip(*pairs, strict=True))
    assert (found.p_value < 0.05) == (found.helps or found.harms)
