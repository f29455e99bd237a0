"""Rounds: the learning curves, and what each round measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import Response

from engrain.curve import gather
from engrain.ui import charts
from engrain.ui.progress import Progress, planned
from engrain.ui.site import LIMIT, TheSite
from engrain.ui.training import Training, recorded

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
    played = site.store.stage_counts(record.id)
    tasks = planned(record.config).get("validation/bare")
    selected = record.state.get("select")
    versions = site.versions(e.knowledge for e in evaluations)
    live = Progress.of(site.store)
    trainings = [Training.of(run, played, tasks) for run in site.store.runs(round_id=record.id)]
    return site.page(
        "round.html",
        record=record,
        config=json.dumps(dict(record.config), indent=2, ensure_ascii=False),
        evaluations=evaluations,
        versions=versions,
        chosen=selected.get("knowledge") if isinstance(selected, Mapping) else None,
        chart=charts.evaluations(evaluations, versions),
        trainings=[(training, charts.training(training.steps)) for training in trainings],
        validation=charts.validation(recorded(record.state) or (trainings[-1].scores if trainings else {})),
        knowledge=site.store.knowledge_versions(round_id=record.id),
        checkpoints=site.store.checkpoints(round_id=record.id),
        played=played,
        progress=live if live and live.round.id == record.id else None,
    )
