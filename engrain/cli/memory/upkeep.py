"""`engrain memory stats`, `export`, `import`, `forget` and `verify`: the store as a whole."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from engrain.cli.common import JsonOption, StoreOption, open_store
from engrain.cli.faults import FULL
from engrain.cli.memory.view import (
    WhoOption,
    WhyOption,
    YesOption,
    clean,
    fields,
    find_item,
    opened,
    paged,
    print_json,
    table,
)
from envs.errors import UsageError
from memory.errors import UnknownIdError
from memory.records import CheckpointRecord
from memory.store import Store
from memory.verify import Finding


class Format(StrEnum):
    """How a store is written to files."""

    JSONL = "jsonl"
    PARQUET = "parquet"


def stats(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Count what the store holds, by env and split and by kind."""
    with opened(store) as memory:
        tallies, counts = memory.tallies(), memory.all_counts()
        statuses, size = memory.item_statuses(), memory.size()
    if as_json:
        print_json({"bytes": size, "counts": counts, "items": statuses, "episodes": tallies})
        return
    with paged() as console:
        columns = ("env", "split", "episodes", "solved", "turns", "tokens", "sampled")
        lines = (
            (
                t.env,
                t.split,
                f"{t.episodes:,}",
                _share(t.solved, t.episodes),
                f"{t.turns:,}",
                f"{t.tokens:,}",
                f"{t.sampled:,}",
            )
            for t in tallies
        )
        console.print(table(columns, lines, "no episodes"))
        fields(
            console,
            [(kind + "s" if kind != "knowledge" else "knowledge versions", f"{n:,}") for kind, n in counts.items()],
        )
        fields(console, [("items by status", ", ".join(f"{n} {status}" for status, n in statuses.items()))])
        per_turn = f", {size / counts['turn']:.0f} bytes a turn" if counts["turn"] else ""
        fields(console, [("size", f"{size / 2**20:.1f} MiB{per_turn}")])


