"""What goes over the wire to an OpenAI-compatible server: a completion request, and what the answer means.

Nothing here does any input or output. vLLM takes token ids and gives back those it sampled with their
log-probabilities; other servers understand less, and `Dialect` says how much.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

from agent.constraint import Vocabulary, allowed_ids
from agent.engines.base import Completion
from agent.episode import FinishReason, SamplingParams
from agent.errors import ConstraintError, ServerRefusedError
from agent.renderer import Renderer

#: Text in which different vocabularies differ: scripts, digits, white space, code.
PROBE = "Ünlü 東京 12345 counted\n\n\tdef f(x): return x ** 2  # déjà vu"

_TOKEN_ID = "token_id:"  # noqa: S105 - how vLLM spells an id where a token's text is expected


class BadAnswerError(Exception):
    """An answer that cannot be what was asked for: not JSON, no choice, ids that do not fit."""


@dataclass(frozen=True)
class Dialect:
    """How much of the request a server was found to understand."""

    takes_ids: bool  # a prompt may be token ids; else it is text with the special tokens spelled out
    extensions: bool  # vLLM's own fields are accepted
    returns_ids: bool = False

    @property
    def exact(self) -> bool:
        """Whether the ids that are sent and received are the ids that the model read and sampled."""
        return self.takes_ids and self.returns_ids

    def lacks(self, sampling: SamplingParams) -> str:
        """Which of the parameters cannot be said in it; "" for none."""
        if self.extensions:
            return ""
        return "top_k" if sampling.top_k else "replies restricted to given actions" if sampling.choices else ""


#: What is tried on a new server, the best first.
DIALECTS = tuple(Dialect(takes_ids, extensions) for takes_ids in (True, False) for extensions in (True, False))


def check_url(url: str) -> str:
    """The base URL without a trailing slash.

    Raises:
        ServerRefusedError: it is no http(s) URL, or carries a password, which would end up in logs.
    """
    try:
        parts = urlsplit(url.strip())
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        parts, good = urlsplit(""), False
    if parts.username or parts.password:
        raise ServerRefusedError(
            f"the server URL at {parts.hostname} carries a user or password; put a key in ENGRAIN_API_KEY instead"
        )
    if not good or parts.query or parts.fragment or any(c.isspace() for c in url.strip()):
        raise ServerRefusedError(f"{url!r} is no server URL; write for instance http://127.0.0.1:8000/v1")
    return url.strip().rstrip("/")


class Wire:
    """Writes requests and reads answers for one model; `renderer` is the model's own."""

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What restricted replies are checked with."""
        return Vocabulary(self.renderer.tokenizer)

    def request(self, model: str, prompt: Sequence[int], sampling: SamplingParams, dialect: Dialect) -> dict[str, Any]:
        """The JSON of one request to `/completions`.

        Every sampling parameter is named, because servers fill in what is missing from the model's own defaults.
        What the dialect has no word for (`Dialect.lacks`) is left out.
        """
        body: dict[str, Any] = {
            "model": model,
            "prompt": list(prompt) if dialect.takes_ids else self._spelled(prompt),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        if dialect.extensions:
            body |= {
                "top_k": sampling.top_k,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "stop_token_ids": sorted(self.vocabulary.ends if sampling.choices else self.renderer.stop_ids),
                "add_special_tokens": False,
                "logprobs": 0,
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
            }
            if sampling.choices:
                body["structured_outputs"] = {"choice": list(dict.fromkeys(sampling.choices))}
        if not dialect.exact:
            body["stop"] = [self.renderer.tokenizer.decode([self.renderer.end_of_turn])]
        return body

    def completion(
        self, answer: object, prompt: Sequence[int], sampling: SamplingParams, dialect: Dialect
    ) -> Completion:
        """What the server sampled.

        From a server that gives ids these are taken as they are, and checked: they must be as many as the
        log-probabilities, sampled after this very prompt, and within the choices of a restricted reply. From any
        other one the text is encoded, and `Completion.exact` is False.

        Raises:
            BadAnswerError: the answer has not the form, or the ids do not fit.
        """
        choice = the_choice(answer)
        finish = _finish(choice)
        if not dialect.exact:
            return self._of_text(choice.get("text"), sampling, finish, _cached(answer))
        ids = sampled_ids(choice)
        if ids is None:
            raise BadAnswerError("the answer has no token ids")
        echoed = choice.get("prompt_token_ids")
        if echoed is not None and echoed != list(prompt):
            raise BadAnswerError("the answer belongs to other prompt ids than those that were sent")
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(logprobs, list) or not all(isinstance(p, int | float) for p in logprobs):
            raise BadAnswerError("the answer has no log-probabilities")
        if not 0 < len(ids) <= sampling.max_tokens or len(ids) != len(logprobs):
            raise BadAnswerError(
                f"the answer has {len(ids)} token ids and {len(logprobs)} log-probabilities for at most "
                f"{sampling.max_tokens} tokens"
            )
        if sampling.choices:
            try:
                allowed_ids(self.vocabulary, sampling.choices, ids)
            except ConstraintError as error:
                raise BadAnswerError(f"the reply is not one of those it was restricted to: {error}") from error
        return Completion(tuple(ids), tuple(map(float, logprobs)), finish, _cached(answer))

    def _of_text(self, text: object, sampling: SamplingParams, finish: FinishReason, cached: int) -> Completion:
        if not isinstance(text, str):
            raise BadAnswerError("the answer has no text")
        if sampling.choices and text not in sampling.choices:
            raise BadAnswerError(f"the reply {text!r} is not one of those it was restricted to")
        ids = self.renderer.reencode(text, finish is FinishReason.STOP)[: sampling.max_tokens]
        return Completion(tuple(ids), (0.0,) * len(ids), finish, cached, exact=False)

    def _spelled(self, prompt: Sequence[int]) -> str:
        """A prompt as text, special tokens included, for servers that take no ids."""
        decode = self.renderer.tokenizer.decode
        return str(decode(list(prompt), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def sampled_ids(choice: Mapping[str, Any]) -> list[int] | None:
    """The ids of one choice, from either of the places where vLLM writes them; None where there are none.

    Raises:
        BadAnswerError: they are no ids.
    """
    found = choice.get("token_ids")
    if found is None:
        tokens = (choice.get("logprobs") or {}).get("tokens")
        if not tokens or not all(isinstance(t, str) and t.startswith(_TOKEN_ID) for t in tokens):
            return None
        found = [int(t.removeprefix(_TOKEN_ID)) for t in tokens if t.removeprefix(_TOKEN_ID).isdecimal()]
    if not isinstance(found, list) or not all(type(i) is int and i >= 0 for i in found):
        raise BadAnswerError("the answer's token ids are not numbers")
    return found


def top_logprob(answer: object) -> float | None:
    """The largest log-probability reported for the first sampled token; None where none is."""
    top = (the_choice(answer).get("logprobs") or {}).get("top_logprobs")
    if not isinstance(top, list) or not top or not isinstance(top[0], dict):
        return None
    values = [v for v in top[0].values() if isinstance(v, int | float)]
    return max(values, default=None)


def prompt_ids(answer: object) -> list[int] | None:
    """The prompt's ids as the server says it read them; None if it does not say."""
    found = the_choice(answer).get("prompt_token_ids")
    return found if isinstance(found, list) else None


def error_text(content: bytes, limit: int = 300) -> str:
    """What a server says went wrong, in one line, from the several shapes that servers give it."""
    try:
        said: Any = json.loads(content)
    except ValueError:
        said = content.decode(errors="replace")
    while isinstance(said, dict):
        said = next((said[k] for k in ("error", "message", "detail") if k in said), str(said))
    line = " ".join(str(said).split())
    return line if len(line) <= limit else f"{line[:limit]} …"


def the_choice(answer: object) -> dict[str, Any]:
    """The one completion in an answer.

    Raises:
        BadAnswerError: there is none, or several.
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise BadAnswerError("the answer is not one completion")
    return choices[0]


def _finish(choice: Mapping[str, Any]) -> FinishReason:
    try:
        return FinishReason(str(choice.get("finish_reason")))
    except ValueError:
        raise BadAnswerError(f"the reply was broken off: finish_reason {choice.get('finish_reason')!r}") from None


def _cached(answer: object) -> int:
    usage = answer.get("usage") if isinstance(answer, dict) else None
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    found = details.get("cached_tokens") if isinstance(details, dict) else None
    return found if isinstance(found, int) else 0
