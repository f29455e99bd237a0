"""Replies restricted to given texts: which token ids may come next, and which ids could have come.

A restricted reply is one of its choices, byte for byte, and then an end of turn. However a text may be cut into tokens,
every way is allowed: after the bytes said so far these are the tokens with which some choice goes on, and the ends of
turn where a choice is complete. So the mask follows from the choices and the sampled ids alone. It is not stored with
an episode; whoever trains on one makes it again with `episode_allowed`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from agent.episode import Episode
from agent.errors import ConstraintError
from agent.renderer import Renderer

#: Ids that were allowed at one position, in ascending order.
Allowed = tuple[int, ...]


class Vocabulary:
    """The bytes of every ordinary token of a tokenizer, and the tokens that end a restricted reply.

    Special tokens say nothing and are never part of a choice.

    Raises:
        ConstraintError: the tokenizer's tokens cannot be told as bytes.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.ends: Allowed = tuple(sorted({Renderer(tokenizer).end_of_turn, tokenizer.eos_token_id} - {None}))
        self.bytes = {id_: text for id_, text in _token_bytes(tokenizer) if id_ not in self.ends}
        self._ids: dict[bytes, list[int]] = {}
        for id_, text in self.bytes.items():
            self._ids.setdefault(text, []).append(id_)
        self._longest = max(map(len, self._ids), default=0)

    def allowed(self, choices: Iterable[bytes], said: bytes) -> Allowed:
        """The ids that may follow the bytes `said`; () where no choice begins with them."""
        ids: set[int] = set()
        for choice in choices:
            if not choice.startswith(said):
                continue
            rest = choice[len(said) :]
            if not rest:
                ids.update(self.ends)
            for length in range(1, min(len(rest), self._longest) + 1):
                ids.update(self._ids.get(rest[:length], ()))
        return tuple(sorted(ids))


class Restriction:
    """One restricted reply while it is sampled.

    Raises:
        ConstraintError: no choice can be written with the vocabulary's tokens.
    """

    def __init__(self, vocabulary: Vocabulary, choices: Sequence[str]) -> None:
        self._vocabulary = vocabulary
        self._choices = [choice.encode() for choice in choices]
        self._said = b""
        if not self.allowed:
            raise ConstraintError(f"none of the choices {list(choices)!r} can be written with the model's tokens")

    @property
    def allowed(self) -> Allowed:
        """The ids that may come next; () after the end of turn."""
        return self._vocabulary.allowed(self._choices, self._said)

    def advance(self, id_: int) -> None:
        """Take in the id that was sampled.

        Raises:
            ConstraintError: it was not allowed.
        """
        if id_ not in self.allowed:
            raise ConstraintError(f"token {id_} goes on from none of the choices after {self._said!r}")
        if id_ in self._vocabulary.ends:
            self._choices = []
        else:
            self._said += self._vocabulary.bytes[id_]


def allowed_ids(vocabulary: Vocabulary, choices: Sequence[str], reply: Sequence[int]) -> list[Allowed]:
    """The ids that were allowed at each position of a restricted reply.

    Raises:
        ConstraintError: the reply is not (the beginning of) one of the choices.
    """
    restriction = Restriction(vocabulary, choices)
    masks = []
    for id_ in reply:
        masks.append(restriction.allowed)
        restriction.advance(id_)
    return masks


def episode_allowed(vocabulary: Vocabulary, episode: Episode) -> list[Allowed | None]:
    """The ids that were allowed at each sampled token of an episode, in order; None where all were.

    There is one entry for each True in `episode.loss_mask`.

    Raises:
        ConstraintError: a reply does not fit the choices stored with its turn.
    """
    masks: list[Allowed | None] = []
    for turn in episode.turns:
        reply = episode.token_ids[turn.start : turn.end]
        if not all(episode.loss_mask[turn.start : turn.end]):
            continue
        masks += allowed_ids(vocabulary, turn.choices, reply) if turn.choices else [None] * len(reply)
    masks += [None] * (episode.sampled - len(masks))  # a last reply that no env answered
    return masks


def _token_bytes(tokenizer: Any) -> Iterable[tuple[int, bytes]]:
    """Every token's id and bytes, special tokens left out."""
    added = tokenizer.added_tokens_decoder
    kinds = _decoders(tokenizer)
    table = _byte_alphabet() if "ByteLevel" in kinds else None
    if table is None and not {"ByteFallback", "Replace", "Metaspace"} & kinds:
        raise ConstraintError(
            f"replies of {getattr(tokenizer, 'name_or_path', '') or 'this model'} cannot be restricted: "
            "its tokenizer is neither byte-level nor of the SentencePiece kind"
        )
    for token, id_ in tokenizer.get_vocab().items():
        if id_ in added:
            if not added[id_].special:
                yield id_, str(added[id_].content).encode()
        elif table is not None:
            if token and all(char in table for char in token):
                yield id_, bytes(table[char] for char in token)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            yield id_, bytes([int(token[3:5], 16)])
        elif token:
            yield id_, token.replace("\u2581", " ").encode()


def _decoders(tokenizer: Any) -> set[str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return set()
    state = json.loads(backend.decoder.__getstate__())
    return {part["type"] for part in (state, *state.get("decoders", ()))}


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes every byte as one printable character: printable Latin-1 as itself, others from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
