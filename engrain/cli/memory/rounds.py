"""`engrain memory rounds`: what each round came to, as a table, as a curve in the terminal and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.table import Table

from engrain.cli.common import JsonOption, StoreOption
from engrain.cli.memory.view import (
    LimitOption,
    ListByDefault,
    clean,
    fields,
    id_argument,
    opened,
    paged,
    print_json,
    round_id,
    short,
    table,
    time,
)
from engrain.curve import MEASURES, RoundScores, draw, gather
from memory.records import EvaluationRecord

app = typer.Typer(cls=ListByDefault, help="Rounds of self-improvement.")

_WIDTH = 30  # characters for an accuracy of 1
_STYLE = {"bare": "dim", "in_context": "yellow", "distilled": "green"}


@app.command("list")
def list_rounds(
    store: StoreOption = None,
    limit: LimitOption = 50,
    png: Annotated[Path | None, typer.Option("--png", help="Also write the learning curve to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List rounds, newest first, with the learning curve over them."""
    with opened(store) as memory:
        found = memory.rounds(limit=limit)
        scores = gather(memory, found)
    if png is not None:
        draw(scores, png)
    if as_json:
        measured = {row.round.id: row for row in scores}
        print_json([{**r.model_dump(mode="json"), "test": measured[r.id].plain()} for r in found[::-1]])
        return
    lines = (
        (r.number, short(r.id), r.model, r.stage, r.status, r.verdict, time(r.created_at)) for r in reversed(found)
    )
    with paged() as console:
        console.print(
            table(("round", "id", "model", "stage", "status", "verdict", "started"), lines, "no rounds"),
        )
        if any(row.scores for row in scores):
            console.print(bars(scores))
        if png is not None:
            console.print(f"learning curve in {png}", markup=False, highlight=False)


@app.command("show")
def show_round(
    id_: Annotated[str, id_argument("round")], store: StoreOption = None, as_json: JsonOption = False
) -> None:
    """Show one round (number or id) with its training, checkpoints and evaluations."""
    with opened(store) as memory:
        found = memory.round(round_id(memory, id_))
        evaluations = memory.evaluations(round_id=found.id)
        checkpoints = memory.checkpoints(round_id=found.id)
        runs = memory.runs(round_id=found.id)
    if as_json:
        print_json(
            {
                **found.model_dump(mode="json"),
                "evaluations": evaluations,
                "checkpoints": checkpoints,
                "runs": runs,
            }
        )
        return
    with paged() as console:
        fields(
            console,
            [
                ("round", f"{found.number} ({found.id})"),
                ("model", found.model),
                ("seed", found.seed),
                ("stage", found.stage),
                ("status", found.status),
                ("verdict", found.verdict),
                ("started", time(found.created_at)),
                ("config", json.dumps(dict(found.config), ensure_ascii=False)),
            ],
        )
        console.print(evaluation_table(evaluations))
        if runs:
            lines = ((short(r.id), r.method, len(r.metrics), r.status, r.reason) for r in runs)
            console.print(table(("run", "method", "steps", "status", "why"), lines, ""))
        made = ((short(c.id), c.status.value, short(c.knowledge), c.path) for c in checkpoints)
        console.print(table(("checkpoint", "status", "knowledge", "path"), made, "no checkpoints"))


def evaluation_table(evaluations: Sequence[EvaluationRecord]) -> Table | str:
    """Evaluations with their 95% intervals."""
    return table(
        ("evaluation", "env", "split", "accuracy", "95% interval", "solved", "checkpoint", "knowledge"),
        (
            (
                e.name,
                e.env,
                e.split,
                f"{e.accuracy:.3f}",
                f"{e.low:.3f}-{e.high:.3f}",
                f"{e.successes}/{e.n}",
                short(e.checkpoint),
                short(e.knowledge),
            )
            for e in evaluations
        ),
        "no evaluations",
    )


def bars(scores: Sequence[RoundScores]) -> Group:
    """The learning curve as bars: accuracy on test tasks, with the 95% interval drawn behind it."""
    lines: list[str] = ["[bold]accuracy on test tasks[/bold], 95% interval in dots"]
    for row in scores:
        label = f"round {row.round.number}"
        for name in MEASURES:
            if (score := row.scores.get(name)) is None:
                continue
            filled, low, high = (round(_WIDTH * value) for value in (score.accuracy, score.low, score.high))
            cells = ["█" if i < filled else "·" if low <= i < high else " " for i in range(_WIDTH)]
            promoted = " promoted" if name == "distilled" and row.promoted else ""
            lines.append(f"{label:>10}  {name:<10} [{_STYLE[name]}]{''.join(cells)}[/] {score.accuracy:.2f}{promoted}")
            label = ""
    return Group(*lines)


def curve_line(scores: Sequence[RoundScores]) -> str:
    """The last measured accuracy of each round, as one line of small bars."""
    steps = "▁▂▃▄▅▆▇█"
    values = [score.accuracy for row in scores if (score := row.scores.get("distilled") or row.scores.get("bare"))]
    return "".join(steps[min(7, int(value * 8))] for value in values)


def print_rounds(console: Console, scores: Sequence[RoundScores]) -> None:
    """The rounds' verdicts in a few lines, for the overview."""
    for row in scores[-3:]:
        found = ", ".join(f"{name} {score.accuracy:.2f}" for name, score in row.scores.items())
        verdict = row.round.verdict or row.round.status
        console.print(f"  round {row.round.number}  {found}  [dim]{clean(verdict)}[/dim]", highlight=False)
