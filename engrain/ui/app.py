"""The dashboard as an ASGI application: pages over one store, guarded, with errors as pages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from engrain import svg
from engrain.ui.access import LOOPBACK, Access, Guard
from engrain.ui.games import Games
from engrain.ui.pages import changes, checkpoints, episodes, items, knowledge, overview, play, rounds
from engrain.ui.site import Site
from envs.errors import EngrainError, UsageError
from memory.errors import UnknownIdError
from memory.store import Store


def make_app(store: Store, access: Access, hosts: Sequence[str] = (), games: Games | None = None) -> FastAPI:
    """The dashboard of a store.

    Args:
        store: stays open as long as the application runs.
        access: its secrets; `access.token` opens it.
        hosts: names besides loopback's under which people reach it.
        games: what people play here; None: nothing.
    """
    site = Site(store, access, games)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # their pages load scripts from elsewhere
    app.state.site = site
    for pages in (overview, rounds, items, knowledge, episodes, checkpoints, changes):
        app.include_router(pages.router)
    if games is not None:
        app.include_router(play.router)
    app.mount("/static", StaticFiles(directory=Path(__file__).parent / "static"))

    @app.get("/charts.css")
    def charts() -> Response:
        return Response(svg.CSS, media_type="text/css")

    @app.exception_handler(EngrainError)
    def fault(request: Request, error: Exception) -> Response:
        status = 404 if isinstance(error, UnknownIdError) else 400 if isinstance(error, UsageError) else 503
        return site.page("fault.html", status, status=status, reason=str(error))

    @app.exception_handler(HTTPException)
    def refusal(request: Request, error: HTTPException) -> Response:
        reason = "there is no such page" if error.status_code == 404 else error.detail
        return site.page("fault.html", error.status_code, status=error.status_code, reason=reason)

    @app.exception_handler(RequestValidationError)
    def bad(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where, given = first["loc"][-1], first.get("input")
        reason = f"{where}: {first['msg']}" + ("" if given is None else f" (given: {str(given)[:200]!r})")
        return site.page("fault.html", 400, status=400, reason=reason)

    def refuse(request: Request, reason: str) -> Response:
        return site.page("refused.html", 403, reason=reason)

    app.add_middleware(Guard, access=access, refuse=refuse)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, *hosts], www_redirect=False)
    return app
