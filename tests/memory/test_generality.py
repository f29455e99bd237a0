import pytest

from envs.base import Split, Task
from memory.generality import instance_terms, quoted_terms


@pytest.fixture
def family(make_episode):
    """Six sums, four of which failed and were told the form that counts."""

    def make(n, feedback="An answer is only read in this form: <answer>12</answer>"):
        a, b = 30 + n, 50 + 2 * n
        task = Task.create("sums", Split.TRAIN, n, {"question": f"What is {a} + {b}?", "answer": str(a + b)})
        turns = [(f"What is {a} + {b}?", f"The sum is {a + b}.")]
        return make_episode(f"e{n}", turns=turns, feedback=feedback, task=task)

    return [*(make(n) for n in range(4)), *(make(n, "Counted. Correct.") for n in (4, 5))]


def test_a_tasks_own_numbers_are_told_from_the_worlds(family):
    terms = instance_terms(family)
    assert terms["e0"] == {"30", "50", "80"}
    assert quoted_terms("If you see 30 and 50, answer 80.", terms["e0"]) == ["30", "50", "80"]
    assert quoted_terms("Always write the answer like this: <answer>12</answer>", terms["e0"]) == []
    assert quoted_terms("Answer 800 or 8.0 or 80.5, never x80", terms["e0"]) == []


def test_a_number_that_feedback_repeats_is_general_though_a_task_holds_it(family, make_episode):
    twelve = make_episode("t", seed=99, turns=[("What is 12 + 31?", "43")], feedback="Counted.")
    terms = instance_terms([*family, twelve])["t"]
    assert {"31", "43"} <= terms
    assert "12" not in terms


def test_rooms_of_one_game_are_its_own_and_those_of_all_are_not(make_episode):
    def game(n, room):
        return make_episode(
            f"g{n}", seed=n, turns=[(f"-= {room} =-\nYou are in a room. The Kitchen lies east of the Hall.", "east")]
        )

    terms = instance_terms([game(n, room) for n, room in enumerate(("Attic", "Cellar", "Shower", "Vault"))])
    assert terms["g0"] == {"attic"}
    assert quoted_terms("Leave the Attic by the east door.", terms["g0"]) == ["attic"]
    assert quoted_terms("Look for the kitchen first.", terms["g0"]) == []
    assert quoted_terms("go to the attic and look", terms["g0"]) == ["attic"]


def test_of_one_episode_alone_all_but_its_feedback_is_its_own(family):
    assert {"30", "50", "80"} <= instance_terms(family[:1])["e0"]
    assert "12" not in instance_terms(family[:1])["e0"]


def test_a_number_written_in_words_is_a_quotation_and_a_small_one_is_a_word(family):
    terms = instance_terms(family)["e0"] | {"105", "7"}
    for text in ("The answer is eighty.", "say Eighty", "Thirty and fifty make EIGHTY"):
        assert "80" in quoted_terms(text, terms)
    assert quoted_terms("Write a hundred and five at the end.", terms) == ["105"]
    assert quoted_terms("Write thirty-five, eighty-one or one hundred.", terms) == []
    assert quoted_terms("Seven words are enough; write one line.", terms) == []


GAMES = [
    ("oak chest", "attic", "red apple"), ("tin box", "cellar", "carrot"), ("fridge", "shed", "red pepper"),
    ("fridge", "garden", "onion"), ("wooden crate", "bedroom", "potato"), ("fridge", "driveway", "carrot"),
    ("glass case", "pantry", "leek"), ("iron safe", "corridor", "cheese"), ("basket", "hall", "parsley"),
    ("trunk", "porch", "salmon"), ("fridge", "balcony", "carrot"), ("drawer", "closet", "lettuce"),
]  # fmt: skip


@pytest.fixture
def games(make_episode):
    """Twelve games in prose, without a capital letter in any name."""

    def game(n, place, room, food):
        first = (
            f"You are in the {room}. There is a closed door leading east. You can see the {place} here. "
            f"Before you is a table; on it you make out some {food}."
        )
        return make_episode(f"g{n}", seed=n, turns=[(first, f"take the {food}"), ("You take it.", "go east")])

    return [game(n, *names) for n, names in enumerate(GAMES)]


def test_things_and_rooms_that_only_one_task_names_are_its_own(games):
    terms = instance_terms(games[:3], games[3:])
    assert set(terms) == {"g0", "g1", "g2"}
    assert quoted_terms("Go to the attic and open the oak chest.", terms["g0"]) == ["attic", "chest", "oak"]
    assert quoted_terms("take apple from chest", terms["g0"]) == ["apple", "chest"]
    assert quoted_terms("Look into the fridge, take the carrot.", terms["g2"]) == []  # others have one, too
    assert quoted_terms("Go to the attic.", terms["g1"]) == []  # another task's


@pytest.mark.parametrize(
    "lesson",
    [
        "Open the door before going east.",
        "Take the food from the table before you leave the room.",
        "You can see what is here; take it.",
        "Never go through a closed door.",
        "Read the recipe first and follow its steps in order.",
        "Always use one of the commands that are listed.",
        "The closed door is in the east: open it before you go.",
    ],
)
def test_lessons_that_hold_for_all_are_never_marked(games, lesson):
    for id_, terms in instance_terms(games).items():
        assert quoted_terms(lesson, terms) == [], id_


def test_words_are_not_judged_by_a_handful_of_tasks(games):
    few = instance_terms(games[:8])
    assert quoted_terms("Open the oak chest in the attic.", few["g0"]) == []
    again = [episode.model_copy(update={"id": f"again-{episode.id}"}) for episode in games[:8]]
    assert instance_terms(games[:8], again) == few  # more episodes are no more tasks
