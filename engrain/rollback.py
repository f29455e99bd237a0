"""Going back: an earlier checkpoint plays again, and the next round begins with it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from engrain.errors import NothingToRollBackError
from engrain.weigh import Change
from memory.records import CheckpointRecord, CheckpointStatus, ItemStatus, RoundStatus
from memory.store import Store

_LONG_AGO = datetime.min.replace(tzinfo=UTC)


class RolledBack(BaseModel):
    """What a roll-back did. A checkpoint that is None is the base model."""

    model_config = ConfigDict(frozen=True)

    model: str
    before: str | None  # what played until now
    now: str | None
    rolled_back: tuple[str, ...]  # checkpoints that were promoted after it
    given_up: int | None  # number of the unfinished round, which had begun with what played until now
    items: tuple[str, ...]  # absorbed by those checkpoints, and active again
    who: str
    reason: str


def model_of(store: Store, given: str | None) -> str:
    """The model that is meant: the given one, else the only one that has a promoted checkpoint.

    Raises:
        NothingToRollBackError: there is none, or there are several.
    """
    if given is not None:
        return given
    models = sorted({r.model for r in store.checkpoints() if r.status is CheckpointStatus.PROMOTED})
    if not models:
        raise NothingToRollBackError(f"no checkpoint in {store.url} is promoted: there is nothing to go back from")
    if len(models) > 1:
        raise NothingToRollBackError(f"several models have promoted checkpoints: pass --model {' or '.join(models)}")
    return models[0]


def roll_back(
    store: Store, model: str, target: CheckpointRecord | None = None, *, who: str, reason: str, force: bool = False
) -> RolledBack:
    """Make `target` current again: all that was promoted after it is rolled back, with an event for each.

    Items that those checkpoints had absorbed are active again, since the weights that play now do not know them. An
    unfinished round is given up: it had begun with other weights. Call this while holding the loop's lease.

    Args:
        store: knows the checkpoints.
        model: whose.
        target: where to go; None is the checkpoint that was promoted before the current one, or the base model.
        who: who does it.
        reason: why.
        force: take a target that the gate never promoted.

    Raises:
        NothingToRollBackError: there is nothing to go back from, the target is current, was never promoted, or its
            folder is gone.
    """
    promoted = [r for r in store.checkpoints(model=model) if r.status is CheckpointStatus.PROMOTED]
    promoted.sort(key=_when)
    current = promoted[-1] if promoted else None
    if target is None:
        if current is None:
            raise NothingToRollBackError(f"{model} plays without a checkpoint: there is nothing to go back from")
        target = promoted[-2] if len(promoted) > 1 else None
    elif current is not None and target.id == current.id:
        raise NothingToRollBackError(f"checkpoint {target.id} is current already")
    elif target.promoted_at is None and not force:
        raise NothingToRollBackError(
            f"checkpoint {target.id} was never promoted ({target.status.value}); pass --force to take it even so"
        )
    if target is not None and not (Path(target.path) / "manifest.json").is_file():
        raise NothingToRollBackError(f"the weights of checkpoint {target.id} are gone from {target.path}; name another")
    if target is None or target.promoted_at is None:
        after = promoted[-1:]
    else:
        after = [record for record in promoted if _when(record) > _when(target)]
    goal = f"checkpoint {target.id}" if target else "the base model"
    why = f"back to {goal}" + (f": {reason}" if reason else "")
    given_up = store.unfinished_round(model)
    if given_up is not None:  # first of all: killed after this, nothing goes on from what is rolled back
        store.update_round(given_up.id, status=RoundStatus.STOPPED, verdict=f"given up, {who} went {why}")
    for record in reversed(after):
        store.set_checkpoint_status(record.id, CheckpointStatus.ROLLED_BACK, who, why)
    if target is not None and target.status is not CheckpointStatus.PROMOTED:
        store.promote(target.id, who, why)
    items = [id_ for record in after for id_ in _unabsorb(store, record, who, why)]
    return RolledBack(
        model=model,
        before=current.id if current else None,
        now=target.id if target else None,
        rolled_back=tuple(record.id for record in reversed(after)),
        given_up=given_up.number if given_up else None,
        items=tuple(items),
        who=who,
        reason=reason,
    )


def _when(record: CheckpointRecord) -> datetime:
    return record.promoted_at or _LONG_AGO


def _unabsorb(store: Store, checkpoint: CheckpointRecord, who: str, why: str) -> list[str]:
    """Items that are absorbed because this checkpoint's round found them known, made active."""
    if checkpoint.round_id is None:
        return []
    freed = []
    for change in map(Change.model_validate, store.round(checkpoint.round_id).state.get("absorb", ())):
        item = next((item for item in store.items(ItemStatus.ABSORBED) if item.id == change.item), None)
        if item is not None:
            note = f"checkpoint {checkpoint.id}, which knew it, was rolled back: {why}"
            store.set_item_status(item.id, ItemStatus.ACTIVE, who, note)
            freed.append(item.id)
    return freed
