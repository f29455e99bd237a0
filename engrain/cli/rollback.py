"""`engrain rollback`: go back to an earlier promoted checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from engrain.cli.common import JsonOption, StoreOption, find_checkpoint, open_store
from engrain.cli.memory.view import WhoOption, id_argument


def command(
    checkpoint: Annotated[str | None, id_argument("checkpoint", "[CHECKPOINT]")] = None,
    reason: Annotated[str, typer.Option("--reason", help="Why; stands in the history.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Take a checkpoint that was never promoted.")] = False,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Whose checkpoint; needed where several models have one.")
    ] = None,
    who: WhoOption = "someone",
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Go back to the checkpoint that was promoted before the current one, or to CHECKPOINT.

    The next round begins with it. Whatever was promoted later is rolled back, what it had absorbed from the knowledge
    is active again, and an unfinished round is given up. After the first checkpoint comes the base model.
    """
    from engrain.lease import LoopLease
    from engrain.rollback import model_of, roll_back

    with open_store(store, create=False) as memory:
        target = memory.checkpoint(memory.full_id("checkpoint", checkpoint)) if checkpoint is not None else None
        if target is not None and model is not None:
            find_checkpoint(target.id, memory, model)  # says so if it is another model's
        whose = target.model if target else model_of(memory, model)
        with LoopLease(memory, whose):
            done = roll_back(memory, whose, target, who=who, reason=reason, force=force)
    if as_json:
        typer.echo(done.model_dump_json(indent=2))
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{done.model} plays with {done.now or 'the base model'} from now on", markup=False)
    for id_ in done.rolled_back:
        console.print(f"rolled back: {id_}", markup=False)
    if done.items:
        console.print(f"{len(done.items)} absorbed items are active again")
    if done.given_up is not None:
        console.print(f"round {done.given_up}, which was unfinished, is given up")
