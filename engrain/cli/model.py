"""`engrain model`: language models by short name, on this machine or a package index away."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from agent.models.catalog import CATALOG, CatalogModel
from agent.models.errors import UnknownModelError
from agent.models.resolve import cached, manifest, remove, resolve

app = typer.Typer(help="Fetch, list, show and remove language models.", rich_markup_mode="rich")

_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def resolve_with_bar(model: str, *, weights: bool = True) -> Path:
    """`agent.models.resolve.resolve` with a progress bar on stderr, and licence and origin when it fetches.

    Raises:
        UnknownModelError, FetchError, WrongHashError, DiskFullError, ConversionError: as `resolve` does.
    """
    entry = CATALOG.get(model)
    if entry is None or cached(model):
        return resolve(model, weights=weights)
    console = Console(stderr=True, highlight=False)
    console.print(f"[bold]{entry.title}[/] ({entry.licence}), {escape(entry.provenance)}", soft_wrap=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<12}"),
        BarColumn(),
        DownloadColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("starting", total=None)
        stage = ""

        def show(name: str, done: int, total: int) -> None:
            nonlocal stage, task
            if name != stage:
                if not console.is_terminal:
                    console.print(f"{name} …")
                # A new task, because rich keeps a total once it is known.
                bars.remove_task(task)
                stage, task = name, bars.add_task(name, total=None)
            # A stage whose end is not in sight yet pulses instead of standing at 0.
            bars.update(task, completed=done, total=total if done else None)

        return resolve(model, progress=show)


@app.callback(invoke_without_command=True)
def _default(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        list_models(as_json=False)


@app.command("list")
def list_models(as_json: _Json = False) -> None:
    """List the models that come by short name, and which of them are on this machine."""
    if as_json:
        _print_json([_describe(model) for model in CATALOG.values()])
        return
    table = Table("name", "download", "on disk", "licence", "cached", "good for", box=None, pad_edge=False)
    for model in CATALOG.values():
        here = "[green]yes[/]" if cached(model.name) else "no"
        sizes = (_megabytes(model.download_size), _megabytes(model.converted_size))
        table.add_row(model.name, *sizes, model.licence, here, model.purpose)
    Console().print(table)


@app.command()
def fetch(
    models: Annotated[list[str], typer.Argument(help="Short name (`engrain model list`) or Hugging Face id.")],
) -> None:
    """Download models through pip's package index (or the Hugging Face hub) and make them ready to use."""
    for model in models:
        folder = resolve_with_bar(model)
        typer.echo(f"{model}: {folder}")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Short name.")],
    as_json: _Json = False,
) -> None:
    """Show where a model comes from, its licence, its pins and what was fetched."""
    facts = _describe(_known(name))
    if as_json:
        _print_json(facts)
        return
    table = Table.grid(padding=(0, 2))
    for key, value in facts.items():
        if key == "manifest":
            continue
        table.add_row(f"[bold]{key}[/]", escape("\n".join(value) if isinstance(value, list) else str(value)))
    found = facts["manifest"]
    if found:
        came = "package index" if found["source"] == "wheels" else f"hub, commit {found['revision']}"
        table.add_row("[bold]fetched[/]", f"{found['fetched_at']} from the {came}")
    Console().print(table)


@app.command()
def rm(
    name: Annotated[str, typer.Argument(help="Short name.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a fetched model from this machine."""
    model = _known(name)
    if cached(name) and not yes:
        if not sys.stdin.isatty():
            raise typer.BadParameter("nobody is there to confirm; give -y", param_hint="rm")
        typer.confirm(f"Remove {model.title} ({_megabytes(model.converted_size)})?", abort=True)
    typer.echo(f"removed {name}, {_megabytes(remove(name))} freed")


def _known(name: str) -> CatalogModel:
    if name not in CATALOG:
        raise UnknownModelError(f"unknown model {name!r}: known names: {', '.join(CATALOG)}")
    return CATALOG[name]


def _describe(model: CatalogModel) -> dict[str, Any]:
    folder = cached(model.name)
    return {
        "name": model.name,
        "title": model.title,
        "licence": model.licence,
        "provenance": model.provenance,
        "purpose": model.purpose,
        "download_bytes": model.download_size,
        "disk_bytes": model.converted_size,
        "wheels": [f"{wheel.requirement} sha256:{wheel.sha256}" for wheel in model.wheels],
        "gguf_sha256": model.gguf_sha256,
        "hub_id": model.hub_id,
        "cached": folder is not None,
        "folder": str(folder) if folder else None,
        "manifest": manifest(model.name),
    }


def _megabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2))
