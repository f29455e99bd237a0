"""`engrain improve --dry-run`: the plan of a round, printed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.console import Console

from engrain.terminal import printable

if TYPE_CHECKING:
    from engrain.config import ImproveConfig


def show_plan(config: ImproveConfig, *, as_json: bool) -> None:
    """Print what the round would do. Loads no weights and writes nothing.

    Raises:
        UsageError: the settings name something that is unknown or cannot be.
    """
    from engrain.plan import plan, tables

    found = plan(config)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
        return
    console = Console(highlight=False)
    for table in tables(found):
        console.print(table)
    console.print(f"sizes: {printable(found.sizes_from)}", markup=False, soft_wrap=True)
    for line in found.unchecked:
        console.print(f"not checked: {printable(line)}", markup=False, soft_wrap=True)
