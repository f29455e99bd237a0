"""What a round reads besides its own episodes: those that people and other processes played since the last one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from engrain.config import ImproveConfig
from envs.base import Split, Task
from memory.admission import unverified
from memory.records import RoundRecord
from memory.store import Store

_LOOKED_AT = 20  # episodes looked at for each one that may be read


def arrivals(store: Store, config: ImproveConfig, record: RoundRecord, tasks: Sequence[Task]) -> list[str]:
    """Ids of the episodes that came in between the beginnings of the last round and of this one, newest first.

    Only training episodes that belong to no round or training run, are verified (see `memory.admission.unverified`),
    and are of the round's world; at most `config.extract.arrivals`. What lies between the beginnings of two rounds is
    read by one of them alone. A round that ended before it read anything is passed over.

    Args:
        store: holds episodes and rounds.
        config: the round's settings.
        record: the round.
        tasks: the round's own training tasks. A task is of the same world where it has the same value in all that
            these agree on, such as a hidden convention or a level.
    """
    if not config.extract.arrivals:
        return []
    world = config.world.model_dump(mode="json")
    earlier = [
        other
        for other in store.rounds()
        if other.number < record.number
        and other.model == record.model
        and other.config.get("world") == world
        and "extract" in other.state
    ]
    since = earlier[-1].created_at if earlier else None
    ids = store.arrived(config.world.env, since, until=record.created_at, limit=_LOOKED_AT * config.extract.arrivals)
    common, found = _common([task.parameters for task in tasks]), []
    for id_ in ids:
        episode = store.episode(id_)
        same = all(_plain(episode.task.parameters.get(key)) == value for key, value in common.items())
        if same and episode.task.split is Split.TRAIN and unverified(episode) is None:
            found.append(id_)
        if len(found) == config.extract.arrivals:
            break
    return found


def _common(parameters: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What all of them agree on."""
    first = {key: _plain(value) for key, value in parameters[0].items()}
    return {
        key: value
        for key, value in first.items()
        if all(key in other and _plain(other[key]) == value for other in parameters)
    }


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
