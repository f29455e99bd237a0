"""`engrain report ROUND`: a round as one HTML file to send to somebody."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engrain.cli.common import JsonOption, StoreOption
from engrain.cli.memory.view import id_argument, opened, print_json, round_id
from envs.errors import UsageError


def command(
    round_: Annotated[str, id_argument("round", "ROUND")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The file; engrain-round-N.html if not given.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a round as one HTML file: what was learned, curves, tables, examples, lineage, cost.

    The file holds all it shows and fetches nothing. It takes rounds as they are: promoted, rejected, stopped early or
    unfinished. With --json what it would hold is printed instead, and no file is written.
    """
    from engrain.page.gather import gather
    from engrain.page.html import check_free, default_name, render, write

    if as_json and out is not None:
        raise UsageError("--json prints and writes no file: leave out --out, or --json")
    if out is not None:
        check_free(out, force=force)
    with opened(store) as memory:
        page = gather(memory, memory.round(round_id(memory, round_)))
    if as_json:
        print_json(page.model_dump(mode="json"))
        return
    path = out or default_name(page)
    check_free(path, force=force)
    write(render(page), path, force=force)
    typer.echo(path)
