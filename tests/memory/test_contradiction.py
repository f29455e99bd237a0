import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory.contradiction import contradictions, contradicts, opposed
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
