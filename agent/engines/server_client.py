"""One HTTP exchange with a server, and what can become of it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2

from agent.engines.server_wire import BadAnswerError, error_text
from agent.errors import ServerRefusedError

_TRY_AGAIN = {408, 425, 429, *range(500, 600)}


class AwayError(Exception):
    """The server cannot be reached, is overloaded or broken; another try may succeed."""

    def __init__(self, reason: str, *, status: int = 0, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.status = status  # of HTTP; 0 for no answer
        self.wait = wait  # seconds that the server asked for


class RejectedError(Exception):
    """The server understood and said no."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{text} (HTTP {status})")
        self.status, self.text = status, text


class Client:
    """Speaks JSON with servers.

    Args:
        api_key: sent as a bearer token; "" sends none.
        timeout: seconds that an answer may take.
    """

    def __init__(self, api_key: str, timeout: float) -> None:
        self._timeout = timeout
        self._http = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
            timeout=httpx2.Timeout(None, connect=10.0),
            # Servers close idle connections after some seconds; we let go of them first.
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def json(self, method: str, url: str, body: object = None, limit: float | None = None) -> Any:
        """The answer of `send`, parsed.

        Raises:
            BadAnswerError: it is not JSON.
        """
        content = await self.send(method, url, body, limit)
        try:
            return json.loads(content)
        except ValueError as error:
            raise BadAnswerError(f"the answer is not JSON: {error}") from error

    async def send(self, method: str, url: str, body: object = None, limit: float | None = None) -> bytes:
        """One HTTP exchange within `limit` seconds (None: as long as a completion may take); its content.

        Raises:
            AwayError: it may succeed another time.
            RejectedError: the server said no.
            ServerRefusedError: it wants a key, or redirects.
        """
        limit = limit or self._timeout
        try:
            async with asyncio.timeout(limit):
                response = await self._http.request(method, url, json=body)
        except TimeoutError:
            raise AwayError(f"no answer in {limit:g} s") from None
        except httpx2.TransportError as error:
            raise AwayError(str(error) or type(error).__name__) from error
        except httpx2.DecodingError as error:
            raise BadAnswerError(f"the answer cannot be unpacked: {error}") from error
        except httpx2.InvalidURL as error:
            raise ServerRefusedError(f"{url} is no server URL: {error}") from error
        if response.is_success:
            return response.content
        status = response.status_code
        said = f"HTTP {status}: {error_text(response.content)}"
        if status in _TRY_AGAIN:
            asked = response.headers.get("Retry-After", "")
            raise AwayError(said, status=status, wait=float(asked) if asked.isdecimal() else 0.0)
        if status in (401, 403):
            raise ServerRefusedError(
                f"{url} does not let us in ({said}); put its key in ENGRAIN_API_KEY, or a coach's in "
                "ENGRAIN_COACH_API_KEY"
            )
        if response.is_redirect:
            raise ServerRefusedError(f"{url} redirects to {response.headers.get('Location')}; give that URL")
        raise RejectedError(status, error_text(response.content))
