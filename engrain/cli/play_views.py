"""Views of finished games: the teacher-student gap of each token, what each item did, and several arms side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from agent.episode import Episode
from engrain.cli.common import printable
from engrain.cli.play_screen import Labelled, Screen
from engrain.compare import parting
from engrain.influence import Influence
from engrain.play import solved
from engrain.terminal import count
from engrain.tokengap import ReplyGap, TokenGap

#: Nats from which a gap is shown, and from which it is shown as large (a factor of 1.6, and of 7.4).
SOME, MUCH = 0.5, 2.0
_STYLES = {2: "bold reverse cyan", 1: "cyan", 0: "", -1: "red", -2: "bold reverse red"}
_MARKS = {2: "#", 1: "+", 0: " ", -1: "-", -2: "="}
_SHOWN = 5  # tokens, or items, that are named with their numbers
_NARROWEST = 30  # columns of one arm side by side


def show_gap(screen: Screen, replies: Sequence[ReplyGap], teacher: str, who: str, *, headed: bool = True) -> None:
    """The gap of these replies: colour or marks where the terminal has it, and the largest as numbers always."""
    if headed:
        screen.heading(f"{who}, token by token: log p with {teacher} minus log p without")
    for reply in replies:
        name = f"reply {reply.turn}"
        if isinstance(screen, Labelled):
            screen.beside(name, painted(reply, screen.console, screen.width - 10))
        screen.facts(
            *([] if isinstance(screen, Labelled) else [name]),
            f"{reply.total:+.2f} nats over {count(len(reply.tokens), 'token')}",
            f"{reply.mean:+.2f} a token",
            style="bold",
        )
        largest = [token for token in reply.largest(_SHOWN) if abs(token.gap) >= SOME]
        wide = max((len(shown(token)) for token in largest), default=0)
        aligned = wide if isinstance(screen, Labelled) else None
        screen.entries([(f"{token.gap:+.2f}", _change(token, aligned)) for token in largest])
        if not largest:
            screen.facts(f"no token changes by {SOME} nats or more", style="dim")
    if isinstance(screen, Labelled) and not screen.explained:
        screen.explained = True
        names = ("cyan", "reversed", "red", "reversed") if has_colour(screen.console) else "+#-="
        legend = "{} likelier with it, {} much; {} less likely, {} much"
        screen.facts(f"{legend.format(*names)} ({SOME:g} and {MUCH:g} nats)", style="dim")


def painted(reply: ReplyGap, console: Console, width: int) -> Text:
    """The reply with each token in the colour of its gap, or with a line of marks under each of its lines."""
    cells = [(char, level(token.gap)) for token in reply.tokens for char in visible(token)]
    colour = has_colour(console)
    painted = Text(overflow="fold")
    for number, line in enumerate(_lines(cells, width)):
        painted.append("\n" if number else "")
        for strength, run in groupby(line, key=itemgetter(1)):
            painted.append("".join(char for char, _ in run), _STYLES[strength] if colour else "")
        marks = "".join(_MARKS[strength] * cell_len(char) for char, strength in line).rstrip()
        if marks and not colour:
            painted.append(f"\n{marks}")
    return painted


def has_colour(console: Console) -> bool:
    """Whether colours are seen: not in a pipe, on a dumb terminal, or where NO_COLOR is set."""
    return console.color_system is not None and not console.no_color


def level(gap: float) -> int:
    """-2 to 2: how strongly the knowledge speaks for a token."""
    size = (abs(gap) >= SOME) + (abs(gap) >= MUCH)
    return size if gap > 0 else -size


def visible(token: TokenGap) -> str:
    """A token's text in the reply, line ends as \\n so that they can be seen where they matter."""
    text = printable(token.text).replace("\t", "    ")
    if level(token.gap):
        text = text.replace("\n", "\\n\n")
    return text


def shown(token: TokenGap) -> str:
    """A token by itself: spaces at its ends as _, other invisible characters by their escapes."""
    return _spaced(repr(token.text)[1:-1]) if token.text else "(part of a character)"


def _spaced(text: str) -> str:
    """With spaces at its ends seen."""
    inner = text.strip(" ")
    if not inner:
        return "_" * len(text)
    start = len(text) - len(text.lstrip(" "))
    return "_" * start + inner + "_" * (len(text) - start - len(inner))


def _change(token: TokenGap, wide: int | None) -> str:
    """From which probability to which; None: to be heard."""
    before, after = _share(token.student), _share(token.teacher)
    return (
        f'"{shown(token)}", from {before} to {after}' if wide is None else f"{shown(token):{wide}}  {before} -> {after}"
    )


def _share(logprob: float) -> str:
    share = 100 * math.exp(logprob)
    return f"{share:.1f}%" if share >= 0.05 else "<0.1%"


