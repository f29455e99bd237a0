"""Which checkpoints stay on disk: promoted ones and what they come from, and the newest of the others.

Rows never go: the store still says what a removed checkpoint was made from and how it was judged. Only folders below
`<home>/runs` are ever touched; what someone saved elsewhere is theirs. Those that were kept for validation while a
round trained, and not chosen, have no row; they go as soon as their round is over.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from engrain.settings import runs_dir
from memory.records import CheckpointRecord, CheckpointStatus, RoundStatus
from memory.store import Store

_PREFIX = "round-"


class Kept(BaseModel):
    """A checkpoint folder, its size, and why it stays; `reason` of one that goes says that."""

    model_config = ConfigDict(frozen=True)

    path: str
    checkpoint: str | None  # its id, where the store knows it
    bytes: int
    keep: bool
    reason: str


class Retention(BaseModel):
    """What stays and what goes."""

    model_config = ConfigDict(frozen=True)

    folders: tuple[Kept, ...]
    budget: int | None = None

    @property
    def kept_bytes(self) -> int:
        """Disk taken afterwards."""
        return sum(folder.bytes for folder in self.folders if folder.keep)

    @property
    def freed_bytes(self) -> int:
        """Disk that is given back."""
        return sum(folder.bytes for folder in self.folders if not folder.keep)

    @property
    def over_budget(self) -> bool:
        """Whether what has to stay is more than the budget."""
        return self.budget is not None and self.kept_bytes > self.budget


def plan(store: Store, *, keep: int, budget: int | None = None, runs: Path | None = None) -> Retention:
    """Decide, without touching anything.

    Args:
        store: says what each checkpoint is.
        keep: how many of those stay, newest first, that nothing needs.
        budget: bytes that all may take; of those `keep` ones the oldest go first where it is exceeded. What lineage
            needs stays even so.
        runs: the folder with one folder a run; None is the default one.
    """
    runs = (runs or runs_dir()).resolve()
    records = {record.id: record for record in store.checkpoints()}
    by_path = {Path(record.path).resolve(): record for record in records.values()}
    needed = _needed(store, records)
    over = {f"{_PREFIX}{r.id}" for r in store.rounds() if r.status != RoundStatus.RUNNING}
    fixed: list[Kept] = []
    others: list[tuple[CheckpointRecord, Kept]] = []
    for path in _folders(runs):
        record, size = by_path.get(path), _size(path)
        known = {"path": str(path), "bytes": size, "checkpoint": record.id if record else None}
        if record is None:
            done = path.parent.name in over
            reason = "not chosen in its round" if done else "its run is not over, or unknown here"
            fixed.append(Kept(**known, keep=not done, reason=reason))
        elif reason := needed.get(record.id, ""):
            fixed.append(Kept(**known, keep=True, reason=reason))
        else:
            others.append((record, Kept(**known, keep=True, reason=f"one of the last {keep}")))
    others.sort(key=lambda pair: (pair[0].created_at, pair[0].id), reverse=True)
    taken = sum(folder.bytes for folder in fixed if folder.keep)
    decided = []
    full = False
    for place, (record, folder) in enumerate(others):
        full = full or (budget is not None and taken + folder.bytes > budget)
        reason = f"{record.status.value}, not one of the last {keep}" if place >= keep else "over the disk budget"
        if place >= keep or full:
            decided.append(folder.model_copy(update={"keep": False, "reason": reason}))
        else:
            taken += folder.bytes
            decided.append(folder)
    return Retention(folders=(*fixed, *decided), budget=budget)


def prune(store: Store, retention: Retention, *, who: str = "engrain") -> None:
    """Remove the folders that `plan` gave up, each wholly or not at all, with an event for each checkpoint."""
    for folder in retention.folders:
        path = Path(folder.path)
        for cut in path.parent.glob(".step-*.removed"):  # one that was killed here
            _remove(cut)
        if folder.keep:
            continue
        dying = path.with_name(f".{path.name}.removed")
        if folder.checkpoint is not None:
            detail = {"path": folder.path, "bytes": folder.bytes}
            store.note("checkpoint", folder.checkpoint, "pruned", who, folder.reason, detail)
        with suppress(FileNotFoundError):  # another process was here first
            path.replace(dying)
            _remove(dying)


def _needed(store: Store, records: dict[str, CheckpointRecord]) -> dict[str, str]:
    """Ids that must stay, with the reason."""
    found: dict[str, str] = {}
    running = [r for r in store.rounds() if r.status == RoundStatus.RUNNING]
    unfinished = {r.id for r in running}
    for record in records.values():
        if record.status is CheckpointStatus.PROMOTED:
            found[record.id] = "promoted"
        elif record.round_id is None:
            found[record.id] = "trained by hand, outside of any round"
        elif record.round_id in unfinished:
            found[record.id] = "its round is unfinished"
    for begun in running:
        if parent := begun.state.get("parent"):
            found.setdefault(parent, f"round {begun.number} is unfinished and began with it")
        if made := begun.state.get("consolidate"):  # perhaps the same weights as those of an earlier round
            found.setdefault(made["checkpoint"], f"round {begun.number} is unfinished and made it")
    for model in {record.model for record in records.values()}:
        if current := store.current_checkpoint(model):
            found[current.id] = "current"
    for id_ in list(found):  # ancestors, as far as they are known
        child = records.get(id_)
        while child is not None and child.parent is not None and child.parent not in found:
            found[child.parent] = f"parent of {child.id}"
            child = records.get(child.parent)
    return found


def _folders(runs: Path) -> Iterator[Path]:
    for folder in sorted(runs.glob("*/step-*")):
        if folder.is_dir() and not folder.is_symlink() and (folder / "manifest.json").is_file():
            yield folder.resolve()


def _size(folder: Path) -> int:
    """Bytes in a folder; what another process removes meanwhile counts for nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += (Path(parent) / name).stat().st_size
    return total


def _remove(folder: Path) -> None:
    """Delete a folder; one that another process deletes too is left to it."""
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)
