"""A training in the store: the run that it is, the episodes played for it, the checkpoint that came of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agent.episode import Episode
from distill.checkpoint import read_manifest
from distill.config import DistillConfig
from distill.errors import CheckpointError
from distill.trainer import FitResult
from memory.records import CheckpointRecord, Knowledge, RoundStatus, RunRecord, digest
from memory.store import Store


def begin_run(
    store: Store,
    id: str,
    config: DistillConfig,
    *,
    model: str,
    knowledge: Knowledge,
    folder: Path,
    parent: CheckpointRecord | None = None,
    round_id: str | None = None,
    given: Mapping[str, Any] | None = None,
) -> RunRecord:
    """The stored run of this id, written where it is new.

    Args:
        store: where it is kept.
        id: follows from what is trained, so that a run that is taken up again is the same run.
        config: settings of the job.
        model: the base model.
        knowledge: what is taught; it is stored already.
        folder: the run's folder.
        parent: the checkpoint it goes on from.
        round_id: the round it belongs to, if any.
        given: what else it learns from, as JSON values; kept with the settings under `given`.
    """
    return store.add_run(
        RunRecord(
            id=id,
            round_id=round_id,
            method=config.method,
            model=model,
            parent=parent.id if parent else None,
            knowledge=knowledge.id,
            folder=str(folder.resolve()),
            seed=config.seed,
            config=config.model_dump(mode="json") | ({"given": dict(given)} if given else {}),
        )
    )


def keep_episode(store: Store, run: RunRecord, episode: Episode) -> None:
    """Store an episode that was played for a run outside any round.

    Its id is made the run's own: folders of one name elsewhere play under the same ids.
    """
    own = episode.model_copy(update={"id": digest(run.id, episode.id)})
    store.add_episodes([own], stage="train", run_id=run.id)


def finish_run(store: Store, run: RunRecord, fit: FitResult) -> CheckpointRecord:
    """Store how a run ended and the checkpoint that was chosen.

    Weights that an earlier run made too are one checkpoint; where they are gone from that run's folder it is found in
    this one's from now on.

    Raises:
        RuntimeError: training ended without a checkpoint.
    """
    chosen = fit.best or fit.last
    if chosen is None:
        raise RuntimeError("training ended without a checkpoint")
    manifest = read_manifest(chosen)
    record = store.add_checkpoint(
        CheckpointRecord(
            id=manifest.id,
            model=run.model,
            path=str(chosen.resolve()),
            kind=manifest.kind,
            parent=manifest.parent,
            knowledge=manifest.knowledge,
            round_id=run.round_id,
            run_id=run.id,
            manifest=manifest.model_dump(mode="json"),
        )
    )
    if not _holds(Path(record.path), record.id):
        why = f"run {run.id} made the same weights, and they are gone from where they were"
        record = store.move_checkpoint(record.id, str(chosen.resolve()), "engrain", why)
    if run.finished_at is None:
        history = [metrics.model_dump() for metrics in fit.history]
        store.finish_run(run.id, RoundStatus.FINISHED, reason=fit.stopped or "", metrics=history)
    return record


def _holds(folder: Path, id: str) -> bool:
    try:
        return read_manifest(folder).id == id
    except CheckpointError:
        return False
