"""`engrain memory lineage` and `blame`: from weights back to the episodes that taught them."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.tree import Tree

from engrain.cli.common import JsonOption, StoreOption
from engrain.cli.memory.view import clean, effect, find_item, id_argument, opened, paged, print_json, short
from memory.ancestry import SOURCES, CheckpointLineage, Origin

CheckpointArgument = Annotated[str, id_argument("checkpoint", "CHECKPOINT")]
SourcesOption = Annotated[int, typer.Option("--sources", min=0, help="Show at most this many episodes of each item.")]


def lineage(
    checkpoint: CheckpointArgument, sources: SourcesOption = SOURCES, store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Show what a checkpoint was made from, back to the episodes."""
    with opened(store) as memory:
        found = memory.lineage(memory.full_id("checkpoint", checkpoint), sources=sources)
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
    tree.add(clean(f"status {found.item.status.value}, taught by {found.item.support} episodes"))
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
    root = Tree(_checkpoint_line(found))
    branch, level = root, found
    while True:
        _describe(branch, level)
        if level.parent is None:
            before = level.checkpoint.parent
            base = (
                f"checkpoint {short(before)}, not in this store" if before else f"base model {level.checkpoint.model}"
            )
            branch.add(f"[dim]trained on from {clean(base)}[/dim]")
            return root
        branch = branch.add(f"trained on from {_checkpoint_line(level.parent)}")
        level = level.parent


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
    knowledge = branch.add(
        f"[yellow]knowledge version {text.version}[/yellow] [dim]{short(text.id)}, {text.tokens} tokens[/dim]"
    )
    for place in level.items:
        measured_effect = effect(place.item)
        detail = f"{place.item.support} episodes" + (f", effect {measured_effect}" if measured_effect else "")
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
