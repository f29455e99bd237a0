"""What a person types: replies, numbers of listed actions, and commands that begin with a slash."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from engrain.cli.play_screen import Screen
from engrain.match import Match
from engrain.play import LeftError

_COMMANDS = {
    "/help": "this list",
    "/rules": "the world's instructions",
    "/look": "what the world said last",
    "/actions": "the numbered actions again",
    "/quit": "leave; what was played is kept",
}


class Keyboard:
    """Reads lines from standard input.

    Args:
        screen: answers to commands are shown there.
        editing: whether the line may be edited with the arrow keys, which moves the cursor.
    """

    def __init__(self, screen: Screen, *, editing: bool) -> None:
        self.screen = screen
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # what is no text is an answer like any other
        self._read: Callable[[str], str] = _read_plainly
        if editing and sys.stdin.isatty() and os.environ.get("TERM") != "dumb":
            with suppress(ImportError):  # not on every system
                import readline  # noqa: F401 - `input` edits with it once it is there

                self._read = input

    def reply(self, match: Match, suggestion: str | None = None) -> str | None:
        """A person's next reply; None takes the suggestion.

        Raises:
            LeftError: the person leaves, or the input ends.
        """
        choices = match.observation.admissible or ()
        self._offer(choices)
        if suggestion is not None:
            self.screen.say("agent", suggestion or "(nothing)", "Enter takes it, or type your own")
        while True:
            typed = self.line("you> ")
            words = typed.strip()
            if words.startswith("//"):
                return words[1:]
            if words.startswith("/"):
                self._command(words, match, choices)
            elif not words and suggestion is not None:
                self.screen.facts("taken", style="dim")
                return None
            elif not words:
                self.screen.facts("type a reply and press Enter, or /help", style="dim")
            elif picked := _picked(words, choices):
                self.screen.replied("you", picked)
                return picked
            else:
                return typed

    def choose(self, question: str, options: Sequence[tuple[str, str]]) -> int:
        """The place of the option that is picked by number or name; the first one for Enter alone.

        Raises:
            LeftError: the person leaves, or the input ends.
        """
        self.screen.heading(question)
        self.screen.entries(
            [(f"{n}", f"{name}: {what}" if what else name) for n, (name, what) in enumerate(options, 1)]
        )
        names = [name for name, _ in options]
        while True:
            words = self.line(f"1-{len(names)}, Enter for 1> ").strip().lower()
            if not words:
                return 0
            if words in names:
                return names.index(words)
            if words.isdecimal() and 1 <= int(words) <= len(names):
                return int(words) - 1
            if words in ("/quit", "q", "quit"):
                raise LeftError
            self.screen.facts(f"{words!r} is none of them: type a number from 1 to {len(names)}", style="dim")

    def line(self, prompt: str) -> str:
        """One line.

        Raises:
            LeftError: the input ends, or the terminal is gone.
        """
        try:
            return self._read(prompt)
        except (EOFError, OSError) as error:
            print(flush=True)
            raise LeftError from error
        except KeyboardInterrupt:
            print(flush=True)
            raise

    def _offer(self, choices: Sequence[str]) -> None:
        if choices:
            self.screen.gap()
            self.screen.numbered(choices)

    def _command(self, words: str, match: Match, choices: Sequence[str]) -> None:
        match words.split()[0].lower():
            case "/quit" | "/q" | "/exit":
                raise LeftError
            case "/rules":
                self.screen.say("rules", match.system or "this world gives none")
            case "/look":
                self.screen.heard(match.observation)
            case "/actions":
                self._offer(choices)
                if not choices:
                    self.screen.facts("this world lists no actions", style="dim")
            case command:
                if command != "/help":
                    self.screen.facts(f"there is no {command}; a reply that begins so is written /{command}")
                self.screen.entries(list(_COMMANDS.items()))


def _picked(words: str, choices: Sequence[str]) -> str | None:
    """The action of that number, where actions are listed and none is itself called so."""
    if words.isdecimal() and words not in choices and 1 <= int(words) <= len(choices):
        return choices[int(words) - 1]
    return None


def _read_plainly(prompt: str) -> str:
    """A line as the terminal itself edits it: nothing but the prompt is written."""
    sys.stdout.write(prompt)
    sys.stdout.flush()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n").removesuffix("\r")
