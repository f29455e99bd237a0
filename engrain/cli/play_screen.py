"""What a game looks like: labelled text without boxes, or one fact a line for a screen reader.

Nothing is ever drawn twice or moved, so it works over ssh, on a dumb terminal, in a pipe and on paper. Colour only
repeats what the words say.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from agent.episode import Episode, StopReason, Turn
from engrain.cli.common import printable
from engrain.match import Match, human_turns
from engrain.terminal import count
from envs.base import Observation, Split, Step, Task

#: Colour by who speaks.
STYLES = {"rules": "dim", "world": "cyan", "feedback": "yellow", "agent": "green", "you": "magenta"}
_LABEL = 8  # width of "feedback"
_NARROWEST, _WIDEST = 30, 110  # narrower than that is no terminal, longer lines are hard to read

_ENDED = {
    StopReason.MAX_TURNS: "no turns are left",
    StopReason.LENGTH: "no room for more text",
    StopReason.ERROR: "broke off",
    StopReason.INTERRUPTED: "left unfinished",
}


class Screen(ABC):
    """Shows games. An `engrain.play.Watcher`.

    Args:
        console: where to.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.quiet = console.quiet
        self.explained = False  # the legend of the colours was shown
        self.seated = False  # somebody is at the keyboard, and sees what is chosen there
        self.told = False  # replies are shown as soon as they are chosen

    # -- what the styles differ in ----------------------------------------------------------------------------------

    @abstractmethod
    def say(self, who: str, text: str, note: str = "") -> None:
        """Somebody's words, and a remark about them."""

    @abstractmethod
    def facts(self, *facts: str, style: str = "") -> None:
        """Short facts that belong together."""

    @abstractmethod
    def heading(self, text: str) -> None:
        """What follows is about this."""

    @abstractmethod
    def entries(self, rows: Sequence[tuple[str, str]]) -> None:
        """Short keys, each with a text."""

    @abstractmethod
    def possible(self, choices: Sequence[str]) -> None:
        """What may be said, where nobody has to choose."""

    @abstractmethod
    def numbered(self, choices: Sequence[str]) -> None:
        """What may be said, with the numbers that stand for it."""

    def gap(self) -> None:  # noqa: B027 - nothing in plain mode
        """What follows is something new."""

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """A time in which `what` is done."""
        yield

    # -- a game -----------------------------------------------------------------------------------------------------

    def opening(self, task: Task, seed: int, player: str) -> None:
        """A game is about to begin."""
        self.heading(f"{task.env}: {player}")
        self.facts(f"{task.split.value} task {task.id[-8:]}", f"seed {seed}", style="dim")

    def begun(self, match: Match) -> None:
        """The world has spoken first."""
        if match.system:
            self.say("rules", match.system)
        self._turn(match)
        self.heard(match.observation)

    def moved(self, match: Match, turn: Turn, step: Step, seconds: float, human: bool) -> None:
        """A reply was given and answered."""
        if not self.seated and not self.told:
            self.thought(turn.action, seconds, turn.end - turn.start)
        if match.ended is None:
            self._turn(match)
        self.heard(step.observation, last=match.ended is not None)

    def heard(self, observation: Observation, *, last: bool = False) -> None:
        """The world's words; a list of actions at their end is drawn closer, or left to the keyboard's numbers."""
        text, choices = apart(observation)
        self.say("world", text)
        if choices and not self.seated and not last:
            self.possible(choices)

    def replied(self, who: str, text: str, note: str = "") -> None:
        """A reply as it went to the world."""
        self.say(who, text or "(nothing)", note)

    def thought(self, text: str, seconds: float, tokens: int) -> None:
        """The agent's reply, and what it took."""
        self.replied("agent", text, f"{seconds:.1f} s, {count(tokens, 'token')}")

    def over(self, episode: Episode, new: bool) -> None:
        """The game is over and its episode stored; `new` says whether it was not there yet."""
        self.say("feedback", episode.feedback)
        if episode.error:
            self.say("error", f"{episode.stop_reason.value}: {episode.error}")
        self.outcome(episode)
        self.facts(*_kept(episode, new), style="dim")

    def outcome(self, episode: Episode) -> None:
        """How it ended, in one line."""
        verdict = "solved" if episode.success else "not solved"
        ended = _ENDED.get(episode.stop_reason)
        by_hand = sum(human_turns(episode))
        yours = f" ({by_hand} yours)" if by_hand and by_hand < len(episode.turns) else ""
        self.facts(
            *([verdict] if ended is None else [verdict, ended]),
            f"score {episode.score:.2f}",
            count(len(episode.turns), "turn") + yours,
            f"{episode.seconds:.1f} s",
            style="bold green" if episode.success else "bold red",
        )

    def _turn(self, match: Match) -> None:
        if match.max_turns > 1:
            self.gap()
            self.facts(f"turn {len(match.turns) + 1} of {match.max_turns}", style="dim")


