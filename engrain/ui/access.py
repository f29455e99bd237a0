"""Who may see and change what: a token, the pages' own origin, and the names under which the server answers.

The token is printed where the server was started. Whoever opens the address with it gets a cookie, and the token leaves
the address bar. A page of another site can neither read ours (cookie and headers) nor send our forms (a second
token stands in each, and the browser says where a form came from), nor reach us under a name of its own (`Host`).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")
STATIC = "/static/"  # style sheet, scripts and icon: the same for everybody

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # "no-referrer" would take the origin from our own forms
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Access:
    """The secrets of one server: `token` opens it, `csrf` stands in its forms, the cookie is neither of them.

    Args:
        token: what opens the pages; None draws one.
    """

    def __init__(self, token: str | None = None) -> None:
        self.token = token or secrets.token_urlsafe(32)
        self.csrf = self._derived("form")
        self._session = self._derived("cookie")
        self.cookie = f"engrain-{self._derived('name')[:8]}"  # two servers on one machine share their cookies' jar

    def admits(self, request: Request) -> bool:
        """Whether the request has the cookie."""
        return _same(request.cookies.get(self.cookie, ""), self._session)

    def opens(self, token: str) -> bool:
        """Whether this is the token."""
        return _same(token, self.token)

    def signs(self, csrf: str) -> bool:
        """Whether a form is one of ours."""
        return _same(csrf, self.csrf)

    def welcome(self, request: Request) -> Response:
        """To the same page without the token in its address, with the cookie."""
        query = request.url.remove_query_params("token")
        # One slash: two would name another host.
        target = "/" + query.path.lstrip("/\\") + (f"?{query.query}" if query.query else "")
        response = RedirectResponse(target, status_code=303)
        response.set_cookie(self.cookie, self._session, httponly=True, samesite="strict")
        return response

    def _derived(self, what: str) -> str:
        return hmac.new(self.token.encode(), what.encode(), hashlib.sha256).hexdigest()


class Guard:
    """ASGI middleware: lets through what has the cookie and comes from our own pages; puts headers on all answers.

    Args:
        app: what is guarded.
        access: the secrets.
        refuse: makes the page that says no, from the request and a reason.
    """

    def __init__(self, app: ASGIApp, access: Access, refuse: Callable[[Request, str], Response]) -> None:
        self.app, self.access, self.refuse = app, access, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let it through."""
        if scope["type"] != "http":  # there are no websockets here; the router refuses them
            await self.app(scope, receive, send)
            return

        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        request = Request(scope)
        await (self._answer(request) or self.app)(scope, receive, sealed)

    def _answer(self, request: Request) -> Response | None:
        """What is said instead of the page; None lets the request pass."""
        if request.url.path.startswith(STATIC):
            return None
        if (token := request.query_params.get("token")) is not None:
            if self.access.opens(token):
                return self.access.welcome(request)
            return self.refuse(request, "this token is not the running server's")
        if not self.access.admits(request):
            return self.refuse(request, "open the address that the server printed when it was started, with its token")
        if request.method not in ("GET", "HEAD") and not _from_here(request):
            return self.refuse(request, "this was sent from another site")
        return None


def _from_here(request: Request) -> bool:
    """Whether the browser says that one of our own pages sent this; clients that say nothing are no browsers."""
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return False
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin)[:2] == (request.url.scheme, request.headers.get("host", ""))


def _same(given: str, secret: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), secret.encode())
