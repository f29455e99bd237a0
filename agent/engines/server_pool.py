"""Several servers that stand for one model: who gets the next request, and what happens when one goes away.

A request goes to the server with the least outstanding work, or, where that costs little balance, to the one that has
what the request goes on from in its cache. A server that fails is left alone for a while that doubles with every
failure; then one request at a time tries it, until one succeeds. A request is tried again, on any server that is there,
until it is answered or `patience` seconds have passed since it first failed.

Everything runs in one event loop, so no state here needs a lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.engines.base import Completion
from agent.engines.server_client import AwayError, Client, RejectedError
from agent.engines.server_meet import Meeting, Server
from agent.engines.server_wire import BadAnswerError, Wire
from agent.episode import SamplingParams
from agent.errors import ContextLengthError, EngineFailedError, ServerFailedError, ServerRefusedError

logger = logging.getLogger(__name__)

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 15.0  # seconds a failed server is left alone
_BAD_ANSWERS = 5  # after so many a request is given up, however patient we are


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter under the name it has on servers, which follows from its content."""

    name: str
    path: Path


class Homes:
    """Which server sampled what, so that the next turn of an episode can go where its keys and values are."""

    def __init__(self, limit: int = 4096) -> None:
        self._limit = limit
        self._servers: OrderedDict[int, Server] = OrderedDict()

    def put(self, ids: Sequence[int], server: Server) -> None:
        """The server has read, or sampled, these ids."""
        *_, key = _running_hashes(ids)
        self._servers[key] = server
        self._servers.move_to_end(key)
        if len(self._servers) > self._limit:
            self._servers.popitem(last=False)

    def find(self, ids: Sequence[int]) -> Server | None:
        """The server of the longest known sequence that `ids` go on from; None for none."""
        found = [key for key in _running_hashes(ids) if key in self._servers]
        return self._servers[found[-1]] if found else None


def _running_hashes(ids: Sequence[int]) -> Iterator[int]:
    """A hash of the first id, of the first two, and so on."""
    key = 0
    for id_ in ids:
        key = hash((key, id_))
        yield key


