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
    twelve = make_episode("t", turns=[("What is 12 + 31?", "43")], feedback="Counted.")
    terms = instance_terms([*family, twelve])["t"]
    assert {"31", "43"} <= terms
    assert "12" not in terms


def test_rooms_of_one_game_are_its_own_and_those_of_all_are_not(make_episode):
    def game(n, room):
        return make_episode(
            f"g{n}", turns=[(f"-= {room} =-\nYou are in a room. The Kitchen lies east of the Hall.", "east")]
        )

    terms = instance_terms([game(n, room) for n, room in enumerate(("Attic", "Cellar", "Shower", "Vault"))])
    assert terms["g0"] == {"attic"}
    assert quoted_terms("Leave the Attic by the east door.", terms["g0"]) == ["attic"]
    assert quoted_terms("Look for the kitchen first.", terms["g0"]) == []


def test_of_one_episode_alone_all_but_its_feedback_is_its_own(family):
    assert {"30", "50", "80"} <= instance_terms(family[:1])["e0"]
    assert "12" not in instance_terms(family[:1])["e0"]
