"""Side by side on one seed: the same task played bare, with the knowledge in context, and by the distilled weights.

All arms sample with the same seeds, so that what differs between them comes from the knowledge or the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.episode import Episode
from engrain.errors import NothingToCompareError
from memory.errors import UnknownIdError
from memory.records import CheckpointRecord, CheckpointStatus, Knowledge, RoundRecord
from memory.store import Store


@dataclass(frozen=True)
class Arm:
    """One way to play: these weights, None for the base model's, with or without a text in the context."""

    name: str
    knowledge: Knowledge | None = None
    checkpoint: CheckpointRecord | None = None


def arms_of(
    knowledge: Knowledge | None, distilled: CheckpointRecord | None, parent: CheckpointRecord | None
) -> list[Arm]:
    """Bare, then what there is of the other two. `parent` is what the distilled weights were before.

    Raises:
        NothingToCompareError: there is neither knowledge nor a checkpoint.
    """
    arms = [Arm("bare", None, parent)]
    if knowledge is not None:
        arms.append(Arm("with knowledge", knowledge, parent))
    if distilled is not None:
        arms.append(Arm("distilled", None, distilled))
    if len(arms) == 1:
        raise NothingToCompareError(
            "there is nothing to compare the bare model with: pass --knowledge (a text file will do) or --checkpoint, "
            "or let `engrain improve` learn this world, with the same -o options, first"
        )
    return arms


def parting(episodes: Sequence[Episode]) -> int | None:
    """The first turn, from 0, at which not all replies are the same; None where all are."""
    longest = max((len(episode.turns) for episode in episodes), default=0)
    for number in range(longest):
        if len({e.turns[number].action if number < len(e.turns) else None for e in episodes}) > 1:
            return number
    return None


def newest_knowledge(store: Store, model: str, env: str, options: Mapping[str, Any]) -> Knowledge | None:
    """What the last round of this model on this world, with the same options, that chose a text chose."""
    for record in _rounds(store, model, env, options):
        chosen = record.state.get("select", {}).get("knowledge")
        if chosen:
            return store.knowledge(chosen)
    return None


def newest_checkpoint(store: Store, model: str, env: str, options: Mapping[str, Any]) -> CheckpointRecord | None:
    """The last weights that such a round made and that are on disk; promoted ones first."""
    found = [
        checkpoint
        for record in _rounds(store, model, env, options)
        for checkpoint in reversed(store.checkpoints(model=model, round_id=record.id))
        if Path(checkpoint.path).is_dir()
    ]
    promoted = [checkpoint for checkpoint in found if checkpoint.status is CheckpointStatus.PROMOTED]
    return next(iter([*promoted, *found]), None)


def parent_of(store: Store, checkpoint: CheckpointRecord | None) -> CheckpointRecord | None:
    """The weights that a checkpoint went on from: its teacher in training. None is the base model."""
    if checkpoint is None or checkpoint.parent is None:
        return None
    try:
        return store.checkpoint(checkpoint.parent)
    except UnknownIdError:  # trained elsewhere
        return None


def _rounds(store: Store, model: str, env: str, options: Mapping[str, Any]) -> list[RoundRecord]:
    """Rounds of a model on a world, latest first."""

    def same(world: Mapping[str, Any]) -> bool:
        given = world.get("options") or {}
        return world.get("env") == env and _written(given) == _written(options)

    found = [record for record in store.rounds() if record.model == model and same(record.config.get("world", {}))]
    return sorted(found, key=lambda record: record.number, reverse=True)


def _written(options: Mapping[str, Any]) -> dict[str, str]:
    """As on the command line."""
    return {key: str(value) for key, value in options.items()}
