"""`engrain memory episodes`: what was played."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from agent.episode import Episode
from engrain.cli.common import JsonOption, StoreOption
from engrain.cli.memory.view import (
    LimitOption,
    ListByDefault,
    clean,
    completed,
    fields,
    id_argument,
    knowledge_id,
    opened,
    paged,
    print_json,
    round_id,
    short,
    table,
    time,
)
from envs.base import Split

app = typer.Typer(cls=ListByDefault, help="Played tasks.")


@app.command("list")
def list_episodes(
    store: StoreOption = None,
    env: Annotated[str | None, typer.Option(help="Only this env.")] = None,
    split: Annotated[Split | None, typer.Option(help="Only this split.")] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Only by this checkpoint; '' for the base model.", autocompletion=completed("checkpoint")),
    ] = None,
    with_knowledge: Annotated[
        str | None, typer.Option("--knowledge", help="Only with this knowledge; '' for none.")
    ] = None,
    round_: Annotated[str | None, typer.Option("--round", help="Only of this round (number or id).")] = None,
    stage: Annotated[str | None, typer.Option(help="Only of this stage of a round.")] = None,
    success: Annotated[bool | None, typer.Option("--solved/--failed", help="Only these.")] = None,
    before: Annotated[
        str | None,
        typer.Option(help="Only those older than this episode: the next page.", autocompletion=completed("episode")),
    ] = None,
    limit: LimitOption = 50,
    as_json: JsonOption = False,
) -> None:
    """List episodes, newest first."""
    with opened(store) as memory:
        rows = memory.episode_rows(
            env=env,
            split=split.value if split else None,
            checkpoint=memory.full_id("checkpoint", checkpoint) if checkpoint else checkpoint,
            knowledge=knowledge_id(memory, with_knowledge) if with_knowledge else with_knowledge,
            round_id=round_id(memory, round_) if round_ else None,
            stage=stage,
            success=success,
            before=memory.full_id("episode", before) if before else None,
            newest_first=True,
            limit=limit,
        )
    if as_json:
        print_json(rows)
        return
    columns = ("id", "env", "outcome", "score", "turns", "checkpoint", "knowledge", "started")
    lines = (
        (
            short(r.id),
            f"{r.env} {r.split}",
            "error" if r.error else "solved" if r.success else "failed",
            f"{r.score:.2f}",
            r.turns,
            short(r.checkpoint),
            short(r.knowledge),
            time(r.started_at),
        )
        for r in rows
    )
    with paged() as console:
        console.print(table(columns, lines, "no episodes"))
        if len(rows) == limit:
            console.print(f"[dim]older ones: --before {clean(short(rows[-1].id))}[/dim]", highlight=False)


@app.command("show")
def show_episode(
    id_: Annotated[str, id_argument("episode")], store: StoreOption = None, as_json: JsonOption = False
) -> None:
    """Replay one episode turn by turn."""
    with opened(store) as memory:
        episode = memory.episode(memory.full_id("episode", id_))
        extractions = memory.extractions(episode_id=episode.id)
    if as_json:
        print_json({**episode.model_dump(mode="json"), "extractions": extractions})
        return
    with paged() as console:
        _replay(console, episode)
        for extraction in extractions:
            fields(console, [(f"extracted ({extraction.mode})", "\n".join(extraction.items) or "nothing usable")])


def _replay(console: Console, episode: Episode) -> None:
    for message in episode.messages:
        if message.role == "system":
            console.rule("[dim]system[/dim]", align="left")
            console.print(clean(message.content), highlight=False)
    for number, turn in enumerate(episode.turns, 1):
        console.rule(f"[cyan]turn {number}: observation[/cyan]", align="left")
        console.print(clean(turn.observation), highlight=False)
        console.rule(f"[green]turn {number}: reply[/green] ({turn.end - turn.start} tokens)", align="left")
        console.print(clean(turn.action), highlight=False)
        if turn.feedback or turn.reward:
            console.print(f"[dim]reward {turn.reward:g}[/dim] {clean(turn.feedback)}", highlight=False)
    console.rule("[bold]end[/bold]", align="left")
    known = "" if episode.exact else "; some replies came as text, without their ids, and are not trained on"
    fields(
        console,
        [
            ("episode", episode.id),
            ("task", f"{episode.task.id} ({episode.task.split})"),
            ("outcome", f"{'solved' if episode.success else 'failed'}, score {episode.score:.2f}"),
            ("stopped", episode.stop_reason.value),
            ("error", episode.error),
            ("feedback", episode.feedback),
            ("model", episode.model),
            ("checkpoint", episode.checkpoint),
            ("knowledge", episode.knowledge),
            ("tokens", f"{len(episode.token_ids)}, {episode.sampled} sampled{known}"),
            ("time", f"{time(episode.started_at)}, {episode.seconds:.1f} s"),
        ],
    )
