"""`engrain play` in a real terminal of 80 columns and 24 rows: with colour, without, and for a screen reader."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from agent.episode import StopReason
from engrain.match import human_turns
from memory.store import Store

_ESCAPE = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07|[=>])")
_COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9]m")
_MOVES = re.compile(r"\x1b(\[[0-9;]*[ABCDEFGHJKSTf]|[78M])")
_BOXES = re.compile("[\u2500-\u259f]")


def _at_a_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """A program in a terminal of its own: what it writes is read, what is typed reaches it as from a keyboard."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        root = str(Path(__file__).parents[2])
        names = {
            k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES", "TERM", "FORCE_COLOR")
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "engrain", "play", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=root,
            env={**names, "PYTHONPATH": root, "TERM": "xterm-256color", **environment},
            start_new_session=True,
            preexec_fn=_at_a_terminal,
        )
        os.close(slave)
        self.shown, self.seen = "", 0

    def until(self, text: str, seconds: float = 120) -> None:
        """Read until `text` stands on the screen, after what was waited for before."""
        deadline = time.monotonic() + seconds
        while text not in self.shown[self.seen :]:
            assert time.monotonic() < deadline, f"no {text!r} in {self.shown!r}"
            assert self._read(), f"ended without {text!r}: {self.shown!r}"
        self.seen = self.shown.index(text, self.seen) + len(text)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C, once the program waits: readline misses one that comes between its prompt and its waiting."""
        time.sleep(1.0)
        self.type("\x03")

    def end(self, seconds: float = 120) -> int:
        """Read the rest; the exit code."""
        deadline = time.monotonic() + seconds
        while self._read() and time.monotonic() < deadline:
            pass
        code = self.process.wait(seconds)
        os.close(self.master)
        return code

    def _read(self) -> bool:
        try:
            if select.select([self.master], [], [], 1.0)[0]:
                piece = os.read(self.master, 1 << 16)
                self.shown += piece.decode(errors="replace")
                return bool(piece)
        except OSError:  # the program has closed its side
            return False
        return True

    @property
    def lines(self) -> list[str]:
        """What stands there without escapes; spinners that were wiped away left out."""
        return [_ESCAPE.sub("", line.split("\r")[-1]) for line in self.shown.replace("\r\n", "\n").split("\n")]


def stored(engrain_home: Path) -> Store:
    return Store.open(str(engrain_home / "engrain.db"), create=False)


def test_a_menu_leads_to_a_game_and_ctrl_c_keeps_it(engrain_home: Path) -> None:
    terminal = Terminal("--seed", "1", TERM="xterm-256color")
    terminal.until("Enter for 1> ")
    terminal.type("frozenlake\r")
    terminal.until("Enter for 1> ")
    terminal.type("2\r")
    terminal.until("you> ")
    terminal.type("/help\r")
    terminal.until("/quit")
    terminal.until("you> ")
    terminal.type("nonsense\r")
    terminal.until("turn 2 of")
    terminal.until("you> ")
    terminal.interrupt()
    assert terminal.end() == 0
    assert _COLOUR.search(terminal.shown)
    assert not _BOXES.search(terminal.shown)
    assert max(map(len, terminal.lines)) <= 80
    assert "left unfinished" in terminal.shown
    assert "Traceback" not in terminal.shown
    with stored(engrain_home) as store:
        (episode,) = store.episodes()
    assert (episode.stop_reason, episode.human, len(episode.turns)) == (StopReason.INTERRUPTED, True, 1)


def test_deciding_together_without_colour(engrain_home: Path, tiny_folder: Path) -> None:
    terminal = Terminal(
        "frozenlake", "--co", "--seed", "1", "-m", str(tiny_folder), "--max-tokens", "8",
        "--gap", "--against", str(_rules(tiny_folder)), NO_COLOR="1",
    )  # fmt: skip
    terminal.until("token by token")  # before one decides
    terminal.until("reply 1")
    terminal.until("you> ")
    terminal.type("\r")  # takes what the agent suggests
    terminal.until("reply 2")
    terminal.until("you> ")
    terminal.type("[downx\x7f]\r")  # with a slip that is taken back
    terminal.until("you> ")
    terminal.type("/quit\r")
    assert terminal.end() == 0
    assert not _COLOUR.search(terminal.shown)
    assert not _BOXES.search(terminal.shown)
    with stored(engrain_home) as store:
        (episode,) = store.episodes()
        assert store.arrivals("frozenlake") == 1
    assert episode.turns[1].action == "[down]"
    assert human_turns(episode) == (False, True)
    assert episode.sampled == episode.turns[0].end - episode.turns[0].start
    assert terminal.shown.count("token by token") == 1


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"NO_COLOR": "1"}])
def test_a_comparison_for_a_screen_reader(environment: dict[str, str], engrain_home: Path, tiny_folder: Path) -> None:
    options = ("math", "-m", str(tiny_folder), "--max-tokens", "4", "-k", str(_rules(tiny_folder)), "--compare")
    plain = ["--plain"] if "NO_COLOR" in environment else []  # a dumb terminal has the labels, and no escapes either
    terminal = Terminal(*options, "--gap", "--why", *plain, **environment)
    assert terminal.end(240) == 0
    assert "\x1b" not in terminal.shown
    assert "\r" not in terminal.shown.replace("\r\n", "\n")
    assert not _BOXES.search(terminal.shown)
    assert "rules.txt" in terminal.shown
    if plain:
        assert not any(line.startswith(" ") for line in terminal.lines)
        assert "Agent: " in terminal.shown
        assert "Reply 1." in terminal.shown
    else:
        assert max(map(len, terminal.lines)) <= 80
    with stored(engrain_home) as store:
        assert sorted(bool(episode.knowledge) for episode in store.episodes()) == [False, True]


def test_a_connection_that_breaks_keeps_the_game(engrain_home: Path) -> None:
    terminal = Terminal("math", "--human", "-n", "2", "--seed", "4")
    terminal.until("you> ")
    terminal.type("12\r")
    terminal.until("you> ")
    os.close(terminal.master)  # the terminal is gone, as when ssh loses its line
    assert terminal.process.wait(60) != 0
    with stored(engrain_home) as store:
        assert len(store.episodes()) == 1


def _rules(folder: Path) -> Path:
    path = folder.parent / "rules.txt"
    path.write_text("Rules:\n- Say [down].\n- Be brief.\n")
    return path


def test_watching_can_be_left_too(engrain_home: Path, tiny_folder: Path) -> None:
    terminal = Terminal("math", "-m", str(tiny_folder), "-n", "60", "--max-tokens", "4")
    terminal.until("stored as")
    terminal.interrupt()
    assert terminal.end() == 130
    assert "Traceback" not in terminal.shown
    with stored(engrain_home) as store:
        assert store.counts()["episode"] >= 1
