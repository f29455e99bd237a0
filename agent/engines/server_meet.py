"""Getting to know a server: is it there, what does it call the model, what does it understand, can it be trusted."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.engines.server_client import AwayError, Client, RejectedError
from agent.engines.server_wire import (
    DIALECTS,
    PROBE,
    BadAnswerError,
    Dialect,
    Wire,
    prompt_ids,
    sampled_ids,
    the_choice,
    top_logprob,
)
from agent.episode import SamplingParams
from agent.errors import ServerRefusedError

logger = logging.getLogger(__name__)

_SHORT = 30.0  # seconds for the list of models
_SAME = 0.25  # nats by which two readings of one log-probability may differ


@dataclass
class Server:
    """One base URL and what is known about it."""

    url: str
    served: str = ""  # the model's name there
    dialect: Dialect | None = None  # None: never met
    max_context: int | None = None  # None: it does not say
    ready: bool = False  # the model, and the adapter in use, were seen there since it last went away
    loaded: set[str] = field(default_factory=set)  # adapters that we loaded there
    requests: int = 0  # under way
    work: int = 0  # their tokens
    failures: int = 0  # in a row
    resting_until: float = 0.0  # loop time

    def limit(self, in_flight: int) -> int:
        """How many requests may be under way: one at a time after a failure."""
        return in_flight if self.ready and not self.failures else 1


@dataclass(frozen=True)
class Meeting:
    """Meets servers of one model.

    Args:
        name: the model's name as the user gave it.
        aliases: other names or paths under which a server may list it.
        wire: reads and writes for that model.
    """

    client: Client
    name: str
    aliases: Sequence[str]
    wire: Wire

    async def check(self, server: Server) -> frozenset[str]:
        """See that a server has the model; on the first time, learn what it understands. The names that it lists.

        Raises:
            AwayError: it cannot be reached now.
            ServerRefusedError: it serves another model, or reads or reports in a way that cannot be worked with.
        """
        cards = await self._cards(server)
        if server.dialect is None:
            await self._meet(server, cards)
        elif server.served not in cards:
            raise ServerRefusedError(f"{server.url} no longer serves {server.served}, but {', '.join(cards)}")
        return frozenset(cards)

    async def _cards(self, server: Server) -> dict[str, Mapping[str, Any]]:
        """What a server lists, by name: base models and adapters."""
        try:
            answer = await self.client.json("GET", f"{server.url}/models", limit=_SHORT)
            data = answer.get("data") if isinstance(answer, dict) else None
            if not isinstance(data, list) or not all(isinstance(card, dict) and "id" in card for card in data):
                raise BadAnswerError("the answer has another form")
        except (RejectedError, BadAnswerError) as error:
            if server.dialect is not None:  # it was a good one before
                raise AwayError(f"no list of models: {error}") from error
            raise ServerRefusedError(
                f"{server.url}/models gives no list of models: {error}; "
                "the URL of an OpenAI-compatible server usually ends in /v1"
            ) from error
        return {str(card["id"]): card for card in data}

    async def _meet(self, server: Server, cards: Mapping[str, Mapping[str, Any]]) -> None:
        """Find the model's name on a server, and what the server understands."""
        base = {id_: card for id_, card in cards.items() if not card.get("parent")}
        wanted = {self.name, *self.aliases}
        wanted |= {Path(name).name for name in wanted}
        names = {
            id_: {n for full in (id_, str(card.get("root"))) for n in (full, Path(full).name)}
            for id_, card in base.items()
        }
        server.served = next((id_ for id_ in base if names[id_] & wanted), "")
        if not server.served:
            raise ServerRefusedError(
                f"{server.url} serves {', '.join(base) or 'nothing'}, not {self.name}; "
                f"name what it serves with --model, or start it with --served-model-name {self.name}"
            )
        length = base[server.served].get("max_model_len")
        server.max_context = length if isinstance(length, int) and length > 0 else None
        dialect, answer = await self._probe(server)
        if dialect.exact:
            await self._compare(server, dialect, answer)
        else:
            logger.warning(
                "%s does not return token ids: replies are encoded from their text, which need not give the ids that "
                "were sampled, so nothing that is played with it is trained on",
                server.url,
            )
        server.dialect = dialect

    async def _probe(self, server: Server) -> tuple[Dialect, object]:
        """The best dialect that a server accepts, and its answer to a request for one token."""
        sampling = SamplingParams(max_tokens=1, seed=0)
        refused: RejectedError | None = None
        for dialect in DIALECTS:
            body = self.wire.request(server.served, self._probe_ids, sampling, dialect)
            if dialect.extensions:
                body["logprobs"] = 5
            try:
                answer = await self.client.json("POST", f"{server.url}/completions", body)
            except RejectedError as error:
                refused = error
                continue
            returns_ids = sampled_ids(the_choice(answer)) is not None and top_logprob(answer) is not None
            return Dialect(dialect.takes_ids, dialect.extensions, returns_ids), answer
        raise ServerRefusedError(f"{server.url} does not complete prompts: {refused}")

    async def _compare(self, server: Server, dialect: Dialect, answer: object) -> None:
        """Refuse a server that reads text as other ids than we do, or reports tempered log-probabilities."""
        sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.25)
        body = self.wire.request(server.served, self._probe_ids, sampling, dialect)
        again = await self.client.json("POST", f"{server.url}/completions", body | {"prompt": PROBE, "logprobs": 5})
        ids = prompt_ids(again)
        if ids is not None and ids != self._probe_ids:
            raise ServerRefusedError(
                f"{server.url} splits text into other tokens than {self.name} does; it serves another model"
            )
        plain, tempered = top_logprob(answer), top_logprob(again)
        if plain is not None and tempered is not None and (plain > 1e-3 or abs(plain - tempered) > _SAME):
            raise ServerRefusedError(
                f"{server.url} does not report the model's own log-probabilities; "
                "start it with --logprobs-mode raw_logprobs"
            )

    @property
    def _probe_ids(self) -> list[int]:
        return list(self.wire.renderer.tokenizer(PROBE, add_special_tokens=False)["input_ids"])
