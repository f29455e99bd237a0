from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.errors import UsageError
from memory.curate import candidates, ordered
from memory.normalise import item_id, nearest, normalised, similarity
from memory.records import Item, ItemSource, ItemStatus
from memory.render import HEADER, compose, count_tokens, render_knowledge
from memory.select import select

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


class ByteTokenizer:
    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": list(text.encode())}


BYTES = ByteTokenizer()


def item(text, episodes=("e1",), day=0, recalled=False, status=ItemStatus.ACTIVE):
    at = BEGIN + timedelta(days=day)
    sources = tuple(
        ItemSource(episode_id=e, extraction_id=f"x{e}", text=text, recalled=recalled, created_at=at) for e in episodes
    )
    return Item(id=item_id(text), text=text, status=status, created_at=BEGIN, sources=sources)


def test_rendering_is_exact():
    assert render_knowledge(["Knock.", "Wipe."]) == f"{HEADER}\n- Knock.\n- Wipe."
    assert render_knowledge([]) == ""


@given(st.lists(st.text(st.sampled_from("abcé "), min_size=1, max_size=30), max_size=8), st.integers(0, 200))
def test_a_budget_drops_whole_items_and_says_which(texts, budget):
    items = [Item(id=f"{n}", text=text) for n, text in enumerate(texts)]
    knowledge = compose(items, budget, BYTES)
    assert knowledge.tokens == count_tokens(knowledge.text, BYTES) <= budget
    assert knowledge.text == render_knowledge([i.text for i in knowledge.items])
    kept = [i.id for i in knowledge.items]
    assert sorted([*kept, *knowledge.dropped], key=int) == [i.id for i in items]
    assert kept == sorted(kept, key=int)
    for dropped in knowledge.dropped:  # none of them would have fitted at the end
        assert count_tokens(render_knowledge([*(i.text for i in knowledge.items), texts[int(dropped)]]), BYTES) > budget


def test_the_id_is_that_of_the_texts_in_order():
    a, b = item("a"), item("b")
    assert compose([a, b], 999, BYTES).id != compose([b, a], 999, BYTES).id
    assert compose([a, b], 999, BYTES).id == compose([a, item("c" * 999), b], 99, BYTES).id


def test_normalised():
    assert normalised("  Knock\tTHREE times!! ") == "knock three times"
    assert item_id("Knock.") == item_id("knock") != item_id("knock <b>")
    assert normalised("...") == "..."


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Always put the answer in <answer>", "Always put the answer in <result>"),
        ("Always put the key in the box first", "Never always put the key in the box first"),
        ("You must open the red door before night", "You mustn't open the red door before night"),
        ("Take at most 3 turns to reach the goal", "Take at most 5 turns to reach the goal"),
        (r"Write the answer in \boxed{} at the end", r"Write the answer in \frac{} at the end"),
    ],
)
def test_what_a_lesson_hangs_on_keeps_two_apart(a, b):
    assert similarity(a, b) == 0.0


@given(st.text(max_size=40), st.text(max_size=40))
def test_similarity_is_a_share_and_symmetric(a, b):
    assert 0 <= similarity(a, b) == similarity(b, a) <= 1
    assert similarity(a, a) in (0.0, 1.0)


def test_nearest_takes_the_very_text_before_a_like_one():
    like, same = item("Knock at the old door three times"), item("Knock at the old door three times now")
    assert nearest("knock at the old door three times now!", [like, same]) == same
    assert nearest("Knock at the old door three times please", [like]) == like
    assert nearest("Eat soup", [like, same]) is None


def test_order_is_by_support_then_recency():
    often, late, early = item("often", ("e1", "e2")), item("late", day=2), item("early", day=1)
    same_episode_twice = item("twice", ("e1", "e1"))
    hand = Item(id="h", text="hand", created_at=BEGIN + timedelta(days=9))
    recalled, retired = item("recalled", recalled=True), item("old", status=ItemStatus.RETIRED)
    found = ordered([hand, early, recalled, same_episode_twice, late, retired, often])
    assert [i.text for i in found] == ["often", "late", "early", "twice", "hand"]


@given(st.integers(0, 12), st.integers(1, 12), st.integers(1, 400), st.integers(0, 3))
def test_candidates_are_distinct_repeatable_and_fit(n, count, budget, seed):
    items = [item(f"rule {chr(97 + i)}", day=i) for i in range(n)]
    found = candidates(items, budget, BYTES, count, seed)
    assert found == candidates(items[::-1], budget, BYTES, count, seed)
    assert len({k.id for k in found}) == len(found) <= count
    assert all(0 < k.tokens <= budget and k.items for k in found)
    if budget >= 100 and n:
        assert found[0].items[0].text == f"rule {chr(96 + n)}"
        assert len(found) >= min(count, n)


def test_candidates_hold_single_items_the_best_together_and_all():
    items = [item(f"rule {chr(97 + i)}", day=9 - i) for i in range(5)]
    found = [[i.text[-1] for i in k.items] for k in candidates(items, 999, BYTES, 8, 0)]
    assert found[:7] == [["a"], ["b"], ["c"], ["d"], ["a", "b"], ["a", "b", "c", "d"], ["a", "b", "c", "d", "e"]]
    assert 2 <= len(found[7]) <= 4
    assert candidates([], 999, BYTES, 3, 0) == []
    with pytest.raises(UsageError):
        candidates(items, 999, BYTES, 0, 0)


def test_selection_takes_the_most_solved_then_the_shortest():
    long, short, bad = (compose([item(text)], 999, BYTES) for text in ("long rule", "rule", "x"))
    outcomes = {long.id: [True, True, False], short.id: [True, False, True], bad.id: [False] * 3}
    told = []
    selection = select([long, bad, short], lambda k: outcomes[k.id], told.append)
    assert selection.best.knowledge == short
    assert (selection.best.successes, selection.best.accuracy) == (2, 2 / 3)
    assert [s.knowledge for s in selection.scores] == [long, bad, short]
    assert told == list(selection.scores)
    assert select([long, bad], lambda k: outcomes[k.id]).best.knowledge == long


def test_selection_needs_candidates_and_one_set_of_tasks():
    with pytest.raises(UsageError, match="no candidate"):
        select([], lambda k: [])
    a, b = compose([item("a")], 999, BYTES), compose([item("b")], 999, BYTES)
    with pytest.raises(UsageError, match="2 and 1 tasks"):
        select([a, b], lambda k: [True] * (2 if k is a else 1))
