"""The coach: another model that reads the episodes and writes down what they teach, here or on a server."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from agent.engines.server_client import AwayError, Client, RejectedError
from agent.engines.server_wire import BadAnswerError, check_url, the_choice
from agent.episode import Message, SamplingParams
from agent.errors import ServerFailedError, ServerRefusedError
from agent.models.resolve import resolve
from engrain.settings import Settings
from memory.reader import EngineReader, Reader, Reply

T = TypeVar("T")

_SHORT = 30.0  # seconds for the list of models
_AT_START = 10.0  # seconds that a server is waited for before a round begins
_AT_ONCE = 16  # requests under way
_LONGEST_WAIT = 15.0  # seconds between two tries
_CONTEXT = 8192  # tokens, where a server does not say
_BYTES_A_TOKEN = 3  # fewer than any common tokenizer's, so that an estimate errs on the safe side
_ROOM = 1024  # tokens: a strong model may think before it writes
_THINK, _THOUGHT = "<think>", "</think>"
#: Special tokens as models spell them: in a world's text they must not end a turn or open another role.
_SPECIAL = re.compile(
    r"<[|｜][^|｜<>\s]{1,40}[|｜]>|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]|<</?SYS>>|"
    r"</?s>|<(?:start|end)_of_turn>|<[be]os>"
)
_LONGEST = 64 * 1024  # characters of an answer that are kept


def parts(coach: str) -> tuple[str, str | None]:
    """`MODEL`, `MODEL@URL` or `URL` as model and URL; the model is "" where only a URL is given."""
    if coach.startswith(("http://", "https://")):
        return "", coach
    model, at, url = coach.partition("@http")
    return model, f"http{url}" if at else None


@contextmanager
def open_coach(coach: str, find: Callable[[str], Path] = resolve) -> Iterator[Reader]:
    """A reader for `MODEL` (in this process), `MODEL@URL` or `URL` (an OpenAI-compatible server), closed at the end.

    Args:
        coach: short name, folder or hub id; with `@http...` the name under which the server there serves it; a URL
            alone where that serves one model.
        find: a local model's folder; fetches it where needed.

    Raises:
        EngrainError: there is no such model, it does not load, or its server cannot be used.
    """
    model, url = parts(coach)
    reader: Reader
    if url is None:
        from agent.engines.transformers import TransformersEngine

        reader = EngineReader(TransformersEngine(find(model), name=model))
    else:
        reader = _on_server(url, model, Settings().server_patience)
    try:
        yield reader
    finally:
        reader.close()


def check_coach(coach: str, find: Callable[[str], Path] = resolve) -> None:
    """See that a coach can be opened, before anything is played: a local model is fetched, a server asked.

    Raises:
        EngrainError: it cannot.
    """
    model, url = parts(coach)
    if url is None:
        find(model)
    else:
        _on_server(url, model, _AT_START).close()


def _on_server(url: str, model: str, patience: float) -> ChatCoach:
    settings = Settings()
    key = settings.coach_api_key.get_secret_value()
    return ChatCoach(url, model, api_key=key, timeout=settings.server_timeout, patience=patience)


class ChatCoach:
    """A model behind an OpenAI-compatible server, asked by chat completions. See `memory.reader.Reader`.

    Nothing of the model is needed here, not even its tokenizer: what it writes is read as text, and as any model's text
    it must pass admission.

    Args:
        url: base URL, such as `http://127.0.0.1:8000/v1`.
        model: its name there; "" where the server serves one model alone.
        api_key: sent as a bearer token; never logged.
        timeout: seconds that one answer may take before it is asked for again.
        patience: seconds that a failed request is tried again.

    Raises:
        ServerRefusedError: the URL is none, or its server has no such model, several to choose from, or wants a key.
        ServerFailedError: no answer for `patience` seconds.
    """

    checkpoint = None

    def __init__(
        self, url: str, model: str = "", *, api_key: str = "", timeout: float = 600.0, patience: float = 300.0
    ) -> None:
        self._url = check_url(url)
        self._key, self._timeout, self._patience = api_key, timeout, patience
        self.model, self._context = asyncio.run(self._meet(model))

    def fits(self, messages: Sequence[Message], max_tokens: int) -> bool:
        """By the size of the text; the server's own count may only be lower."""
        size = sum(len(message.content.encode("utf-8", "replace")) for message in messages)
        return size // _BYTES_A_TOKEN + max(max_tokens, _ROOM) <= self._context

    def reply(self, conversations: Sequence[Sequence[Message]], sampling: Sequence[SamplingParams]) -> list[Reply]:
        """One answer to each conversation, in order.

        Raises:
            ServerRefusedError: the server does not do what was asked.
            ServerFailedError: no answer, or none that can be read, for `patience` seconds.
        """
        return asyncio.run(self._all(list(zip(conversations, sampling, strict=True))))

    def close(self) -> None:
        """Nothing is held between two calls."""

    async def _all(self, asked: Sequence[tuple[Sequence[Message], SamplingParams]]) -> list[Reply]:
        client, gate = Client(self._key, self._timeout), asyncio.Semaphore(_AT_ONCE)

        async def one(messages: Sequence[Message], sampling: SamplingParams) -> Reply:
            async with gate:
                return await self._patiently(lambda: self._ask(client, messages, sampling))

        try:
            return list(await asyncio.gather(*(one(*each) for each in asked)))
        finally:
            await client.close()

    async def _ask(self, client: Client, messages: Sequence[Message], sampling: SamplingParams) -> Reply:
        said = {"model": self.model, "messages": [{"role": m.role, "content": _defused(m.content)} for m in messages]}
        room = max(sampling.max_tokens, _ROOM)
        full = {"max_tokens": room, "temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed}
        url = f"{self._url}/chat/completions"
        try:
            answer = await client.json("POST", url, said | full)
        except RejectedError:  # some servers know neither seeds nor temperatures
            answer = await client.json("POST", url, said | {"max_completion_tokens": room})
        return _reply(the_choice(answer))

    async def _meet(self, model: str) -> tuple[str, int]:
        """The model's name on the server, and its context in tokens."""
        client = Client(self._key, self._timeout)
        try:
            answer = await self._patiently(lambda: client.json("GET", f"{self._url}/models", limit=_SHORT))
        finally:
            await client.close()
        data = answer.get("data") if isinstance(answer, dict) else None
        cards = [c for c in data if isinstance(c, dict) and "id" in c] if isinstance(data, list) else []
        served = [card for card in cards if not card.get("parent")]
        found = [card for card in served if not model or _names(card) & {model, Path(model).name}]
        if len(found) != 1:
            names = ", ".join(str(card["id"]) for card in served[:10]) or "nothing"
            raise ServerRefusedError(
                f"{self._url} serves {names}" + (f", not {model}" if model else "") + "; give the coach as MODEL@URL"
            )
        length = found[0].get("max_model_len")
        return str(found[0]["id"]), length if isinstance(length, int) and length > 0 else _CONTEXT

    async def _patiently(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """What `attempt` gives, tried again while the server is away, overloaded or talks nonsense."""
        loop = asyncio.get_running_loop()
        deadline, pause = loop.time() + self._patience, 0.5
        while True:
            try:
                return await attempt()
            except RejectedError as error:
                raise ServerRefusedError(f"{self._url} refuses what a coach is asked: {error}") from error
            except (AwayError, BadAnswerError) as error:
                wait = max(pause, error.wait if isinstance(error, AwayError) else 0.0)
                if loop.time() + wait > deadline:
                    raise ServerFailedError(
                        f"{self._url} gave no answer that can be used for {self._patience:g} s: {error}"
                    ) from error
                await asyncio.sleep(wait)
                pause = min(2 * pause, _LONGEST_WAIT)


def _defused(text: str) -> str:
    """As `Renderer.defuse`, for tokenizers that are not here."""
    return _SPECIAL.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)


def _names(card: Mapping[str, Any]) -> set[str]:
    return {name for full in (str(card["id"]), str(card.get("root"))) for name in (full, Path(full).name)}


def _reply(choice: Mapping[str, Any]) -> Reply:
    """What was written, without the thoughts before it."""
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    if text is not None and not isinstance(text, str):
        raise BadAnswerError("the answer is no text")
    text = (text or "").rpartition(_THOUGHT)[2].strip("\n")
    if text.lstrip().startswith(_THINK):  # it never came to an end
        text = ""
    return Reply(text[:_LONGEST], choice.get("finish_reason") == "stop" and len(text) <= _LONGEST)
