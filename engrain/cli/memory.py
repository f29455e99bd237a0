"""`engrain memory`: look into the store."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from agent.episode import Episode
from engrain.cli.common import JsonOption, StoreOption, by_number, open_store, printable
from envs.base import Split
from envs.errors import UsageError
from memory.records import EvaluationRecord, ItemStatus
from memory.store import Store


class _ListByDefault(TyperGroup):
    """`engrain memory items --json` is `engrain memory items list --json`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names):
            args = ["list", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(help="Episodes, items, knowledge and rounds in the store.", no_args_is_help=True)
episodes = typer.Typer(cls=_ListByDefault, help="Played tasks.")
items = typer.Typer(cls=_ListByDefault, help="Single lines of experience and where they came from.")
knowledge = typer.Typer(cls=_ListByDefault, help="Versions of the text that goes into the system message.")
rounds = typer.Typer(cls=_ListByDefault, help="Rounds of self-improvement.")
app.add_typer(episodes, name="episodes")
app.add_typer(items, name="items")
app.add_typer(knowledge, name="knowledge")
app.add_typer(rounds, name="rounds")

LimitOption = Annotated[int, typer.Option("--limit", "-n", min=1, help="Show at most this many.")]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="Id, or the beginning of one.")]


def _open(store: str | None) -> Store:
    return open_store(store, create=False)


def _json(data: BaseModel | Sequence[BaseModel] | Sequence[dict[str, Any]] | dict[str, Any]) -> None:
    def plain(value: Any) -> Any:
        return value.model_dump(mode="json") if isinstance(value, BaseModel) else value

    values = [plain(value) for value in data] if isinstance(data, list | tuple) else plain(data)
    typer.echo(json.dumps(values, indent=2))


def _printable(value: object) -> str:
    """Foreign text without what a terminal or rich's markup would obey."""
    return escape(printable(value))


_WIDE = frozenset({"item", "text", "wording", "why", "verdict", "path"})  # columns that may take several lines
_ELASTIC = frozenset({"env", "model", "started", "created", "when", "last learned"})  # columns that may be cut short


def _short(id_: str | None) -> str:
    """The beginning of an id, as much as tells ids apart in practice; every command takes it."""
    return (id_ or "")[:10]


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]], empty: str) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    cells = [["" if cell is None else _printable(cell) for cell in row] for row in rows]
    for place, column in enumerate(columns):
        wide, narrow = column in _WIDE, column in _ELASTIC
        least = None if wide or narrow else max([len(column), *(len(row[place]) for row in cells)])
        table.add_column(column, overflow="fold" if wide else "ellipsis", no_wrap=not wide, min_width=least)
    for row in cells:
        table.add_row(*row)
    Console().print(table if table.row_count else empty)


def _fields(pairs: Sequence[tuple[str, object]]) -> None:
    console = Console()
    for name, value in pairs:
        if value not in (None, "", ()):
            console.print(f"[bold]{name}[/bold]  {_printable(value)}", highlight=False)


def _time(value: Any) -> str:
    return f"{value:%Y-%m-%d %H:%M}" if value else ""


@episodes.command("list")
def list_episodes(
    store: StoreOption = None,
    env: Annotated[str | None, typer.Option(help="Only this env.")] = None,
    split: Annotated[Split | None, typer.Option(help="Only this split.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Only by this checkpoint; '' for the base model.")] = None,
    with_knowledge: Annotated[
        str | None, typer.Option("--knowledge", help="Only with this knowledge; '' for none.")
    ] = None,
    round_: Annotated[str | None, typer.Option("--round", help="Only of this round (number or id).")] = None,
    stage: Annotated[str | None, typer.Option(help="Only of this stage of a round.")] = None,
    success: Annotated[bool | None, typer.Option("--solved/--failed", help="Only these.")] = None,
    limit: LimitOption = 50,
    as_json: JsonOption = False,
) -> None:
    """List episodes, newest first."""
    with _open(store) as opened:
        rows = opened.episode_rows(
            env=env,
            split=split.value if split else None,
            checkpoint=opened.full_id("checkpoint", checkpoint) if checkpoint else checkpoint,
            knowledge=_knowledge_id(opened, with_knowledge) if with_knowledge else with_knowledge,
            round_id=_round_id(opened, round_) if round_ else None,
            stage=stage,
            success=success,
            newest_first=True,
            limit=limit,
        )
    if as_json:
        _json(rows)
        return
    _table(
        ("id", "env", "outcome", "score", "checkpoint", "knowledge", "started"),
        (
            (
                _short(r.id),
                f"{r.env} {r.split}",
                "error" if r.error else "solved" if r.success else "failed",
                f"{r.score:.2f}",
                _short(r.checkpoint),
                _short(r.knowledge),
                _time(r.started_at),
            )
            for r in rows
        ),
        "no episodes",
    )