class ServerPool:
    """Completes prompts on one or more servers of the same model.

    Args:
        urls: base URLs, checked ones, such as `http://127.0.0.1:8000/v1`.
        name: the model's name for messages.
        aliases: names under which a server may list the model.
        wire: reads and writes for the model.
        api_key: sent as a bearer token; "" sends none.
        in_flight: the most requests under way on one server.
        timeout: seconds that one completion may take.
        patience: seconds that a request is tried again after its first failure.
        seed: of the jitter in waiting times.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        name: str,
        aliases: Sequence[str],
        wire: Wire,
        api_key: str,
        in_flight: int,
        timeout: float,
        patience: float,
        seed: int,
    ) -> None:
        self.servers = [Server(url) for url in urls]
        self.adapter: Adapter | None = None
        self._client = Client(api_key, timeout)
        self._meeting = Meeting(self._client, name, aliases, wire)
        self._wire, self._in_flight, self._patience = wire, in_flight, patience
        self._random = random.Random(seed)  # noqa: S311 - not for secrets
        self._freed = asyncio.Event()
        self._homes = Homes() if len(urls) > 1 else None
        self._last_success = float("-inf")

    async def open(self) -> None:
        """Meet every server. One that cannot be reached is tried again later, if another one can.

        Raises:
            ServerRefusedError: one serves another model, or wants a key.
            ServerFailedError: none can be reached.
        """
        reasons = await self._prepare_all()
        if len(reasons) == len(self.servers):
            url, reason = next(iter(reasons.items()))
            raise ServerFailedError(f"no server answers at {url}: {reason}; start one there, or correct the URL")
        for url, reason in reasons.items():
            logger.warning("no server answers at %s: %s; it is tried again later", url, reason)

    async def close(self) -> None:
        """Take our adapters off the servers, as far as they can be reached, and close the connections."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5.0):
                await asyncio.gather(*(self._unload(server, set(server.loaded)) for server in self.servers))
        await self._client.close()

    async def complete(self, prompt: Sequence[int], sampling: SamplingParams) -> Completion:
        """One completion from whichever server is free, tried again until it succeeds or patience ends.

        Raises:
            ContextLengthError: a server finds the request too long.
            EngineFailedError: this request fails while others succeed.
            ServerFailedError: nothing was answered for `patience` seconds.
            ServerRefusedError: a server wants another key or serves another model by now.
        """
        cost = len(prompt) + sampling.max_tokens
        home = self._homes.find(prompt) if self._homes else None
        first_failure: float | None = None
        bad = 0
        loop = asyncio.get_running_loop()
        while True:
            server = await self._take(cost, home)
            failures = server.failures  # those that this try can still add to
            try:
                if not server.ready:
                    await self._return(server)
                completion = await self._ask(server, prompt, sampling)
            except (AwayError, BadAnswerError) as error:
                now = loop.time()
                if server.failures == failures:  # else somebody who started with us has counted this failure
                    if not failures:
                        logger.warning("%s fails (%s); it is tried again", server.url, error)
                    self._rest(server, error, now)
                bad += isinstance(error, BadAnswerError)
                first_failure = now if first_failure is None else first_failure
                if bad >= _BAD_ANSWERS or now - first_failure >= self._patience:
                    raise self._gave_up(server, error, now - first_failure, first_failure) from error
            except RejectedError as error:
                if "context length" in error.text.lower() or "context_length" in error.text:
                    raise ContextLengthError(f"{server.url}: {error.text}") from error
                raise EngineFailedError(f"{server.url} refuses a request: {error}") from error
            else:
                if server.failures:
                    logger.warning("%s answers again", server.url)
                server.failures = 0
                self._last_success = loop.time()
                if self._homes:
                    self._homes.put([*prompt, *completion.token_ids], server)
                return completion
            finally:
                server.requests -= 1
                server.work -= cost
                self._freed.set()

    async def use(self, adapter: Adapter | None) -> None:
        """Sample from this adapter from now on, on every server that can be reached; others load it when they return.

        Raises:
            RejectedError: a server cannot load it; nothing has changed.
            ServerFailedError: no server could be reached for `patience` seconds.
        """
        before, self.adapter = self.adapter, adapter
        loop = asyncio.get_running_loop()
        start = loop.time()
        try:
            for server in self.servers:
                server.ready = False
            while len(reasons := await self._prepare_all()) == len(self.servers):
                if loop.time() - start >= self._patience:
                    url, reason = next(iter(reasons.items()))
                    raise ServerFailedError(f"no answer from {url} for {loop.time() - start:.0f} s: {reason}")
                await asyncio.sleep(self._random.uniform(_FIRST_WAIT, 4 * _FIRST_WAIT))
        except BaseException:
            self.adapter = before
            raise
        if before is not None and before != adapter:
            await asyncio.gather(*(self._unload(server, {before.name}) for server in self.servers))

    async def _take(self, cost: int, home: Server | None) -> Server:
        """Wait for a server that may get one more request, and count it in; `home` if it has not much more to do."""
        loop = asyncio.get_running_loop()
        while True:
            now = loop.time()
            awake = [server for server in self.servers if server.resting_until <= now]
            free = [server for server in awake if server.requests < server.limit(self._in_flight)]
            if free:
                server = min(free, key=lambda server: (server.failures > 0, server.work, server.requests))
                if home in free and not home.failures and home.work - server.work <= cost:
                    server = home
                server.requests += 1
                server.work += cost
                return server
            rest = min((s.resting_until - now for s in self.servers if s not in awake), default=None)
            self._freed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rest):
                    await self._freed.wait()

    def _rest(self, server: Server, error: Exception, now: float) -> None:
        """Leave a server that failed alone for a while."""
        wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2**server.failures) * self._random.uniform(0.5, 1.0)
        server.failures += 1
        server.resting_until = now + wait
        if isinstance(error, AwayError):
            server.resting_until = now + max(wait, min(error.wait, self._patience))
            server.ready = server.ready and error.status == 429  # there, but busy

    def _gave_up(self, server: Server, error: Exception, waited: float, since: float) -> Exception:
        if self._last_success > since or isinstance(error, BadAnswerError):
            return EngineFailedError(f"{server.url} does not answer a request in {waited:.0f} s of trying: {error}")
        return ServerFailedError(
            f"no answer from {server.url} for {waited:.0f} s: {error}; start it again, then run the same command"
        )

    async def _ask(self, server: Server, prompt: Sequence[int], sampling: SamplingParams) -> Completion:
        dialect = server.dialect
        assert dialect is not None  # noqa: S101 - prepared
        if lacking := dialect.lacks(sampling):
            raise ServerRefusedError(f"{server.url} does not know {lacking}; leave that out, or serve with vLLM")
        model = self.adapter.name if self.adapter else server.served
        body = self._wire.request(model, prompt, sampling, dialect)
        try:
            answer = await self._client.json("POST", f"{server.url}/completions", body)
        except RejectedError as error:
            if error.status == 404:  # started anew, without our adapter
                raise AwayError(str(error)) from error
            raise
        return self._wire.completion(answer, prompt, sampling, dialect)

    async def _prepare_all(self) -> dict[str, str]:
        """Prepare every server that is not ready; reasons of those that are away, by URL."""
        waiting = [server for server in self.servers if not server.ready]
        found = await asyncio.gather(*(self._prepare(server) for server in waiting), return_exceptions=True)
        now = asyncio.get_running_loop().time()
        reasons = {}
        for server, error in zip(waiting, found, strict=True):
            if isinstance(error, AwayError | BadAnswerError):
                reasons[server.url] = str(error)
                self._rest(server, error, now)
            elif error is not None:
                raise error
        return reasons

    async def _return(self, server: Server) -> None:
        """Prepare a server that was away. That it cannot load the adapter now may pass."""
        try:
            await self._prepare(server)
        except RejectedError as error:
            raise AwayError(str(error)) from error

    async def _prepare(self, server: Server) -> None:
        """See that a server has the model, and give it the adapter in use."""
        listed = await self._meeting.check(server)
        adapter = self.adapter
        if adapter is not None and adapter.name not in listed:
            wish = {"lora_name": adapter.name, "lora_path": str(adapter.path)}
            try:
                await self._client.send("POST", f"{server.url}/load_lora_adapter", wish)
            except AwayError as error:
                if error.status == 500:  # how vLLM says that the adapter is bad
                    raise RejectedError(error.status, str(error)) from error
                raise
            server.loaded.add(adapter.name)
        server.ready = True

    async def _unload(self, server: Server, names: set[str]) -> None:
        """Take adapters that we loaded off a server, if it can be reached."""
        for name in names & server.loaded:
            with contextlib.suppress(AwayError, RejectedError, BadAnswerError, ServerRefusedError):
                await self._client.send("POST", f"{server.url}/unload_lora_adapter", {"lora_name": name})
            server.loaded.discard(name)
