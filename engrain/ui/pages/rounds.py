"""Rounds: the learning curves, and what each round measured."""

from __future__ import annotations

import json
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import Response

from engrain.curve import gather
from engrain.ui import charts
from engrain.ui.progress import Progress
from engrain.ui.site import LIMIT, TheSite

router = APIRouter()


@router.get("/rounds")
def list_rounds(site: TheSite, limit: Annotated[int, Query(ge=1, le=1000)] = LIMIT) -> Response:
    """The latest rounds with the learning curve over them."""
    scores = gather(site.store, site.store.rounds(limit=limit))
    return site.page(
        "rounds.html",
        scores=scores[::-1],
        curves=charts.learning(scores),
        limit=limit,
        more=len(scores) == limit < 1000,
        progress=Progress.of(site.store),
    )


@router.get("/rounds/{given}")
def show_round(site: TheSite, given: str) -> Response:
    """One round with its training, checkpoints and evaluations."""
    record = site.round(given)
    evaluations = site.store.evaluations(round_id=record.id, results=False)
    runs = site.store.runs(round_id=record.id)
    return site.page(
        "round.html",
        record=record,
        config=json.dumps(dict(record.config), indent=2, ensure_ascii=False),
        evaluations=evaluations,
        chart=charts.evaluations(evaluations),
        runs=[(run, charts.training(run)) for run in runs],
        validation=charts.validation(record.state),
        knowledge=site.store.knowledge_versions(round_id=record.id),
        checkpoints=site.store.checkpoints(round_id=record.id),
        played=site.store.stage_counts(record.id),
    )