def _lines(cells: Sequence[tuple[str, int]], width: int) -> Iterator[list[tuple[str, int]]]:
    """Broken at line ends and at the width, so that marks can stand under the characters."""
    line: list[tuple[str, int]] = []
    used = 0
    for char, strength in cells:
        if char == "\n" or used + cell_len(char) > width:
            yield line
            line, used = [], 0
        if char != "\n":
            line.append((char, strength))
            used += cell_len(char)
    if line:
        yield line


def show_influence(
    screen: Screen, found: Influence, knowledge: str, who: str, *, since: int = 0, headed: bool = True
) -> None:
    """For each reply, from the place `since` on, the items that moved it most."""
    if headed:
        screen.heading(f"{who}, item by item: log p with {knowledge} minus log p without the item")
        beyond = f" of {len(found.items) + found.untried}" if found.untried else ""
        tried = f"the first {len(found.items)}{beyond} items" if beyond else count(len(found.items), "item")
        screen.facts(f"{tried} left out in turn", count(found.forwards, "forward"), style="dim")
    for place, turn in list(enumerate(found.turns))[since:]:
        screen.facts(f"reply {turn}", f"log p with all {found.logprobs[place]:.2f}", style="bold")
        moved = found.of(place)
        screen.entries([(f"{change:+.2f}", item.text) for item, change in moved[:_SHOWN]])
        if rest := moved[_SHOWN:]:
            screen.facts(f"{count(len(rest), 'more item')} of {abs(rest[0][1]):.2f} or less", style="dim")


def show_comparison(screen: Screen, played: Sequence[tuple[str, Episode]]) -> None:
    """The arms' games: one column each where there is room, else one after another."""
    episodes = [episode for _, episode in played]
    single = max((len(e.turns) for e in episodes), default=0) <= 1
    if isinstance(screen, Labelled) and screen.console.width >= (_NARROWEST + 2) * len(played):
        _side_by_side(screen, played)
    else:
        for name, episode in played:
            _alone(screen, name, episode, single)
    screen.gap()
    apart = parting(episodes)
    if len(played) > 1 and apart is None:
        screen.facts("all said the same", style="dim")
    elif apart is not None and not single:
        screen.facts(f"they part at turn {apart + 1}", style="dim")
    screen.facts("stored as " + ", ".join(episode.id[:10] for episode in episodes), style="dim")


def _alone(screen: Screen, name: str, episode: Episode, single: bool) -> None:
    screen.heading(name)
    for number, turn in enumerate(episode.turns):
        if not single:
            screen.facts(f"turn {number + 1}", style="dim")
        screen.replied("agent", turn.action)
        screen.say("world", answer(episode, number))
    screen.say("feedback", episode.feedback)
    if episode.error:
        screen.say("error", episode.error)
    screen.outcome(episode)


def answer(episode: Episode, number: int) -> str:
    """What the world said to a turn's reply."""
    if number + 1 < len(episode.turns):
        return episode.turns[number + 1].observation
    last = episode.messages[-1]
    return last.content if last.role == "user" and episode.turns else ""


def _side_by_side(screen: Labelled, played: Sequence[tuple[str, Episode]]) -> None:
    width = screen.console.width // len(played) - 2

    def row(cells: Iterable[Text]) -> None:
        screen.columns([(cell, width) for cell in cells], between=2)

    screen.console.print()
    row(Text(name, style="bold underline") for name, _ in played)
    for number in range(max((len(episode.turns) for _, episode in played), default=0)):
        cells = []
        for _, episode in played:
            cell = Text()
            if number < len(episode.turns):
                cell.append(printable(episode.turns[number].action) or "(nothing)", style="green")
                if said := answer(episode, number):
                    cell.append("\n" + printable(said), style="dim")
            cells.append(cell)
        row(cells)
    screen.gap()
    row(Text(printable(episode.error or episode.feedback), style="yellow") for _, episode in played)
    row(
        Text(
            f"{'solved' if e.success else 'not solved'}, score {e.score:.2f}, "
            f"{count(len(e.turns), 'turn')}, {e.seconds:.1f} s",
            style="bold green" if e.success else "bold red",
        )
        for _, e in played
    )


def show_totals(screen: Screen, played: Sequence[Sequence[tuple[str, Episode]]]) -> None:
    """Over several tasks, how many each arm solved."""
    if len(played) < 2:
        return
    screen.heading(f"solved of {len(played)} tasks")
    names = [name for name, _ in played[0]]
    screen.entries([(str(solved([arms[i][1] for arms in played])), name) for i, name in enumerate(names)])
    screen.facts("a measurement with its interval is `engrain eval`'s", style="dim")
