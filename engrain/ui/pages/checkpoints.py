"""Checkpoints: which there are, and the lineage of one as a graph."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import APIRouter
from fastapi.responses import Response

from engrain.ui.site import LIMIT, TheSite
from memory.ancestry import CheckpointLineage

router = APIRouter()


@router.get("/checkpoints")
def list_checkpoints(site: TheSite) -> Response:
    """The checkpoints that training left, latest first."""
    current = {record.id for record in site.store.current_checkpoints()}
    records = site.store.checkpoints()
    shown = records[: -LIMIT * 4 - 1 : -1]
    versions = site.versions(record.knowledge for record in shown)
    return site.page("checkpoints.html", records=shown, total=len(records), current=current, versions=versions)


@router.get("/checkpoints/{given}")
def show_checkpoint(site: TheSite, given: str) -> Response:
    """What a checkpoint was made from, back to the episodes, and the checkpoints before it."""
    found = site.store.lineage(site.store.full_id("checkpoint", given), detailed=1)
    return site.page(
        "checkpoint.html",
        found=found,
        levels=list(_levels(found)),
        versions=site.versions(e.knowledge for e in found.evaluations),
        events=site.store.events(subject=found.checkpoint.id, limit=LIMIT)[::-1],
    )


def _levels(found: CheckpointLineage) -> Iterator[CheckpointLineage]:
    level: CheckpointLineage | None = found
    while level is not None:
        yield level
        level = level.parent
