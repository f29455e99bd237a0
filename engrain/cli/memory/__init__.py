"""`engrain memory`: look into the store, correct it, move it, check it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Self

import typer

from engrain.cli.common import JsonOption, StoreOption
from engrain.cli.memory import episodes, items, knowledge, origins, rounds, upkeep
from engrain.cli.memory.view import clean, effect, fields, opened, print_json, screen, short, table, time
from engrain.curve import RoundScores, gather
from engrain.terminal import count
from memory.records import CheckpointRecord, Event, ItemSummary
from memory.store import Store
from memory.tallies import Tally

app = typer.Typer(help="What was remembered: an overview, and every part of it.")
app.add_typer(episodes.app, name="episodes")
app.add_typer(items.app, name="items")
app.add_typer(knowledge.app, name="knowledge")
app.add_typer(rounds.app, name="rounds")
app.command("lineage")(origins.lineage)
app.command("blame")(origins.blame)
app.command("stats")(upkeep.stats)
app.command("export")(upkeep.export)
app.command("import")(upkeep.import_)
app.command("forget")(upkeep.forget)
app.command("verify")(upkeep.verify)

_ROUNDS, _ITEMS, _EVENTS = 20, 5, 5


@dataclass(frozen=True)
class Survey:
    """What the overview shows."""

    url: str
    size: int  # bytes
    tallies: list[Tally]
    counts: dict[str, int]
    statuses: dict[str, int]
    best: list[ItemSummary]
    scores: list[RoundScores]
    events: list[Event]
    current: list[CheckpointRecord]  # what each model plays with

    @classmethod
    def of(cls, memory: Store) -> Self:
        """Read it from a store."""
        return cls(
            url=memory.url,
            size=memory.size(),
            tallies=memory.tallies(),
            counts=memory.counts(),
            statuses=memory.item_statuses(),
            best=memory.item_rows(status="active", by="support", limit=_ITEMS),
            scores=gather(memory, memory.rounds(limit=_ROUNDS)),
            events=memory.events(limit=_EVENTS),
            current=memory.current_checkpoints(),
        )

    def plain(self) -> dict[str, Any]:
        """The same for a program."""
        return {
            "store": self.url,
            "bytes": self.size,
            "counts": self.counts,
            "episodes": self.tallies,
            "items": {"statuses": self.statuses, "first": self.best},
            "rounds": [{"number": s.round.number, "status": s.round.status, **s.plain()} for s in self.scores],
            "checkpoints": {record.model: record.id for record in self.current},
            "events": self.events,
        }


@app.callback(invoke_without_command=True)
def overview(ctx: typer.Context, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """What the store holds, on one screen; the commands below show each part."""
    if ctx.invoked_subcommand is not None:
        if store is not None:  # `engrain memory --store X items` means `engrain memory items --store X`
            before = os.environ.get("ENGRAIN_STORE")
            os.environ["ENGRAIN_STORE"] = store
            ctx.call_on_close(lambda: _set_back(before))
        return
    with opened(store) as memory:
        found = Survey.of(memory)
    if as_json:
        print_json(found.plain())
    else:
        _show(found)


def _show(found: Survey) -> None:
    console = screen()
    fields(console, [("store", f"{found.url}, {found.size / 2**20:.1f} MiB")])
    lines = ((t.env, t.split, f"{t.episodes:,}", f"{t.solved / t.episodes:.0%}", f"{t.turns:,}") for t in found.tallies)
    columns = ("env", "split", "episodes", "solved", "turns")
    console.print(table(columns, lines, "no episodes yet: `engrain play` or `engrain improve` makes some"))
    statuses = ", ".join(f"{n} {status}" for status, n in found.statuses.items())
    fields(console, [("items", statuses), ("knowledge versions", found.counts["knowledge"] or "")])
    for row in found.best:
        detail = count(row.support, "episode") + (f", effect {effect(row)}" if row.effect is not None else "")
        console.print(f"  {clean(row.text)} [dim]{clean(short(row.id))}, {detail}[/dim]", highlight=False)
    number = found.counts["round"]
    fields(console, [("rounds", f"{number}  {rounds.curve_line(found.scores)}" if number else "")])
    rounds.print_rounds(console, found.scores)
    for record in found.current:
        fields(console, [("plays now", f"{record.model} with checkpoint {record.id}")])
    if found.events:
        changes = ((time(e.at), e.who, f"{e.kind} {short(e.subject)}", e.action) for e in found.events)
        console.print(table(("when", "who", "what", "change"), changes, ""))


def _set_back(store: str | None) -> None:
    if store is None:
        os.environ.pop("ENGRAIN_STORE", None)
    else:
        os.environ["ENGRAIN_STORE"] = store
