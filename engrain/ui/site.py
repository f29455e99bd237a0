"""What all pages share: the store, the templates, and how foreign text is shown harmlessly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Annotated, Any, TypeVar
from urllib.parse import quote, urlencode

import jinja2
from fastapi import Depends, Form, Request
from fastapi.responses import HTMLResponse
from markupsafe import Markup
from starlette.exceptions import HTTPException

from engrain.cli.memory.view import effect, short, time
from engrain.terminal import printable
from engrain.ui.access import Access
from engrain.ui.games import Games
from memory.errors import UnknownIdError
from memory.records import Knowledge, RoundRecord
from memory.store import Store

#: Page size of every listing.
LIMIT = 50

_T = TypeVar("_T")


class Site:
    """A store with the templates that show it, and the games that are played here, if any are."""

    def __init__(self, store: Store, access: Access, games: Games | None = None) -> None:
        self.store, self.access, self.games = store, access, games
        self._versions: dict[str, int] = {}  # a text keeps its number for ever
        self._templates = jinja2.Environment(
            loader=jinja2.PackageLoader("engrain.ui"),
            autoescape=True,
            finalize=_shown,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters.update(time=_time, effect=effect, short=short, step=_step, number=_number, count=_count)
        self._templates.globals.update(query=_query, playing=games is not None)

    def page(self, template: str, status: int = 200, /, **values: Any) -> HTMLResponse:
        """A page of these values."""
        html = self._templates.get_template(template).render(csrf=self.access.csrf, **values)
        return HTMLResponse(html.encode("utf-8", "replace"), status)

    def knowledge(self, given: str) -> Knowledge:
        """A knowledge text by version number, id, or the beginning of one.

        Raises:
            UnknownIdError: there is none.
        """
        return _found(given, self.store.knowledge, lambda: self.store.full_id("knowledge", given))

    def versions(self, ids: Iterable[str | None]) -> dict[str, int]:
        """The version numbers of knowledge texts, by id; without those that are not stored."""
        wanted = {id_ for id_ in ids if id_}
        for id_ in wanted - self._versions.keys():
            with suppress(UnknownIdError):
                if (version := self.store.knowledge(id_).version) is not None:
                    self._versions[id_] = version
        return {id_: self._versions[id_] for id_ in wanted & self._versions.keys()}

    def round(self, given: str) -> RoundRecord:
        """A round by number, id, or the beginning of one.

        Raises:
            UnknownIdError: there is none.
        """
        return _found(given, self.store.round, lambda: self.store.full_id("round", given))


def _site(request: Request) -> Site:
    site: Site = request.app.state.site
    return site


#: What a page's function takes to get the site.
TheSite = Annotated[Site, Depends(_site)]


def signed(site: TheSite, csrf: Annotated[str, Form()] = "") -> None:
    """Refuse forms that are none of ours."""
    if not site.access.signs(csrf):
        raise HTTPException(403, "this form is not from this server, or from before it was started anew; load it again")


def _found(given: str, read: Callable[[str], _T], whole: Callable[[], str]) -> _T:
    try:
        return read(given)
    except UnknownIdError:
        return read(whole())


def _shown(value: Any) -> Any:
    """What a template puts into a page: foreign text without control characters; autoescape does the rest."""
    if value is None:
        return ""
    return value if isinstance(value, Markup) else printable(value)


def _step(value: object) -> str:
    """One step of an address's path."""
    return quote(str(value), safe="", errors="replace")


def _time(value: datetime | None) -> str:
    """A time to the minute, in UTC."""
    if value is None:
        return ""
    return Markup('<time datetime="{}" title="UTC">{}</time>').format(f"{value:%Y-%m-%dT%H:%MZ}", time(value))


def _count(number: int, what: str) -> str:
    """`1 episode`, `2,000 episodes`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _number(value: float) -> str:
    """A whole number with its thousands apart, any other with two digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


def _query(values: dict[str, Any], **changed: Any) -> str:
    """An address's query: the values that are set, with some of them changed."""
    kept: Sequence[tuple[str, Any]] = [(k, v) for k, v in {**values, **changed}.items() if v not in (None, "", 0)]
    return f"?{urlencode(kept, errors='replace')}" if kept else "?"
