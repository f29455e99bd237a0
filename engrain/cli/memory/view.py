"""How `engrain memory` shows things: tables, pages and JSON, and how the ids that people type become whole ones."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from engrain.cli.common import by_number, open_store, printable
from memory.errors import UnknownIdError
from memory.records import Item, ItemEffect, ItemSummary
from memory.store import Kind, Store


class ListByDefault(TyperGroup):
    """`engrain memory items --json` is `engrain memory items list --json`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `list` where no subcommand stands."""
        if not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names):
            args = ["list", *args]
        return super().parse_args(ctx, args)


def completed(kind: Kind) -> Callable[[typer.Context, str], list[str]]:
    """Shell completion of the ids of one kind; silent where there is no store."""

    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        try:
            with open_store(ctx.params.get("store"), create=False) as store:
                return store.ids(kind, incomplete, 30)
        except Exception:  # whatever is wrong, a shell that completes must not print it
            return []

    return complete


def id_argument(kind: Kind, metavar: str = "ID") -> Any:
    """The argument that names one thing."""
    number = ", or a number" if kind in ("knowledge", "round") else ""
    help_ = f"Id of the {kind}, or the beginning of one{number}."
    return typer.Argument(metavar=metavar, help=help_, autocompletion=completed(kind))


LimitOption = Annotated[int, typer.Option("--limit", "-n", min=1, max=2**31 - 1, help="Show at most this many.")]
OffsetOption = Annotated[
    int, typer.Option("--offset", min=0, max=2**31 - 1, help="Leave out this many from the front.")
]
WhoOption = Annotated[str, typer.Option("--who", envvar="USER", help="Who changes it; stands in the history.")]
WhyOption = Annotated[str, typer.Option("--why", help="The reason; stands in the history.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def opened(store: str | None) -> Store:
    """A store that exists already."""
    return open_store(store, create=False)


def print_json(data: BaseModel | Sequence[BaseModel] | Sequence[dict[str, Any]] | dict[str, Any]) -> None:
    """Records, or plain values that hold records, as indented JSON on standard output."""
    typer.echo(json.dumps(data, indent=2, default=lambda value: value.model_dump(mode="json")))


def clean(value: object) -> str:
    """Foreign text without what a terminal or rich's markup would obey."""
    return escape(printable(value))


WIDE = frozenset({"item", "text", "wording", "why", "verdict", "path", "problem"})  # may take several lines
ELASTIC = frozenset({"env", "model", "started", "created", "when", "last learned", "marks"})  # may be cut short
_LEAST = {"elastic": 10, "effect": 14, "wide": 24}  # characters that they keep, in the order in which they get more
_GAP, _EDGES = 3, 2  # characters between columns, and on both sides of a table
_PIPE = 160  # characters a line where there is no screen


def short(id_: str | None) -> str:
    """The beginning of an id, as much as tells ids apart in practice; every command takes it."""
    return (id_ or "")[:10]


def time(value: datetime | None) -> str:
    """A time to the minute."""
    return f"{value:%Y-%m-%d %H:%M}" if value else ""


def effect(row: Item | ItemSummary | ItemEffect) -> str:
    """A measured effect on accuracy with its 95% interval; "" for an item without one."""
    if row.effect is None:
        return ""
    low, high = (row.low, row.high) if isinstance(row, ItemEffect) else (row.effect_low, row.effect_high)
    return f"{row.effect:+z.2f} ({low:+z.2f} to {high:+z.2f})"


def screen() -> Console:
    """Where output goes; what is no screen, such as a pipe, takes long lines."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=_PIPE)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], empty: str) -> Table | str:
    """Rows under their names, as wide as the screen.

    What may neither fold nor be cut short keeps its width. Where a screen is too narrow even so, columns without any
    value are left out, then those that may be cut short, the last one first.
    """
    cells = [[printable("" if cell is None else cell) for cell in row] for row in rows]
    if not cells:
        return empty
    places = range(len(columns))
    longest = [max(cell_len(line) for row in [columns, *cells] for line in row[n].split("\n")) for n in places]
    least = [min(size, _LEAST.get(_kind(column), size)) for column, size in zip(columns, longest, strict=True)]
    width = screen().width - _EDGES
    blank = [n for n in places if not any(row[n] for row in cells)]
    spare = [n for n in reversed(places) if _kind(columns[n]) == "elastic"]
    shown = list(places)
    for n in dict.fromkeys([*blank, *spare]):
        if sum(least[n] + _GAP for n in shown) - _GAP > width:
            shown.remove(n)
    left = max(0, width - sum(least[n] + _GAP for n in shown) + _GAP)
    view = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    sizes = {}
    for n in sorted(shown, key=lambda n: [*_LEAST, "fixed"].index(_kind(columns[n]))):
        sizes[n] = least[n] + min(left, longest[n] - least[n])
        left -= sizes[n] - least[n]
    for n in shown:
        folds = _kind(columns[n]) in ("effect", "wide")
        view.add_column(columns[n], overflow="fold" if folds else "ellipsis", no_wrap=not folds, width=sizes[n])
    for row in cells:
        view.add_row(*(escape(row[n]) for n in shown))
    return view


def _kind(column: str) -> str:
    return "wide" if column in WIDE else "elastic" if column in ELASTIC else "effect" if column == "effect" else "fixed"


def fields(console: Console, pairs: Sequence[tuple[str, object]]) -> None:
    """One line a name and value; empty values are left out."""
    for name, value in pairs:
        if value not in (None, "", ()):
            console.print(f"[bold]{name}[/bold]  {clean(value)}", highlight=False)


@contextmanager
def paged() -> Iterator[Console]:
    """A console whose output goes through the pager when it does not fit a person's screen."""
    console = screen()
    if not console.is_terminal:
        yield console
        return
    with console.capture() as capture:
        yield console
    text = capture.get()
    if text.count("\n") >= console.height:
        with console.pager(styles=True):
            console.out(text, highlight=False, end="")
    else:
        console.out(text, highlight=False, end="")


def knowledge_id(store: Store, given: str) -> str:
    """The id behind a version number or the beginning of an id."""
    return by_number(store.knowledge_versions(), "version", given) or store.full_id("knowledge", given)


def round_id(store: Store, given: str) -> str:
    """The id behind a round's number or the beginning of an id."""
    return by_number(store.rounds(), "number", given) or store.full_id("round", given)


def find_item(store: Store, given: str) -> str:
    """The id behind the beginning of one, or behind words that only one item holds."""
    try:
        return store.full_id("item", given)
    except UnknownIdError:
        found = store.item_rows(search=given, limit=4) if len(given) > 2 else []
        if len(found) == 1:
            return found[0].id
        if found:
            ids = ", ".join(short(row.id) for row in found)
            raise UnknownIdError(f"{given!r} stands in several items: {ids}; name one by its id") from None
        raise
