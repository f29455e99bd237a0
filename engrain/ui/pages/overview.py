"""The first page, and how the running round is getting on."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

from engrain.cli.memory import Survey
from engrain.ui import charts
from engrain.ui.progress import Progress
from engrain.ui.site import TheSite

router = APIRouter()


@router.get("/")
def overview(site: TheSite) -> Response:
    """What the store holds, on one page."""
    found = Survey.of(site.store)
    return site.page(
        "overview.html", found=found, curves=charts.learning(found.scores), progress=Progress.of(site.store)
    )


@router.get("/live")
def live(site: TheSite, mark: str = "") -> Response:
    """The part of a page that follows the running round; 204 while it still is what `mark` stands for."""
    progress = Progress.of(site.store)
    if mark == (progress.mark if progress else "none"):
        return Response(status_code=204)
    return site.page("live.html", progress=progress)