@episodes.command("show")
def show_episode(id_: IdArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Replay one episode turn by turn."""
    with _open(store) as opened:
        episode = opened.episode(opened.full_id("episode", id_))
        extractions = opened.extractions(episode_id=episode.id)
    if as_json:
        _json({**episode.model_dump(mode="json"), "extractions": [e.model_dump(mode="json") for e in extractions]})
        return
    _replay(episode)
    for extraction in extractions:
        _fields([(f"extracted ({extraction.mode})", "\n".join(extraction.items) or "nothing usable")])


def _replay(episode: Episode) -> None:
    console = Console()
    for message in episode.messages:
        if message.role == "system":
            console.rule("[dim]system[/dim]", align="left")
            console.print(_printable(message.content), highlight=False)
    for number, turn in enumerate(episode.turns, 1):
        console.rule(f"[cyan]turn {number}: observation[/cyan]", align="left")
        console.print(_printable(turn.observation), highlight=False)
        console.rule(f"[green]turn {number}: reply[/green] ({turn.end - turn.start} tokens)", align="left")
        console.print(_printable(turn.action), highlight=False)
        if turn.feedback or turn.reward:
            console.print(f"[dim]reward {turn.reward:g}[/dim] {_printable(turn.feedback)}", highlight=False)
    console.rule("[bold]end[/bold]", align="left")
    known = "" if episode.exact else "; some replies came as text, without their ids, and are not trained on"
    _fields(
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
            ("time", f"{_time(episode.started_at)}, {episode.seconds:.1f} s"),
        ]
    )


@items.command("list")
def list_items(
    store: StoreOption = None,
    status: Annotated[str | None, typer.Option(help="Only active, quarantined or retired ones.")] = None,
    limit: LimitOption = 50,
    as_json: JsonOption = False,
) -> None:
    """List items, those that most episodes taught first."""
    if status is not None and status not in [s.value for s in ItemStatus]:
        raise UsageError(f"no item status {status!r}; use {', '.join(s.value for s in ItemStatus)}")
    with _open(store) as opened:
        found = sorted(opened.items(status), key=lambda i: (-i.support, -i.last_seen.timestamp(), i.id))[:limit]
    if as_json:
        _json([{**item.model_dump(mode="json"), "support": item.support} for item in found])
        return
    rows = ((_short(i.id), i.text, i.status.value, i.support, _time(i.last_seen)) for i in found)
    _table(("id", "item", "status", "episodes", "last learned"), rows, "no items")


@items.command("show")
def show_item(id_: IdArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show one item with its sources and its history."""
    with _open(store) as opened:
        item = opened.item(opened.full_id("item", id_))
        events = opened.events(subject=item.id)
    if as_json:
        history = [event.model_dump(mode="json") for event in events]
        _json({**item.model_dump(mode="json"), "support": item.support, "events": history})
        return
    _fields([("item", item.id), ("text", item.text), ("status", item.status.value), ("episodes", item.support)])
    _table(
        ("episode", "extraction", "wording", "recalled", "when"),
        (
            (_short(s.episode_id), _short(s.extraction_id), s.text, "yes" if s.recalled else "", _time(s.created_at))
            for s in item.sources
        ),
        "no sources: given by hand",
    )
    _table(("when", "who", "what", "why"), ((_time(e.at), e.who, e.action, e.why) for e in events), "no events")


@knowledge.command("list")
def list_knowledge(store: StoreOption = None, limit: LimitOption = 50, as_json: JsonOption = False) -> None:
    """List knowledge versions, newest first."""
    with _open(store) as opened:
        found = opened.knowledge_versions()[::-1][:limit]
    if as_json:
        _json(found)
        return
    _table(
        ("version", "id", "items", "tokens", "dropped", "created"),
        ((k.version, _short(k.id), len(k.items), k.tokens, len(k.dropped), _time(k.created_at)) for k in found),
        "no knowledge",
    )


@knowledge.command("show")
def show_knowledge(id_: IdArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show one knowledge version (number or id): its text as it stands in the prompt, and its items."""
    with _open(store) as opened:
        found = opened.knowledge(_knowledge_id(opened, id_))
        evaluations = opened.evaluations(knowledge=found.id)
    if as_json:
        _json(found)
        return
    _fields(
        [
            ("knowledge", f"{found.id}, version {found.version}"),
            ("tokens", found.tokens),
            ("round", found.round_id),
            ("parent", found.parent),
            ("dropped for the budget", ", ".join(found.dropped)),
        ]
    )
    Console().print(_printable(found.text), highlight=False)
    _table(("item", "text"), ((_short(item.id), item.text) for item in found.items), "no items")
    _evaluations(evaluations)


@rounds.command("list")
def list_rounds(store: StoreOption = None, limit: LimitOption = 50, as_json: JsonOption = False) -> None:
    """List rounds, newest first."""
    with _open(store) as opened:
        found = opened.rounds()[::-1][:limit]
    if as_json:
        _json(found)
        return
    _table(
        ("round", "id", "model", "stage", "status", "verdict", "started"),
        ((r.number, _short(r.id), r.model, r.stage, r.status, r.verdict, _time(r.created_at)) for r in found),
        "no rounds",
    )


@rounds.command("show")
def show_round(id_: IdArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show one round (number or id) with its checkpoints and evaluations."""
    with _open(store) as opened:
        found = opened.round(_round_id(opened, id_))
        evaluations = opened.evaluations(round_id=found.id)
        checkpoints = opened.checkpoints(round_id=found.id)
    if as_json:
        measured = [record.model_dump(mode="json") for record in evaluations]
        made = [record.model_dump(mode="json") for record in checkpoints]
        _json({**found.model_dump(mode="json"), "evaluations": measured, "checkpoints": made})
        return
    _fields(
        [
            ("round", f"{found.number} ({found.id})"),
            ("model", found.model),
            ("seed", found.seed),
            ("stage", found.stage),
            ("status", found.status),
            ("verdict", found.verdict),
            ("started", _time(found.created_at)),
            ("config", json.dumps(dict(found.config), ensure_ascii=False)),
        ]
    )
    _evaluations(evaluations)
    _table(
        ("checkpoint", "status", "knowledge", "path"),
        ((_short(c.id), c.status.value, _short(c.knowledge), c.path) for c in checkpoints),
        "no checkpoints",
    )


def _evaluations(evaluations: Sequence[EvaluationRecord]) -> None:
    _table(
        ("evaluation", "env", "split", "accuracy", "95% interval", "solved", "checkpoint", "knowledge"),
        (
            (
                e.name,
                e.env,
                e.split,
                f"{e.accuracy:.3f}",
                f"{e.low:.3f}-{e.high:.3f}",
                f"{e.successes}/{e.n}",
                _short(e.checkpoint),
                _short(e.knowledge),
            )
            for e in evaluations
        ),
        "no evaluations",
    )


def _knowledge_id(store: Store, given: str) -> str:
    return by_number(store.knowledge_versions(), "version", given) or store.full_id("knowledge", given)


def _round_id(store: Store, given: str) -> str:
    return by_number(store.rounds(), "number", given) or store.full_id("round", given)