class Labelled(Screen):
    """Labels in a narrow column, the words beside them."""

    @property
    def width(self) -> int:
        """Columns that are written in."""
        return max(_NARROWEST, min(self.console.width, _WIDEST))

    def say(self, who: str, text: str, note: str = "") -> None:
        """Somebody's words beside their label."""
        if text:
            self.beside(who, Text(printable(text)))
            if note:
                self.beside("", Text(note, style="dim"))

    def beside(self, label: str, what: Text) -> None:
        """Anything beside a label."""
        self.columns([(Text(label, f"bold {STYLES.get(label, '')}"), _LABEL), (what, self.width - _LABEL - 2)])

    def columns(self, cells: Sequence[tuple[Text, int]], between: int = 1) -> None:
        """Texts beside each other, each wrapped to its width; no spaces at the ends of lines."""
        wrapped = [(list(text.wrap(self.console, width, overflow="fold")), width) for text, width in cells]
        for number in range(max(len(lines) for lines, _ in wrapped)):
            row = Text()
            for lines, width in wrapped:
                cell = lines[number].copy() if number < len(lines) else Text()
                cell.rstrip()
                row.append_text(cell)
                row.append(" " * (width - cell.cell_len + between))
            row.rstrip()
            self.console.print(row, soft_wrap=True)

    def facts(self, *facts: str, style: str = "") -> None:
        """One line, separated by commas."""
        self.beside("", Text(", ".join(map(printable, facts)), style=style))

    def gap(self) -> None:
        """An empty line."""
        self.console.print()

    def heading(self, text: str) -> None:
        """A bold line after an empty one."""
        self.gap()
        self.columns([(Text(printable(text), style="bold"), self.width - 1)])

    def entries(self, rows: Sequence[tuple[str, str]]) -> None:
        """Keys right-aligned before their texts."""
        wide = max([_LABEL, *(len(key) for key, _ in rows)])
        for key, text in rows:
            key = f"{printable(key):>{wide}}"
            self.columns([(Text(key, style="bold"), wide), (Text(printable(text)), self.width - wide - 2)])

    def possible(self, choices: Sequence[str]) -> None:
        """One after another."""
        self.beside("", Text("possible: " + ", ".join(map(printable, choices)), style="dim"))

    def numbered(self, choices: Sequence[str]) -> None:
        """In as many columns as fit, read downwards."""
        cells = [f"{place:>2} {printable(choice)}" for place, choice in enumerate(choices, 1)]
        for across in range(len(cells), 0, -1):
            down = -(-len(cells) // across)
            wide = [max(map(cell_len, cells[start : start + down])) for start in range(0, len(cells), down)]
            if sum(wide) + 2 * (len(wide) - 1) <= self.width - _LABEL - 2:
                break
        for row in range(down):
            line = (cell + " " * (width - cell_len(cell)) for cell, width in zip(cells[row::down], wide, strict=False))
            self.beside("", Text("  ".join(line).rstrip()))

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """A spinner, where the terminal can draw one and it disturbs nobody."""
        if self.quiet or not self.console.is_terminal or self.console.is_dumb_terminal:
            yield
            return
        with self.console.status(f"{what} ...", spinner="line"):
            yield


class Plain(Screen):
    """One fact a line, in whole sentences where it is short: for screen readers, and for logs."""

    def say(self, who: str, text: str, note: str = "") -> None:
        """`Who: words`, empty lines left out."""
        lines = [line.strip() for line in printable(text).splitlines() if line.strip()]
        for number, line in enumerate(lines):
            self._line(line if number else f"{who.capitalize()}: {line}")
        if note and lines:
            self.facts(*note.split(", "))

    def facts(self, *facts: str, style: str = "") -> None:
        """A sentence each."""
        for fact in facts:
            self._line(f"{printable(fact)[:1].upper()}{printable(fact)[1:]}.")

    def heading(self, text: str) -> None:
        """A sentence."""
        self.facts(text)

    def entries(self, rows: Sequence[tuple[str, str]]) -> None:
        """`key: text`."""
        for key, text in rows:
            self._line(f"{printable(key)}: {' '.join(printable(text).split())}")

    def possible(self, choices: Sequence[str]) -> None:
        """In one line."""
        self._line("Possible: " + ", ".join(map(printable, choices)) + ".")

    def numbered(self, choices: Sequence[str]) -> None:
        """`number: what`."""
        self.entries([(str(place), choice) for place, choice in enumerate(choices, 1)])

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def apart(observation: Observation) -> tuple[str, tuple[str, ...]]:
    """What the world said, without the list of admissible actions that it may end in, and that list."""
    lines, choices = observation.text.rstrip().splitlines(), observation.admissible or ()
    if not choices or [line.strip() for line in lines[-len(choices) :]] != list(choices):
        return observation.text, ()
    lines = lines[: -len(choices)]
    heading = bool(lines) and lines[-1].rstrip().endswith(":")
    return "\n".join(lines[:-1] if heading else lines).rstrip(), choices


def _kept(episode: Episode, new: bool) -> list[str]:
    """Where the episode is, and whether a round will learn from it."""
    name = f"stored as {episode.id[:10]}" if new else f"stored before as {episode.id[:10]}"
    if episode.task.split is not Split.TRAIN:
        return [name, f"a {episode.task.split.value} task, which no round learns from"]
    if episode.stop_reason is StopReason.INTERRUPTED:
        return [name, "unfinished"]
    return [name, "for the next round to learn from"]
