"""The one place where messages become token ids.

Everything is rendered with the model's own chat template. A conversation is rendered once, up to the first
generation header (`prompt`); after every sampled reply only what follows it is rendered (`bridge`). Earlier
ids are never produced again, so the ids that were sampled are the ids that are trained on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

from agent.episode import Message
from agent.errors import ChatTemplateError

#: Passed to every rendering. Thinking is off everywhere, so that teacher and student share one generation
#: header; the date is fixed, because a template that prints today's date would give other ids tomorrow.
TEMPLATE_KWARGS: Mapping[str, Any] = {"enable_thinking": False, "date_string": "26 Jul 2024"}

#: End-of-text tokens that models stop with although their template never writes them.
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "</s>", "<eos>", "<|end|>")

_PLACEHOLDER = "PLACEHOLDERANSWER"
_PROBES = ("a", "0 b", " c", "\n\nd", "Ünlü", "(e)")


class Renderer:
    """Turns messages into token ids for one tokenizer.

    `tokenizer` is a Hugging Face tokenizer with a chat template; `template_kwargs` are handed to the template
    on top of `TEMPLATE_KWARGS`, in every rendering alike.

    Raises:
        ChatTemplateError: the tokenizer has no chat template, or no vocabulary.
    """

    def __init__(self, tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None) -> None:
        if not getattr(tokenizer, "chat_template", None):
            name = getattr(tokenizer, "name_or_path", "") or "the model"
            raise ChatTemplateError(
                f"the tokenizer of {name} has no chat template; use an instruction-tuned model, "
                "or put a chat_template.jinja beside its tokenizer.json"
            )
        if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # as one that lost its tokenizer.json
            name = getattr(tokenizer, "name_or_path", "") or "the model"
            raise ChatTemplateError(
                f"the tokenizer of {name} reads text as no tokens at all; its tokenizer.json is missing or empty"
            )
        self.tokenizer = tokenizer
        self.template_kwargs = {**TEMPLATE_KWARGS, **(template_kwargs or {})}
        self._render_cached = lru_cache(maxsize=256)(self._render_uncached)

    def prompt(self, messages: Sequence[Message], knowledge: str | None = None) -> list[int]:
        """Ids of a whole conversation, generation header included.

        `knowledge` comes first in the system message, then a blank line and the system text, if there is one.
        Without either the template's own default system text (if it has one) stands.
        """
        return self._encode(self._render(self.compose(messages, knowledge), generate=True))

    def bridge(self, messages_before: Sequence[Message], observation_text: str, ended: bool) -> list[int]:
        """Ids to append after a sampled reply: end of turn, next user message, next generation header.

        `messages_before` are all messages before that reply (with or without knowledge: what follows the reply
        is the same).
        `ended` says that the sampled ids already end in `end_of_turn`, which is then not repeated.
        """
        placeholder = _PLACEHOLDER
        while placeholder in observation_text or any(placeholder in m.content for m in messages_before):
            placeholder += "X"
        turns = [
            *self.compose(messages_before),
            Message(role="assistant", content=placeholder),
            Message(role="user", content=self.defuse(observation_text)),
        ]
        ids = self._encode(self._after(self._render_uncached(tuple(turns), True), placeholder))
        start = ids.index(self.end_of_turn) if self.end_of_turn in ids else -1
        if start < 0 or self.decode(ids[:start]).strip():
            raise ChatTemplateError(
                "the chat template does not close an assistant turn that a user message follows in the way "
                "it closes the last one; it cannot be used for episodes of several turns"
            )
        return ids[start + 1 :] if ended else ids[start:]

    def reencode(self, text: str, ended: bool) -> list[int]:
        """Ids that spell a reply of which only the text is known, closed by `end_of_turn` if it `ended` there.

        They are not guaranteed to be the ids that were sampled: a text can be spelled in several ways, special tokens
        and broken characters are lost in it, and no log-probabilities belong to them. So they can be read as
        context, and must not be trained on (`Completion.exact`).
        """
        return self._encode(self.defuse(text)) + [self.end_of_turn] * ended

    def compose(self, messages: Sequence[Message], knowledge: str | None = None) -> tuple[Message, ...]:
        """The messages as the template gets them: knowledge first, special tokens in foreign text defused.

        Where the template has no system role, system text moves to the front of the first user message.
        """
        parts = [knowledge] if knowledge else []
        parts += [m.content for m in messages if m.role == "system" and m.content]
        system = self.defuse("\n\n".join(parts))
        rest = [
            m if m.role == "assistant" else Message(role=m.role, content=self.defuse(m.content))
            for m in messages
            if m.role != "system"
        ]
        if not system:
            return tuple(rest)
        if self.has_system_role:
            return (Message(role="system", content=system), *rest)
        if rest and rest[0].role == "user":
            return (Message(role="user", content=f"{system}\n\n{rest[0].content}"), *rest[1:])
        return (Message(role="user", content=system), *rest)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def prefix_ids(self, knowledge: str | None, system: str | None = None) -> list[int]:
        """Leading ids that every prompt with this knowledge (and, if given, this system text) begins with.

        Safe against tokens that merge across the border of the knowledge: the ids are those that prompts with
        different continuations have in common. `system=None` allows for any system text, or none.
        """
        systems = (*_PROBES, "") if system is None else (system,)
        prompts = [
            self.prompt([Message(role="system", content=s), Message(role="user", content=u)], knowledge)
            for s in systems
            for u in (_PROBES if s is systems[0] else _PROBES[:2])
        ]
        return common_prefix(*prompts)

    @cached_property
    def has_system_role(self) -> bool:
        """Whether the template renders a system message."""
        probe = (Message(role="system", content=_PLACEHOLDER), Message(role="user", content="a"))
        try:
            return _PLACEHOLDER in self._render(probe, generate=True)
        except ChatTemplateError:
            return False

    @cached_property
    def end_of_turn(self) -> int:
        """The token that the template writes right after an assistant's text.

        Raises:
            ChatTemplateError: it writes none, so sampling would never know where to stop.
        """
        turns = (Message(role="user", content="a"), Message(role="assistant", content=_PLACEHOLDER))
        tail = self._encode(self._after(self._render(turns, generate=False), _PLACEHOLDER))
        for id_ in tail:
            if id_ in self._special_ids:
                return id_
            if self.tokenizer.decode([id_]).strip():
                break
        raise ChatTemplateError(
            "the chat template writes no end-of-turn token after an assistant's text, so a reply would have "
            "no end; use a template with one (such as <|im_end|>) that is a special token of the tokenizer"
        )

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids at which a reply ends: the template's end of turn and the tokenizer's end-of-text tokens."""
        special = {self.tokenizer.convert_ids_to_tokens(i): i for i in self._special_ids}
        ids = {self.end_of_turn, *(special[t] for t in _END_OF_TEXT if t in special)}
        eos = self.tokenizer.eos_token_id
        if eos is not None:
            ids.update(eos if isinstance(eos, list) else [eos])
        return frozenset(ids)

    @cached_property
    def generation_header(self) -> tuple[int, ...]:
        """Ids between the last message and the first sampled token, the same for every prompt."""
        turns = (Message(role="user", content="a"),)
        closed, opened = (self._render(turns, generate=generate) for generate in (False, True))
        if not opened.startswith(closed):
            raise ChatTemplateError("the chat template changes earlier text for its generation header")
        return tuple(self._encode(opened[len(closed) :]))

    def defuse(self, text: str) -> str:
        """Break the spelling of special tokens: foreign text cannot end a turn or open another role."""
        return self._special_spelling.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return frozenset({*self.tokenizer.all_special_ids, *added})

    @cached_property
    def _special_spelling(self) -> re.Pattern[str]:
        spellings = (str(self.tokenizer.convert_ids_to_tokens(i)) for i in self._special_ids)
        marks = sorted(s for s in spellings if len(s) > 2 and not s.isalnum())
        return re.compile("|".join(map(re.escape, marks)) or r"(?!)")

    def _render(self, messages: Sequence[Message], *, generate: bool) -> str:
        return self._render_cached(tuple(messages), generate)

    def _render_uncached(self, messages: tuple[Message, ...], generate: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [m.model_dump() for m in messages],
                    tokenize=False,
                    add_generation_prompt=generate,
                    **self.template_kwargs,
                )
            )
        except Exception as error:  # templates raise jinja2 errors, and whatever their filters raise
            roles = ", ".join(m.role for m in messages)
            raise ChatTemplateError(f"the chat template refuses messages of roles {roles}: {error}") from error

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @staticmethod
    def _after(text: str, placeholder: str) -> str:
        _, found, tail = text.rpartition(placeholder)
        if not found:
            raise ChatTemplateError("the chat template leaves out the assistant's text")
        return tail


def common_prefix(*sequences: Sequence[int]) -> list[int]:
    """The longest run of leading ids that all sequences share; [] for no sequence."""
    if not sequences:
        return []
    lists = [list(sequence) for sequence in sequences]
    low, high = min(lists), max(lists)  # in lexical order all others lie between these two
    shared = 0
    while shared < len(low) and low[shared] == high[shared]:
        shared += 1
    return low[:shared]
