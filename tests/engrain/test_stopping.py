"""SIGTERM and Ctrl-C: politely where somebody asks, insistently after a while, and never later than the deadline."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engrain.stopping import stopping

ROOT = Path(__file__).parents[2]
SCRIPT = """
import os, signal, sys, time
from engrain.cli import _terminated
from engrain.stopping import stopping
signal.signal(signal.SIGTERM, _terminated)
mode = sys.argv[1]
with stopping(grace=1.0, deadline=2.0) as stop:
    print("ready", flush=True)
    while mode == "asks":
        time.sleep(0.02)
        if stop.asked:
            print("safe", flush=True)
        stop.check()
    while mode == "busy":
        try:
            time.sleep(30)
        finally:
            print("unwound", flush=True)
    while mode == "deaf":
        try:
            time.sleep(30)
        except BaseException:
            time.sleep(600)
"""


def run(mode: str, number: int) -> tuple[int, str, str, float]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    started = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err, time.monotonic() - started


def test_it_leaves_where_it_is_safe() -> None:
    code, out, err, _ = run("asks", signal.SIGTERM)
    assert (code, out) == (143, "safe\n")
    assert err == "stopped: terminated; run the same command again to go on\n"


def test_what_never_asks_is_interrupted_after_the_grace() -> None:
    code, out, err, seconds = run("busy", signal.SIGTERM)
    assert (code, out) == (143, "unwound\n")
    assert "run the same command again" in err
    assert 0.9 < seconds < 30


def test_what_does_not_even_unwind_is_gone_at_the_deadline() -> None:
    code, _, err, seconds = run("deaf", signal.SIGINT)
    assert code == 130
    assert "what was under way is given up; run the same command again to go on" in err
    assert seconds > 1.9


def test_a_second_signal_does_not_wait() -> None:
    ended: list[int] = []
    with stopping(grace=60, deadline=120, end=ended.append) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        assert stop.asked == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert ended == []


def test_handlers_are_as_before() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stopping() as stop:
        stop.check()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
