"""Commands that train, on one process or several, and what they log to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

TrackOption = Annotated[
    list[str] | None,
    typer.Option("--track", metavar="TRACKER", help="Log every step to tensorboard, wandb or trackio; give several."),
]


def joined(model: str, teacher: str | None = None, track: Sequence[str] | None = None) -> bool:
    """Under `accelerate launch`, in all processes but the main one: train along, until that one is done.

    Call it before anything is written or a model is loaded, and `engrain.consolidate.dismiss` at the end.

    Args:
        model: what is trained.
        teacher: a second model that teaches.
        track: the trackers that will be used; a missing one ends the command here.

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

    engine = TransformersEngine(resolve(model), name=model)
    other = TransformersEngine(resolve(teacher), name=teacher) if teacher else None
    join(engine, other)
    return True