def export(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A .jsonl file ('-' for standard output), or a folder.")],
    format_: Annotated[
        Format | None, typer.Option("--format", help="By default parquet, for *.jsonl and '-' jsonl.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the whole store to a file of JSON lines or to a folder of Parquet files. Nothing is lost on the way."""
    chosen = format_ or (Format.JSONL if str(out) == "-" or out.suffix in (".jsonl", ".ndjson") else Format.PARQUET)
    if str(out) != "-" and out.exists() and not force and (out.is_file() or any(out.iterdir())):
        raise UsageError(f"{out} exists already; pass --force to replace it")
    if chosen is Format.PARQUET and (str(out) == "-" or out.is_file()):
        raise UsageError(f"Parquet needs a folder, and {out} is none; name a folder or pass --format jsonl")
    if chosen is Format.JSONL and str(out) != "-" and out.is_dir():
        raise UsageError(f"JSON lines need a file, and {out} is a folder; name a file or pass --format parquet")
    draft = out.parent / f"{out.name}.part"
    with opened(store) as memory, _bar("exporting", sum(memory.all_counts().values())) as moved:
        try:
            if chosen is Format.PARQUET:
                rows = memory.export_parquet(out, moved)
            else:
                if str(out) != "-":
                    out.parent.mkdir(parents=True, exist_ok=True)
                with nullcontext(sys.stdout) if str(out) == "-" else draft.open("w", encoding="utf-8") as file:
                    rows = memory.export_jsonl(file, moved)
                if str(out) != "-":
                    draft.replace(out)
        except OSError as error:
            if error.errno in FULL or isinstance(error, BrokenPipeError):  # no fault of the name
                raise
            raise UsageError(f"{out} cannot be written: {error.strerror or error}; name another place") from error
        finally:
            if chosen is Format.JSONL and str(out) != "-":
                with suppress(OSError):
                    draft.unlink()
    if as_json and str(out) != "-":
        print_json({"out": str(out), "format": chosen.value, "rows": rows})
    else:
        _say(f"{sum(rows.values()):,} rows written to {out}")


def import_(
    source: Annotated[Path, typer.Argument(metavar="FROM", help="What `export` wrote: a file, '-', or a folder.")],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add what `export` wrote to the store, wholly or not at all; what it has already stays as it is."""
    with open_store(store) as memory, _bar("importing", None) as moved:
        try:
            if source.is_dir():
                rows = memory.import_parquet(source, moved)
            elif str(source) == "-":
                rows = memory.import_jsonl(sys.stdin, moved)
            else:
                with source.open(encoding="utf-8") as file:
                    rows = memory.import_jsonl(file, moved)
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{source} cannot be read: {error}") from error
    if as_json:
        print_json({"from": str(source), "new": rows})
    else:
        _say(f"{sum(rows.values()):,} new rows from {source}")


def forget(
    id_: Annotated[str, typer.Argument(metavar="ID", help="Id of an episode or an item, or the beginning of one.")],
    who: WhoOption = "someone",
    why: WhyOption = "forgotten by hand",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    yes: YesOption = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete an episode or an item with everything derived from it; names the checkpoints that learned it."""
    with opened(store) as memory:
        kind, whole = _episode_or_item(memory, id_)
        plan = memory.forget_plan(kind, whole)
        if not as_json or not (yes or dry_run):
            console = Console(stderr=as_json)
            counted = [
                (len(plan.episodes), "episodes"), (len(plan.extractions), "extractions"), (len(plan.items), "items"),
                (len(plan.knowledge), "knowledge versions"), (len(plan.evaluations), "evaluations"),
            ]  # fmt: skip
            console.print(
                f"{kind} {whole} and what was made from it: " + ", ".join(f"{n} {name}" for n, name in counted if n),
                markup=False, highlight=False,
            )  # fmt: skip
            if plan.weakened:
                console.print(f"{len(plan.weakened)} items stay, with one source less", highlight=False)
            for checkpoint in plan.checkpoints:
                place = memory.checkpoint(checkpoint)
                line = f"checkpoint {checkpoint} ({place.status.value}) was trained on it and stays: {place.path}"
                console.print(f"[yellow]{clean(line)}[/yellow]", highlight=False)
        if not dry_run:
            if not yes:
                typer.confirm("delete them for good?", abort=True, err=as_json)
            plan = memory.forget(kind, whole, who, why)
    if as_json:
        print_json({"kind": kind, "id": whole, "deleted": not dry_run, **plan.model_dump(mode="json")})
    elif not dry_run:
        _say("forgotten")


def verify(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Check the whole store: digests, references, counts, and checkpoints on disk. Exit code 1 if anything is wrong."""
    findings: list[Finding] = []
    with opened(store) as memory:
        checks: dict[str, Callable[[], Iterator[Finding]]] = {
            **memory.checks(), "checkpoints": lambda: _verify_weights(memory.checkpoints()),
        }  # fmt: skip
        with Console(stderr=True).status("checking …") as status:
            for name, check in checks.items():
                status.update(f"checking {name} …")
                findings.extend(check())
    errors = [finding for finding in findings if finding.level == "error"]
    if as_json:
        print_json({"ok": not errors, "checked": list(checks), "findings": findings})
    else:
        with paged() as console:
            if findings:
                lines = ((f.level, f.kind, f.id, f.problem) for f in findings)
                console.print(table(("level", "what", "id", "problem"), lines, ""))
            console.print(
                f"[red]{len(errors)} errors[/red]" if errors else f"[green]whole[/green]: {', '.join(checks)}",
                highlight=False,
            )
    if errors:
        raise typer.Exit(1)


def _verify_weights(checkpoints: list[CheckpointRecord]) -> Iterator[Finding]:
    """Whether each checkpoint's folder is there and still holds the weights that its id was made from."""
    for record in checkpoints:
        folder = Path(record.path)
        if not folder.is_dir():
            level: Literal["error", "note"] = "error" if record.status.value == "promoted" else "note"
            yield Finding(level=level, kind="checkpoint", id=record.id, problem=f"{record.path} is not there")
            continue
        from distill.checkpoint import read_manifest, weights_id  # with it torch, which takes seconds

        try:
            manifest = read_manifest(folder)
            found = weights_id(folder, manifest)
        except (OSError, UsageError, ValueError) as error:
            yield Finding(level="error", kind="checkpoint", id=record.id, problem=f"cannot be read: {error}")
            continue
        if manifest.id != record.id:
            problem = f"{record.path} holds another checkpoint, {manifest.id}"
            yield Finding(level="error", kind="checkpoint", id=record.id, problem=problem)
        elif found != record.id:
            problem = f"the weights in {record.path} are not those that were saved"
            yield Finding(level="error", kind="checkpoint", id=record.id, problem=problem)


def _episode_or_item(store: Store, given: str) -> tuple[Literal["episode", "item"], str]:
    try:
        return "episode", store.full_id("episode", given)
    except UnknownIdError as first:
        try:
            return "item", find_item(store, given)
        except UnknownIdError as second:
            raise UnknownIdError(f"{first}; {second}") from None


@contextmanager
def _bar(what: str, total: int | None) -> Iterator[Callable[[str, int], None]]:
    columns: Any = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda name, count: progress.update(task, advance=count, description=f"{what} {name}")


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else ""


def _say(text: str) -> None:
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)
