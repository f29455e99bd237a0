"""Knowledge versions: their text, their items, and what one gained and lost against another."""

from __future__ import annotations

import difflib

from fastapi import APIRouter
from fastapi.responses import RedirectResponse, Response

from engrain.cli.memory.knowledge import Difference
from engrain.ui import charts
from engrain.ui.site import LIMIT, TheSite
from envs.errors import UsageError
from memory.records import Knowledge

router = APIRouter()


@router.get("/knowledge")
def list_knowledge(site: TheSite) -> Response:
    """The latest versions."""
    return site.page("knowledge.html", versions=site.store.knowledge_versions(limit=LIMIT)[::-1], limit=LIMIT)


@router.get("/diff")
def diff(site: TheSite, a: str = "", b: str = "") -> Response:
    """What version B gained, lost and reworded against version A."""
    if not a or not b:
        raise UsageError("name two versions to compare: a and b")
    old, new = site.knowledge(a), site.knowledge(b)
    return site.page("diff.html", difference=Difference.of(old, new), lines=_lines(old, new))


def _lines(old: Knowledge, new: Knowledge) -> list[tuple[str, str]]:
    """The lines of both texts: what happened to each (`kept`, `lost`, `gained`) and the line itself."""
    kinds = {" ": "kept", "-": "lost", "+": "gained"}
    was, now = old.text.splitlines(), new.text.splitlines()
    compared = list(difflib.unified_diff(was, now, lineterm="", n=len(was) + len(now)))[3:]  # two names, one place
    return [(kinds[line[0]], line[1:]) for line in compared] or [("kept", line) for line in was]


@router.get("/knowledge/{given}")
def show_knowledge(site: TheSite, given: str) -> Response:
    """One version: its text as it stands in the prompt, its items, and how it did."""
    found = site.knowledge(given)
    evaluations = site.store.evaluations(knowledge=found.id, results=False)
    summaries = {row.id: row for row in site.store.item_rows(ids=[place.id for place in found.items])}
    if given not in (found.id, str(found.version)):
        return RedirectResponse(f"/knowledge/{found.id}", 303)
    return site.page(
        "knowledge_version.html",
        knowledge=found,
        parent=site.store.knowledge(found.parent) if found.parent else None,
        summaries=summaries,
        evaluations=evaluations,
        chart=charts.evaluations(evaluations) if evaluations else None,
    )
