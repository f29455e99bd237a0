"""`engrain memory items`: single lines of experience, their evidence, and what a person may change about them."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console

from engrain.cli.common import JsonOption, StoreOption
from engrain.cli.memory.view import (
    LimitOption,
    ListByDefault,
    OffsetOption,
    WhoOption,
    WhyOption,
    effect,
    fields,
    find_item,
    id_argument,
    opened,
    paged,
    print_json,
    short,
    table,
    time,
)
from envs.errors import UsageError
from memory.records import Item, ItemStatus

app = typer.Typer(cls=ListByDefault, help="Single lines of experience and where they came from.")

ItemArgument = Annotated[str, id_argument("item")]


class Order(StrEnum):
    """What comes first in a listing."""

    SUPPORT = "support"
    EFFECT = "effect"
    LATEST = "latest"


@app.command("list")
def list_items(
    store: StoreOption = None,
    status: Annotated[
        str | None, typer.Option(help="Only active, quarantined, retired, absorbed or harmful ones.")
    ] = None,
    flag: Annotated[str | None, typer.Option(help="Only those with this mark, such as instance-bound.")] = None,
    search: Annotated[str | None, typer.Option("--search", "-s", help="Only those that hold these words.")] = None,
    by: Annotated[Order, typer.Option(help="Most episodes, best effect or latest learned first.")] = Order.SUPPORT,
    limit: LimitOption = 50,
    offset: OffsetOption = 0,
    as_json: JsonOption = False,
) -> None:
    """List items, those that most episodes taught first."""
    if status is not None and status not in [s.value for s in ItemStatus]:
        raise UsageError(f"no item status {status!r}; use {', '.join(s.value for s in ItemStatus)}")
    with opened(store) as memory:
        rows = memory.item_rows(status=status, flag=flag, search=search, by=by.value, limit=limit, offset=offset)
    if as_json:
        print_json(rows)
        return
    columns = ("id", "item", "status", "episodes", "effect", "marks", "last learned")
    lines = (
        (short(r.id), r.text, r.status.value, r.support, effect(r), " ".join(r.flags), time(r.last_seen)) for r in rows
    )
    with paged() as console:
        console.print(table(columns, lines, "no items"))
        if len(rows) == limit:
            console.print(f"[dim]more: --offset {offset + limit}[/dim]", highlight=False)


@app.command("search")
def search_items(
    words: Annotated[str, typer.Argument(help="What the item's text holds, in any case.")],
    store: StoreOption = None,
    limit: LimitOption = 50,
    as_json: JsonOption = False,
) -> None:
    """List items that hold these words."""
    list_items(store=store, search=words, limit=limit, as_json=as_json)


@app.command("show")
def show_item(id_: ItemArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show one item with its source episodes, its effect and its history."""
    with opened(store) as memory:
        item = memory.item(find_item(memory, id_))
        events = memory.events(subject=item.id)
        effects = memory.effects(item_id=item.id)
        versions = memory.knowledge_holding(item.id)
    if as_json:
        print_json(
            {
                **item.model_dump(mode="json"),
                "support": item.support,
                "effects": effects,
                "knowledge": [{"id": id_, "version": version} for id_, version in versions],
                "events": events,
            }
        )
        return
    with paged() as console:
        fields(
            console,
            [
                ("item", item.id),
                ("text", item.text),
                ("status", item.status.value),
                ("episodes", item.support),
                ("effect", effect(item)),
                ("marks", ", ".join(f"{f.flag} {short(f.other)} {f.note}".strip() for f in item.flags)),
                ("reworded from", item.derived_from),
                ("in knowledge versions", ", ".join(str(version) for _, version in versions)),
            ],
        )
        _evidence(console, item)
        if effects:
            lines = (
                (time(e.created_at), e.method, f"{e.env} {e.split}", effect(e), e.n, short(e.knowledge))
                for e in effects
            )
            columns = ("when", "measured by", "env", "effect", "n", "within")
            console.print(table(columns, lines, ""))
        history = ((time(e.at), e.who, e.action, e.why) for e in events)
        console.print(table(("when", "who", "what", "why"), history, "no events"))


def _evidence(console: Console, item: Item) -> None:
    lines = (
        (short(s.episode_id), short(s.extraction_id), s.text, "yes" if s.recalled else "", time(s.created_at))
        for s in item.sources
    )
    columns = ("episode", "extraction", "wording", "recalled", "when")
    console.print(table(columns, lines, "no sources: given by hand"))


@app.command("edit")
def edit_item(
    id_: ItemArgument,
    text: Annotated[str | None, typer.Option(help="The new wording; without it you are asked.")] = None,
    who: WhoOption = "someone",
    why: WhyOption = "edited by hand",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put another wording in an item's place. It keeps the sources; the old one is retired and can be restored."""
    with opened(store) as memory:
        old = memory.item(find_item(memory, id_))
        wording = text if text is not None else typer.prompt("new wording", default=old.text)
        wording = " ".join(str(wording).split())
        if not wording or wording == old.text:
            raise UsageError(f"item {short(old.id)} is unchanged: the new wording is empty or the same")
        item = memory.reword_item(old.id, wording, who, why)
    _changed(item, f"item {short(item.id)} now stands in place of {short(old.id)}", as_json)


@app.command("retire")
def retire_item(
    id_: ItemArgument,
    who: WhoOption = "someone",
    why: WhyOption = "retired by hand",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Keep an item out of all knowledge from now on."""
    _set_status(id_, ItemStatus.RETIRED, who, why, store, as_json)


@app.command("restore")
def restore_item(
    id_: ItemArgument,
    who: WhoOption = "someone",
    why: WhyOption = "restored by hand",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let an item back into knowledge, whatever took it out."""
    _set_status(id_, ItemStatus.ACTIVE, who, why, store, as_json)


def _set_status(id_: str, status: ItemStatus, who: str, why: str, store: str | None, as_json: bool) -> None:
    with opened(store) as memory:
        item = memory.set_item_status(find_item(memory, id_), status, who, why)
    _changed(item, f"item {short(item.id)} is {item.status.value}", as_json)


def _changed(item: Item, said: str, as_json: bool) -> None:
    if as_json:
        print_json(item)
    else:
        Console().print(said, markup=False, highlight=False)
