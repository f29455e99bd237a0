import json
import re
import time

import pyarrow
import pyarrow.parquet
import pytest

from envs import registry
from envs.base import Split, Task
from envs.errors import BadTaskError, UsageError


def first(**options):
    return registry.world("math", options).tasks(Split.TRAIN, 1)[0]


def play(task, reply):
    env = registry.make(task)
    env.reset()
    step = env.step(reply)
    assert step.done
    assert env.score == step.reward
    return step


def test_the_default_world_is_sums_of_two_two_digit_terms():
    for task in registry.world("math").tasks(Split.TRAIN, 200):
        terms = re.fullmatch(r"What is (\d\d) \+ (\d\d)\?", task.parameters["question"])
        assert terms
        assert int(terms[1]) + int(terms[2]) == int(task.parameters["answer"])


def test_many_tasks_are_made_fast():
    world = registry.world("math")
    world.tasks(Split.TRAIN, 1)  # imports reasoning-gym
    started = time.monotonic()
    world.tasks(Split.TRAIN, 500)
    assert time.monotonic() - started < 2


def test_convention_is_in_the_feedback_only():
    task = first(convention="answer_tag")
    env = registry.make(task)
    assert env.system == ""
    assert env.reset().text == task.parameters["question"]
    right = task.parameters["answer"]
    form = "Not counted. No answer was found. An answer is only read in this form: <answer>12</answer>"
    assert play(task, f"It is {right}.").feedback == form
    assert play(task, f"It is {right}.").reward == 0
    assert play(task, f"<answer>{right}</answer>").feedback == "Counted. Correct."
    assert play(task, f"<answer>{right}</answer>").reward == 1
    assert play(task, "<answer>5</answer>").feedback == "Wrong. Your answer was 5."
    assert len(play(task, f"<answer>{'9 ' * 4000}</answer>").feedback) < 120


def test_without_a_convention_any_form_counts():
    task = first()
    for form in ("{}", "\\boxed{{{}}}", "The answer is {}.", "so we get {}"):
        assert play(task, form.format(task.parameters["answer"])).reward == 1
    assert play(task, "no idea").feedback == "Not counted. No answer was found."


def test_ood_has_no_convention():
    tasks = registry.world("math", {"convention": "boxed"}).tasks(Split.OOD, 30)
    assert {task.parameters["convention"] for task in tasks} == {"none"}
    assert {task.parameters["source"] for task in tasks} == {"differences", "products", "chains"}


def test_difficulty_from_the_command_line():
    task = first(**{"sums.min_digits": "3", "sums.max_digits": "3"})
    assert re.fullmatch(r"What is \d{3} \+ \d{3}\?", task.parameters["question"])
    assert first(difficulty='{"sums": {"min_digits": 3, "max_digits": 3}}') == task


def test_any_generator_works():
    tasks = registry.world("math", {"generators": "gcd, leg_counting"}).tasks(Split.TEST, 6)
    assert {task.parameters["source"] for task in tasks} == {"gcd", "leg_counting"}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_questions_from_a_file(tmp_path, kind):
    rows = [{"q": f"Say {i}", "a": i} for i in range(60)]
    path = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    world = registry.world("math", {"data": str(path), "question_key": "q", "answer_key": "a"})
    counts = []
    for split in (Split.TRAIN, Split.VALIDATION, Split.TEST):
        with pytest.raises(UsageError, match=r"has \d+ tasks") as error:
            world.tasks(split, 100)
        counts.append(int(re.search(r"has (\d+) tasks", str(error.value))[1]))
        assert len(world.tasks(split, counts[-1])) == counts[-1]
    assert sum(counts) == 60
    task = world.tasks(Split.TEST, 1)[0]
    assert play(task, task.parameters["answer"]).reward == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"colour": "red"}, "colour.*known options: generators"),
        ({"generators": "chain_sumx"}, "chain_sumx.*chain_sum"),
        ({"generators": ""}, "generators"),
        ({"sums.wat": "1"}, "wat.*min_terms"),
        ({"sums.min_digits": "many"}, "many"),
        ({"sums.min_digits": "3"}, "max_digits"),
        ({"gcd.min_value": "1"}, "gcd"),
        ({"convention": "shout"}, "shout.*answer_tag"),
        ({"data": "nowhere.jsonl"}, "nowhere"),
        ({"data": "n" * 300}, "no such file"),
        ({"system": "\udcff"}, "not UTF-8"),
        ({"difficulty": '{"sums": {"min_digits": 1.5}}'}, "refuses its parameters"),
        ({"sums.min_terms": "40", "sums.max_terms": "40"}, "hardly an expression without '-'"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(UsageError, match=words):
        registry.world("math", options).tasks(Split.TRAIN, 1)


def test_bad_rows_are_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "1+1"}\n')
    with pytest.raises(UsageError, match="row 1 lacks 'answer'"):
        registry.world("math", {"data": path}).tasks(Split.TRAIN, 1)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[1]\n", r"row 1 is no object with keys but '\[1\]'"),
        (b'{"question": "1+1", "answer": 2}\nnot json\n', "line 2 is not JSON"),
        (b'{"question": "caf\xe9?", "answer": "1"}\n', "line 1 is not UTF-8"),
        (b'{"question": "1+1", "answer": null}\n', "row 1, 'answer' is 'None', neither text nor a number"),
        (b'{"question": ["1+1"], "answer": 2}\n', "row 1, 'question' is"),
        (b'{"question": " ", "answer": 2}\n', "row 1, 'question' is empty"),
        (b'{"question": "\\ud800", "answer": 2}\n', "row 1, 'question' is not UTF-8"),
        (b"", "has 0 tasks in split 'train', 1 were asked for; ask for fewer or give more than .*data.jsonl"),
    ],
)
def test_what_is_no_question_is_named(tmp_path, content, words):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=words):
        registry.world("math", {"data": path}).tasks(Split.TRAIN, 1)


def test_a_byte_order_mark_is_passed_over(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"".join(b'{"question": "%d?", "answer": 1}\n' % n for n in range(9)))
    assert registry.world("math", {"data": path}).tasks(Split.TRAIN, 1)


def test_an_exhausted_split_says_how_many_there_are():
    options = {"sums.min_digits": "1", "sums.max_digits": "1"}
    with pytest.raises(UsageError, match=r"has \d+ tasks in split 'test', 99 were asked for"):
        registry.world("math", options).tasks(Split.TEST, 99)


def test_a_task_without_an_answer_is_refused():
    with pytest.raises(BadTaskError, match="answer"):
        registry.make(Task.create("math", Split.TEST, 0, {"question": "1+1"}))
