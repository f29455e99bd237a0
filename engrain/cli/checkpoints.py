"""`engrain checkpoints`: what training left on disk, and what of it may go."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engrain.cli.common import JsonOption, StoreOption, open_store, printable

app = typer.Typer(help="List checkpoints on disk and remove those that nothing needs.")

KEEP = 3
KeepOption = Annotated[
    int, typer.Option("--keep", min=0, help="How many checkpoints stay that nothing needs, newest first.")
]
BudgetOption = Annotated[
    str | None, typer.Option("--disk-budget", metavar="SIZE", help="Most disk for all of them, such as 50GB.")
]


@app.callback(invoke_without_command=True)
def _default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_(store=None, as_json=False)


@app.command("list")
def list_(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """All checkpoints that the store knows, newest last, and the disk they take."""
    from pathlib import Path

    with open_store(store, create=False) as memory:
        records = memory.checkpoints()
        current = {record.id for model in {r.model for r in records} if (record := memory.current_checkpoint(model))}
    rows = [
        {
            "id": record.id,
            "model": record.model,
            "status": record.status.value,
            "current": record.id in current,
            "parent": record.parent,
            "path": record.path,
            "on_disk": (Path(record.path) / "manifest.json").is_file(),
            "created_at": record.created_at.isoformat(),
        }
        for record in records
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("checkpoint", "model", "status", "parent", "made", "folder")
    for row in rows:
        status = f"{row['status']}, current" if row["current"] else row["status"]
        folder = row["path"] if row["on_disk"] else "removed"
        cells = (row["id"], row["model"], status, row["parent"] or "", str(row["created_at"])[:16], folder)
        table.add_row(*(escape(printable(cell)) for cell in cells))
    Console().print(table)


@app.command()
def prune(
    keep: KeepOption = KEEP,
    disk_budget: BudgetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove checkpoint folders that nothing needs.

    Promoted checkpoints, the current one, their ancestors and those of unfinished rounds always stay. What the store
    knows of a removed one stays too.
    """
    from engrain.forever import size
    from engrain.retention import plan, prune

    budget = size(disk_budget) if disk_budget is not None else None
    with open_store(store, create=False) as memory:
        retention = plan(memory, keep=keep, budget=budget)
        if not dry_run:
            prune(memory, retention)
    if as_json:
        facts = {
            **retention.model_dump(),
            "kept_bytes": retention.kept_bytes,
            "freed_bytes": retention.freed_bytes,
            "over_budget": retention.over_budget,
            "dry_run": dry_run,
        }
        typer.echo(json.dumps(facts, indent=2))
        return
    table = Table("folder", "checkpoint", "MB", "stays", "because")
    for folder in retention.folders:
        stays = "yes" if folder.keep else "no"
        cells = (folder.path, folder.checkpoint or "", f"{folder.bytes / 1e6:.1f}", stays, folder.reason)
        table.add_row(*(escape(printable(cell)) for cell in cells))
    console = Console()
    console.print(table)
    verb = "would free" if dry_run else "freed"
    console.print(f"{verb} {retention.freed_bytes / 1e6:.1f} MB, {retention.kept_bytes / 1e6:.1f} MB stay")
    if retention.over_budget:
        console.print("[yellow]what has to stay is more than the budget[/]")
