import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.verify import AnswerChecker, shared_checker


@pytest.fixture(scope="module")
def checker():
    made = AnswerChecker()
    yield made
    made.close()


@given(st.integers(), st.integers())
def test_integers_are_decided_without_a_worker(left, right):
    made = AnswerChecker()
    assert made.equal(str(left), str(right)) == (left == right)
    assert made.equal(f"{left:,}", str(left))
    assert made._worker is None


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("\\frac{1}{2}", "0.5", True),
        ("x^2+2x+1", "(x+1)^2", True),
        ("x^2+2x+2", "(x+1)^2", False),
        ("\\sqrt{4}", "2", True),
        ("(1,2)", "(1, 2)", True),
        ("47 + 35 = 82", "82", True),
        ("monday", "Monday", True),
        ("Tuesday", "Monday", False),
        ("", "1", False),
        ("$12$", "12", True),
    ],
)
def test_equality(checker, answer, expected, same):
    assert checker.equal(answer, expected) is same


@pytest.mark.parametrize("answer", ["47 + 35", "47+35", "41 \\times 2", "2*41", "(40)(2)+2", "100-18"])
def test_undone_arithmetic_is_no_answer(checker, answer):
    assert not checker.equal(answer, "82")


@pytest.mark.parametrize(
    "answer",
    [
        "9**9**9**9",
        "9^{9^{9^{9}}}",
        "{" * 900 + "1" + "}" * 900,
        "1" * 1_000_000,
        "x" * 1_000_000,
        "__import__('os').system('echo')",
        "99999999!",
    ],
)
def test_hostile_answers_cost_seconds_and_the_checker_lives(checker, answer):
    checker.equal("x+1", "1+x")  # warm
    started = time.monotonic()
    assert not checker.equal(answer, "3")
    assert not checker.equal(answer, "x")
    assert time.monotonic() - started < 20  # about a second, and another to start a new worker, on an idle machine
    assert checker.equal("x+1", "1+x")


def test_a_killed_worker_is_replaced(checker):
    assert checker.equal("a+b", "b+a")
    checker._worker._process.kill()
    checker.equal("a+b", "b+a")
    assert checker.equal("a+b", "b+a")


def test_threads_share_one_checker(checker):
    pairs = [(f"x+{i}", f"{i}+x" if i % 2 else f"{i + 1}+x") for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda pair: checker.equal(*pair), pairs)) == [bool(i % 2) for i in range(16)]


def test_plain_numbers_import_no_algebra():
    code = (
        "import sys; from envs.verify import shared_checker; assert shared_checker().equal('12', '12.0');"
        "assert 'sympy' not in sys.modules and 'math_verify' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(Path.cwd())})


def test_shared_checker_is_one():
    assert shared_checker() is shared_checker()


def test_a_process_with_many_open_files_checks_too():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1200:
        pytest.skip("so many files may not be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    held = [os.dup(0)]
    made = AnswerChecker()
    try:
        while held[-1] < 1024:
            held.append(os.dup(0))
        assert made.equal("a+b", "b+a")
    finally:
        for descriptor in held:
            os.close(descriptor)
        made.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
