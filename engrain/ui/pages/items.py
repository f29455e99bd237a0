"""Items: single lines of experience with their effect, their sources and their history."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import Response

from engrain.cli.memory.items import Order
from engrain.ui import charts
from engrain.ui.site import LIMIT, TheSite
from envs.errors import UsageError
from memory.records import ItemStatus

router = APIRouter()

_STATUSES = [status.value for status in ItemStatus]

Text = Annotated[str, Query(max_length=500)]


@router.get("/items")
def list_items(
    site: TheSite,
    status: Text = "",
    flag: Text = "",
    search: Text = "",
    by: Order = Order.SUPPORT,
    offset: Annotated[int, Query(ge=0, le=2**31 - 1)] = 0,
) -> Response:
    """Items that pass the filters, a page at a time."""
    if status and status not in _STATUSES:
        raise UsageError(f"no item status {status!r}; use {', '.join(_STATUSES)}")
    rows = site.store.item_rows(
        status=status or None, flag=flag or None, search=search or None, by=by.value, limit=LIMIT, offset=offset
    )
    chosen = {"status": status, "flag": flag, "search": search, "by": by.value}
    return site.page(
        "items.html",
        rows=rows,
        chosen=chosen,
        offset=offset,
        limit=LIMIT,
        statuses=_STATUSES,
        orders=[o.value for o in Order],
    )


@router.get("/items/{given}")
def show_item(site: TheSite, given: str) -> Response:
    """One item with its source episodes, its effect and its history."""
    item = site.store.item(site.store.full_id("item", given))
    effects = site.store.effects(item_id=item.id)
    return site.page(
        "item.html",
        item=item,
        effects=effects,
        versions=site.versions(e.knowledge for e in effects),
        chart=charts.effects(effects[-LIMIT:]) if effects else None,
        sources=item.sources[:LIMIT],
        holding=site.store.knowledge_holding(item.id),
        events=site.store.events(subject=item.id, limit=LIMIT)[::-1],
    )
