"""`engrain memory lineage` and `blame`: from weights back to the episodes that taught them."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.tree import Tree

from engrain.cli.common import JsonOption, StoreOption
from engrain.cli.memory.view import clean, effect, find_item, id_argument, opened, paged, print_json, short
from engrain.terminal import count
from memory.ancestry import SOURCES, CheckpointLineage, Origin

CheckpointArgument = Annotated[str, id_argument("checkpoint", "CHECKPOINT")]
SourcesOption = Annotated[
    int, typer.Option("--sources", min=0, max=2**31 - 1, help="Show at most this many episodes of each item.")
]

EveryOption = Annotated[bool, typer.Option("--all", help="Show the items of the checkpoints before it too.")]


def lineage(
    checkpoint: CheckpointArgument, sources: SourcesOption = SOURCES, every: EveryOption = False,
    store: StoreOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Show what a checkpoint was made from, back to the episodes, and the checkpoints before it."""
    with opened(store) as memory:
        whole = memory.full_id("checkpoint", checkpoint)
        found = memory.lineage(whole, sources=sources, detailed=None if every or as_json else 1)
    if as_json:
        print_json(found)
        return
    with paged() as console:
        console.print(_tree(found))


def blame(
    checkpoint: CheckpointArgument,
    item: Annotated[str, id_argument("item", "ITEM")],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how an item came into a checkpoint: which training, which wording, which episodes."""
    with opened(store) as memory:
        found = memory.blame(memory.full_id("checkpoint", checkpoint), find_item(memory, item))
    if as_json:
        print_json(found)
        return
    tree = Tree(f"[bold]{clean(found.item.text)}[/bold] [dim]item {clean(short(found.item.id))}[/dim]")
    tree.add(clean(f"status {found.item.status.value}, taught by {count(found.item.support, 'episode')}"))
    if measured := effect(found.item):
        tree.add(f"effect on accuracy {measured}, {found.item.effect_n} tasks")
    trained = tree.add("[bold]trained into[/bold]")
    for level in found.through:
        for place in level.items:
            branch = trained.add(_checkpoint_line(level))
            text = level.knowledge
            branch.add(clean(f"line {place.position} of knowledge version {text.version if text else '?'}"))
            if place.wording != found.item.text:
                branch.add(clean(f"worded there: {place.wording}"))
            branch.add(_run_line(level))
    sources = tree.add("[bold]learned from[/bold]" if found.sources else "given by hand")
    for source in found.sources:
        sources.add(_source_line(source))
    with paged() as console:
        console.print(tree)


def _tree(found: CheckpointLineage) -> Tree:
    """The checkpoint, and beside each other those before it: a tree of many generations would leave the screen."""
    root = Tree(_checkpoint_line(found))
    _describe(root, found)
    before = root.add("[bold]trained on from[/bold]")
    level = found
    while level.parent is not None:
        level = level.parent
        _describe(before.add(_checkpoint_line(level)), level)
    oldest = level.checkpoint
    missing = f"checkpoint {short(oldest.parent)}, not in this store" if oldest.parent else f"base model {oldest.model}"
    before.add(f"[dim]{clean(missing)}[/dim]")
    return root


def _describe(branch: Tree, level: CheckpointLineage) -> None:
    branch.add(_run_line(level))
    if level.evaluations:
        measured = branch.add(f"{len(level.evaluations)} evaluations")
        for e in level.evaluations:
            rate = f"{e.accuracy:.2f} ({e.low:.2f} to {e.high:.2f}, n={e.n})"
            measured.add(clean(f"{e.name}: {rate} {'with knowledge' if e.knowledge else ''}".rstrip()))
    text = level.knowledge
    if text is None:
        given = level.checkpoint.knowledge
        branch.add(clean(f"knowledge {short(given)}, not in this store") if given else "no knowledge")
        return
    detail = f"{short(text.id)}, {text.tokens} tokens" + ("" if level.items else f", {len(text.items)} items")
    knowledge = branch.add(f"[yellow]knowledge version {text.version}[/yellow] [dim]{clean(detail)}[/dim]")
    for place in level.items:
        measured_effect = effect(place.item)
        detail = count(place.item.support, "episode") + (f", effect {measured_effect}" if measured_effect else "")
        line = knowledge.add(f"{clean(place.wording)} [dim]{clean(short(place.item.id))}, {detail}[/dim]")
        for source in place.sources:
            line.add(_source_line(source))
        if not place.sources and not place.item.support:
            line.add("[dim]given by hand[/dim]")


def _checkpoint_line(level: CheckpointLineage) -> str:
    record = level.checkpoint
    name = f"[bold green]checkpoint {clean(short(record.id))}[/bold green]"
    return f"{name} [dim]{clean(record.model)}, {record.status.value}[/dim]"


def _run_line(level: CheckpointLineage) -> str:
    if level.run is None:
        return f"[dim]its training is not in this store; weights in {clean(level.checkpoint.path)}[/dim]"
    run = level.run
    steps = level.checkpoint.manifest.get("step", len(run.metrics))
    played = (
        f", {level.training_episodes} episodes played, {level.training_solved} solved"
        if level.training_episodes
        else ""
    )
    return f"[cyan]run {clean(short(run.id))}[/cyan] {clean(run.method)}, step {clean(steps)}{played}"


def _source_line(source: Origin) -> str:
    if source.episode_id is None:
        return "[dim]no episode[/dim]"
    outcome = {True: "solved", False: "failed", None: "deleted"}[source.success]
    how = f"read by {source.writer} ({source.mode})" if source.writer else "no extraction"
    recalled = ", only recalled" if source.recalled else ""
    return clean(f"episode {short(source.episode_id)}: {source.env} {source.split}, {outcome}; {how}{recalled}")
