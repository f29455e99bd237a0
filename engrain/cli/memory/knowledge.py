"""`engrain memory knowledge`: versions of the text that stands first in the system message."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Annotated, Self

import typer
from rich.console import Console
from rich.text import Text

from engrain.cli.common import JsonOption, StoreOption, printable
from engrain.cli.memory.rounds import evaluation_table
from engrain.cli.memory.view import (
    LimitOption,
    ListByDefault,
    WhoOption,
    WhyOption,
    YesOption,
    clean,
    fields,
    id_argument,
    knowledge_id,
    opened,
    paged,
    print_json,
    short,
    table,
    time,
)
from memory.records import Knowledge, KnowledgeItem

app = typer.Typer(cls=ListByDefault, help="Versions of the text that goes into the system message.")


@dataclass(frozen=True)
class Difference:
    """What a knowledge version gained and lost against another; of a reworded item the place in both."""

    old: Knowledge
    new: Knowledge
    gained: list[KnowledgeItem]
    lost: list[KnowledgeItem]
    reworded: list[tuple[KnowledgeItem, KnowledgeItem]]

    @classmethod
    def of(cls, old: Knowledge, new: Knowledge) -> Self:
        """Compare two versions item by item."""
        was, now = {item.id: item for item in old.items}, {item.id: item for item in new.items}
        return cls(
            old,
            new,
            gained=[item for item in new.items if item.id not in was],
            lost=[item for item in old.items if item.id not in now],
            reworded=[(was[i.id], i) for i in new.items if i.id in was and was[i.id].text != i.text],
        )


KnowledgeArgument = Annotated[str, id_argument("knowledge")]


@app.command("list")
def list_knowledge(store: StoreOption = None, limit: LimitOption = 50, as_json: JsonOption = False) -> None:
    """List knowledge versions, newest first."""
    with opened(store) as memory:
        found = memory.knowledge_versions(limit=limit)[::-1]
    if as_json:
        print_json(found)
        return
    lines = ((k.version, short(k.id), len(k.items), k.tokens, len(k.dropped), time(k.created_at)) for k in found)
    with paged() as console:
        console.print(table(("version", "id", "items", "tokens", "dropped", "created"), lines, "no knowledge"))


@app.command("show")
def show_knowledge(
    id_: KnowledgeArgument,
    as_prompt: Annotated[
        bool, typer.Option("--as-prompt", help="Only the bytes that stand first in the system message.")
    ] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one knowledge version (number or id): its text as it stands in the prompt, and its items."""
    with opened(store) as memory:
        found = memory.knowledge(knowledge_id(memory, id_))
        evaluations = memory.evaluations(knowledge=found.id, results=False)
    if as_json:
        print_json(found)
        return
    if as_prompt:
        typer.echo(printable(found.text))
        return
    with paged() as console:
        fields(
            console,
            [
                ("knowledge", f"{found.id}, version {found.version}"),
                ("tokens", found.tokens),
                ("round", found.round_id),
                ("parent", found.parent),
                ("dropped for the budget", ", ".join(found.dropped)),
            ],
        )
        console.print(clean(found.text), highlight=False)
        console.print(table(("item", "text"), ((short(item.id), item.text) for item in found.items), "no items"))
        console.print(evaluation_table(evaluations))


@app.command("diff")
def diff_knowledge(
    a: Annotated[str, id_argument("knowledge", "A")],
    b: Annotated[str, id_argument("knowledge", "B")],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show which items version B gained, lost, reworded or moved against version A."""
    with opened(store) as memory:
        old, new = memory.knowledge(knowledge_id(memory, a)), memory.knowledge(knowledge_id(memory, b))
    found = Difference.of(old, new)
    if as_json:
        print_json(
            {
                "a": {"id": old.id, "version": old.version, "tokens": old.tokens},
                "b": {"id": new.id, "version": new.version, "tokens": new.tokens},
                "gained": found.gained,
                "lost": found.lost,
                "reworded": [{"id": b.id, "a": a.text, "b": b.text} for a, b in found.reworded],
            }
        )
        return
    with paged() as console:
        console.print(
            f"version {old.version} ({old.tokens} tokens) to version {new.version} ({new.tokens} tokens): "
            f"{len(found.gained)} gained, {len(found.lost)} lost, {len(found.reworded)} reworded",
            highlight=False,
        )
        lines = difflib.unified_diff(
            old.text.splitlines(), new.text.splitlines(), f"version {old.version}", f"version {new.version}",
            lineterm="", n=1,
        )  # fmt: skip
        for line in lines:
            style = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "")
            console.print(Text(printable(line), style=style))


@app.command("restore")
def restore_knowledge(
    id_: KnowledgeArgument,
    who: WhoOption = "someone",
    why: WhyOption = "restored by hand",
    yes: YesOption = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make exactly the items of this version active again, and retire the others. Asks first."""
    with opened(store) as memory:
        found = memory.knowledge(knowledge_id(memory, id_))
        if not yes:
            typer.confirm(f"make the {len(found.items)} items of version {found.version} the active ones?", abort=True)
        changed = memory.restore_knowledge(found.id, who, why)
    if as_json:
        print_json({"knowledge": found.id, "version": found.version, "changed": changed})
    else:
        Console().print(f"version {found.version} is restored: {len(changed)} items changed", highlight=False)
