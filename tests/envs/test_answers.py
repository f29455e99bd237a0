import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.answers import Convention, find_answer, plain_number

FORMS = {
    Convention.ANSWER_TAG: "<answer>{}</answer>",
    Convention.JSON: '{{"answer": {}}}',
    Convention.BOXED: "\\boxed{{{}}}",
}


@given(st.integers(), st.sampled_from(sorted(FORMS)))
def test_an_answer_in_the_convention_is_found(value, convention):
    reply = "I think that 99 is near.\n" + FORMS[convention].format(value) + "\nDone with 3 steps."
    assert find_answer(reply, convention) == str(value)


@given(st.integers(0, 10**9), st.sampled_from(sorted(FORMS)), st.sampled_from(sorted(FORMS)))
def test_another_form_is_not_an_answer(value, asked, given_form):
    found = find_answer(FORMS[given_form].format(value), asked)
    assert found == (str(value) if asked == given_form else None)


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("The sum is 82.", "82"),
        ("47 + 35 = 82", "82"),
        ("It is 1,234, I say", "1,234"),
        ("The answer is 12 because 3 times 4", "12"),
        ("**Answer:** so the answer is **-7**.", "-7"),
        ("5-3", "3"),
        ("35 - 47 = -12", "-12"),
        ("\\boxed{\\frac{1}{2}} and 7", "\\frac{1}{2}"),
        ("no idea", None),
        ("", None),
        ("0.5", "0.5"),
    ],
)
def test_without_a_convention_the_stated_or_last_number_counts(reply, answer):
    assert find_answer(reply, Convention.NONE) == answer


def test_words_are_read_from_the_last_line_or_the_statement():
    assert find_answer("hm\nMonday.", Convention.NONE, numeric=False) == "Monday"
    assert find_answer("The answer is Monday.\nBye", Convention.NONE, numeric=False) == "Monday"


def test_the_last_of_several_answers_counts_and_empty_ones_do_not():
    assert find_answer("<answer>1</answer> <answer>2</answer>", Convention.ANSWER_TAG) == "2"
    assert find_answer("<answer> </answer>", Convention.ANSWER_TAG) is None
    assert find_answer("<answer>12", Convention.ANSWER_TAG) is None
    assert find_answer("</answer>12<answer>", Convention.ANSWER_TAG) is None
    assert find_answer('{"answer": true}', Convention.JSON) is None
    assert find_answer("<answer>3</answer> and </answer>", Convention.ANSWER_TAG) == "3"


@pytest.mark.parametrize("reply", ['{"answer": 12, "why": {"sum": [9, 3]}}', '{"why": "a { b", "answer": "12"} done'])
def test_any_json_object_with_an_answer_counts(reply):
    assert find_answer(reply, Convention.JSON) == "12"


@given(st.text(), st.sampled_from(sorted(Convention)), st.booleans())
def test_any_text_is_searched_without_error(text, convention, numeric):
    found = find_answer(text, convention, numeric=numeric)
    assert found is None or found.strip()


@pytest.mark.parametrize("piece", ["a", "<answer>", "{", "\\boxed{", "1", "answer is ", "1,", '{"answer":', "-"])
def test_long_replies_are_searched_fast(piece):
    started = time.monotonic()
    for convention in Convention:
        find_answer(piece * (1_000_000 // len(piece)), convention)
    assert time.monotonic() - started < 3


@given(st.fractions())
def test_fractions_are_plain_numbers(value):
    assert plain_number(str(value)) == (value if len(str(abs(value.denominator))) < 60 else None)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1,234.5", Fraction(2469, 2)), ("+3", 3), ("−3", -3), (".5", Fraction(1, 2)), ("12.", 12)],
)
def test_plain_numbers(text, value):
    assert plain_number(text) == value


@pytest.mark.parametrize("text", ["1e999999999", "1/0", "9**9", "", "x", "1,23", "9" * 500, "nan", "1 2"])
def test_not_plain_numbers(text):
    assert plain_number(text) is None
