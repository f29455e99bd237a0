"""`engrain memory`: look into the store, correct it, move it, check it."""

from __future__ import annotations

import os

import typer
from rich.console import Console

from engrain.cli.common import JsonOption, StoreOption
from engrain.cli.memory import episodes, items, knowledge, origins, rounds, upkeep
from engrain.cli.memory.view import clean, effect, fields, opened, print_json, short, table, time
from engrain.curve import gather

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
        url, size = memory.url, memory.size()
        tallies, counts, statuses = memory.tallies(), memory.counts(), memory.item_statuses()
        best = memory.item_rows(status="active", by="support", limit=_ITEMS)
        scores = gather(memory, memory.rounds(limit=_ROUNDS))
        events = memory.events(limit=_EVENTS)
        promoted = {c.model: memory.current_checkpoint(c.model) for c in memory.checkpoints()}
        current = {model: record.id for model, record in promoted.items() if record}
    if as_json:
        print_json(
            {
                "store": url,
                "bytes": size,
                "counts": counts,
                "episodes": tallies,
                "items": {"statuses": statuses, "first": best},
                "rounds": [{"number": row.round.number, "status": row.round.status, **row.plain()} for row in scores],
                "checkpoints": current,
                "events": events,
            }
        )
        return
    console = Console()
    fields(console, [("store", f"{url}, {size / 2**20:.1f} MiB")])
    lines = ((t.env, t.split, f"{t.episodes:,}", f"{t.solved / t.episodes:.0%}", f"{t.turns:,}") for t in tallies)
    columns = ("env", "split", "episodes", "solved", "turns")
    console.print(table(columns, lines, "no episodes yet: `engrain play` or `engrain improve` makes some"))
    found = ", ".join(f"{n} {status}" for status, n in statuses.items())
    fields(console, [("items", found), ("knowledge versions", counts["knowledge"] or "")])
    for row in best:
        detail = f"{row.support} episodes" + (f", effect {effect(row)}" if row.effect is not None else "")
        console.print(f"  {clean(row.text)} [dim]{clean(short(row.id))}, {detail}[/dim]", highlight=False)
    fields(console, [("rounds", f"{counts['round']}  {rounds.curve_line(scores)}" if counts["round"] else "")])
    rounds.print_rounds(console, scores)
    for model, checkpoint in current.items():
        fields(console, [("plays now", f"{model} with checkpoint {checkpoint}")])
    if events:
        changes = ((time(e.at), e.who, f"{e.kind} {short(e.subject)}", e.action) for e in events)
        console.print(table(("when", "who", "what", "change"), changes, ""))


def _set_back(store: str | None) -> None:
    if store is None:
        os.environ.pop("ENGRAIN_STORE", None)
    else:
        os.environ["ENGRAIN_STORE"] = store
