"""What a person may change: retire and restore items, and go back to an earlier knowledge. Each is confirmed first."""

from __future__ import annotations

import os
from typing import Annotated

from fastapi import APIRouter, Depends, Form
from fastapi.responses import RedirectResponse, Response
from starlette.exceptions import HTTPException

from engrain.ui.site import TheSite, signed
from memory.records import ItemStatus

router = APIRouter()
_forms = APIRouter(dependencies=[Depends(signed)])

Who = Annotated[str, Form(min_length=1, max_length=200)]
Why = Annotated[str, Form(min_length=1, max_length=2000)]

_TO = {"retire": ItemStatus.RETIRED, "restore": ItemStatus.ACTIVE}


@router.get("/items/{given}/{action}")
def confirm_item(site: TheSite, given: str, action: str) -> Response:
    """Asks whether to retire or restore an item."""
    _status(action)
    item = site.store.item(site.store.full_id("item", given))
    return site.page("confirm_item.html", item=item, action=action, who=_who())


@_forms.post("/items/{given}/{action}")
def change_item(site: TheSite, given: str, action: str, who: Who, why: Why) -> Response:
    """Retires or restores an item, with an event."""
    item = site.store.set_item_status(given, _status(action), who.strip(), why.strip())
    return RedirectResponse(f"/items/{item.id}", 303)


@router.get("/knowledge/{given}/restore")
def confirm_knowledge(site: TheSite, given: str) -> Response:
    """Asks whether to make a version's items the active ones."""
    return site.page("confirm_knowledge.html", knowledge=site.knowledge(given), who=_who())


@_forms.post("/knowledge/{given}/restore")
def restore_knowledge(site: TheSite, given: str, who: Who, why: Why) -> Response:
    """Makes exactly the items of a version active, with events."""
    site.store.restore_knowledge(given, who.strip(), why.strip())
    return RedirectResponse(f"/knowledge/{given}", 303)


def _status(action: str) -> ItemStatus:
    if action not in _TO:
        raise HTTPException(404)
    return _TO[action]


def _who() -> str:
    """Who most likely sits here; the form takes another name."""
    return os.environ.get("USER") or "someone"


router.include_router(_forms)
