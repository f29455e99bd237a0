import random
from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory import contradiction
from memory.contradiction import conflicting, contradictions, contradicts, opposed
from memory.normalise import item_id
from memory.records import Item


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Never push the box", "Push the box"),
        ("Open the door before you enter", "Close the door before you enter"),
        ("Write the answer in this form: <answer>12</answer>", 'Write the answer in this form: {"answer": 12}'),
        ("Knock three times", "Knock two times"),
        ("Take at most 3 turns", "Take at most 5 turns"),
        ("Always put the answer in <answer> tags", "Never put the answer in <answer> tags"),
        ("You mustn't open the red door", "You must open the red door"),
        ("Wipe your feet before you knock", "Wipe your feet after you knock"),
    ],
)
def test_what_cannot_both_be_followed(a, b):
    assert contradicts(a, b)
    assert contradicts(b, a)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (
            "Always write the answer like this: <answer>12</answer>",
            "Write the final answer like this: <answer>12</answer>",
        ),
        ("Do not walk into holes", "Avoid holes"),
        ("Eat soup", "Open the door"),
        ("Check the recipe in the kitchen", "Check the recipe in the kitchen before cooking"),
        ("Never push the box", "Open the door"),
        ("Knock first", "Knock first"),
    ],
)
def test_what_can(a, b):
    assert contradicts(a, b) is None
    assert contradicts(b, a) is None


def test_pairs_are_by_ids_in_order():
    items = [Item(id=item_id(text), text=text) for text in ("Push the box", "Eat soup", "Never push the box")]
    ((pair, why),) = contradictions(items).items()
    assert pair == tuple(sorted((items[0].id, items[2].id)))
    assert why == "one negates what the other says"


vocabulary = ["never", "push", "open", "close", "the", "box", "3", "5", "<a>", "not", "before", "after", "door"]
words = st.lists(st.sampled_from(vocabulary), max_size=8)


@given(words.map(" ".join), words.map(" ".join))
def test_it_is_symmetric_and_nothing_contradicts_itself(a, b):
    assert bool(contradicts(a, b)) == bool(contradicts(b, a))
    assert contradicts(a, a) is None
    assert opposed(a, b) == opposed(b, a)


opposites = [*vocabulary, "shut", "first", "last", "high", "low", "lower", "higher", "two", "{}", "`x`"]


@given(st.lists(st.lists(st.sampled_from(opposites), max_size=8).map(" ".join), max_size=12), st.integers(0, 12))
def test_sieving_loses_no_pair_and_changes_no_order(lines, cut):
    items = list({item_id(line): Item(id=item_id(line), text=line) for line in lines}.values())
    ranked = sorted(items, key=lambda item: item.id)
    pairs = [(one, other, contradicts(one.text, other.text)) for one, other in combinations(ranked, 2)]
    assert list(contradictions(items).items()) == [((a.id, b.id), why) for a, b, why in pairs if why]
    some, others = items[:cut], items[cut // 2 :]
    expected = [(a, b, why) for a in some for b in others if (why := contradicts(a.text, b.text))]
    assert list(conflicting(some, others)) == expected


def test_two_thousand_items_are_looked_at_pair_by_pair_only_where_they_share_their_matter(monkeypatch):
    draw = random.Random(0)
    nouns = ["".join(syllables) for syllables in product(("ba", "ke", "li", "mo", "nu", "so"), repeat=3)]
    lines = {" ".join(["open the", *draw.sample(nouns, draw.randint(3, 9))]) for _ in range(1900)}
    lines |= {f"never {line}" for line in sorted(lines)[:60]} | {
        line.replace("open", "shut") for line in sorted(lines)[:60]
    }
    items = [Item(id=item_id(line), text=line) for line in sorted(lines)]
    looked = []
    monkeypatch.setattr(contradiction, "contradicts", lambda a, b: looked.append(a) or contradicts(a, b))
    assert len(items) > 2000
    assert len(contradictions(items)) >= 120
    assert len(looked) < 5000  # of two million
