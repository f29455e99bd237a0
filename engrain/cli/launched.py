"""Commands that train, on one process or several, and what they log to."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Annotated

import typer

TrackOption = Annotated[
    list[str] | None,
    typer.Option("--track", metavar="TRACKER", help="Log every step to tensorboard, wandb or trackio; give several."),
]


def joined(model: str, teacher: str | None = None, track: Sequence[str] | None = None) -> bool:
    """Under `accelerate launch`, in all processes but the main one: train and sample along, until that one is done.

    Call it before anything is written or a model is loaded, and `distill.replicas.dismiss` at the end.

    Args:
        model: what is trained.
        teacher: a second model that teaches.
        track: the trackers that will be used; a missing one ends the command here.

    A signal is left to the main process: this one leaves when that one has.

    Returns:
        Whether this process has nothing left to do; False in the main one.
    """
    from distill.distributed import is_main
    from distill.parallel import current
    from distill.trackers import check_trackers

    check_trackers(track or ())
    current()  # opens the process group, and says on which GPU a model goes
    if is_main():
        return False
    from agent.engines.transformers import TransformersEngine
    from agent.models.resolve import resolve
    from engrain.consolidate import join

    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):  # all get them; the main one says when to leave, by leaving
        signal.signal(number, lambda got, frame: signals.append(got))
    engine = TransformersEngine(resolve(model), name=model)
    other = TransformersEngine(resolve(teacher), name=teacher) if teacher else None
    try:
        join(engine, other)
    except Exception as error:
        if not signals:
            raise
        raise SystemExit(128 + signals[0]) from error
    return True
