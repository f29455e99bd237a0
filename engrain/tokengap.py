"""The gap that training closes, token by token: log p_teacher - log p_student of what was sampled.

The teacher reads the knowledge and the task, the student the task alone; both read the same reply. Where the gap is
below zero the knowledge speaks against the token, and training takes probability from it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from agent.episode import Episode
from agent.renderer import Renderer
from engrain.match import sampled_turns

if TYPE_CHECKING:  # it imports torch, which a person who plays alone need not wait for
    from engrain.scoring import Scorer

_LONGEST = 4  # bytes of a character in UTF-8


@dataclass(frozen=True)
class TokenGap:
    """One sampled token. `text` is what it adds to the reply; "" where a later token completes a character."""

    id: int
    text: str
    student: float  # natural log of its probability without the knowledge
    teacher: float  # and with it

    @property
    def gap(self) -> float:
        """In nats; above 0 where the knowledge makes the token likelier."""
        return self.teacher - self.student


@dataclass(frozen=True)
class ReplyGap:
    """One reply of an episode; `turn` counts from 1."""

    turn: int
    tokens: tuple[TokenGap, ...]

    @property
    def total(self) -> float:
        """The sum over its tokens, in nats: how much likelier the whole reply is with the knowledge."""
        return sum(token.gap for token in self.tokens)

    @property
    def mean(self) -> float:
        """The total a token."""
        return self.total / len(self.tokens) if self.tokens else 0.0

    def largest(self, count: int) -> list[TokenGap]:
        """The tokens with the largest gaps either way, in their order in the reply."""
        chosen = sorted(range(len(self.tokens)), key=lambda i: -abs(self.tokens[i].gap))[:count]
        return [self.tokens[i] for i in sorted(chosen)]

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {"turn": self.turn, "total": self.total, "tokens": [asdict(token) for token in self.tokens]}


def token_gap(
    scorer: Scorer,
    episode: Episode,
    knowledge: str,
    teacher_weights: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[ReplyGap]:
    """The gap of every reply that the model sampled; a person's words have none. Two forwards an episode.

    Args:
        scorer: with the weights that played loaded: the student.
        episode: played with or without knowledge.
        knowledge: what the teacher reads.
        teacher_weights: within it the scorer's engine has the teacher's weights, where they are not the student's own.

    Raises:
        NothingSampledError: there is no sampled token.
        DistillConfigError: the teacher's sequence does not fit the model's context.
    """
    sample = scorer.sample(episode, knowledge)
    student = scorer.logprobs(sample, sample.student_prompt)
    with teacher_weights():
        teacher = scorer.logprobs(sample, sample.teacher_prompt)
    sampled = [id_ for id_, mark in zip(episode.token_ids, episode.loss_mask, strict=True) if mark]
    replies = []
    for number, place in sampled_turns(episode):
        ids = sampled[place]
        rows = zip(ids, pieces(ids, scorer.renderer), student[place], teacher[place], strict=True)
        replies.append(ReplyGap(number + 1, tuple(TokenGap(*row) for row in rows)))
    return replies


def pieces(ids: list[int], renderer: Renderer) -> list[str]:
    """What each id adds to the text; special tokens under their own names, in angle brackets.

    A character that several ids spell stands with the last of them.
    """
    found = []
    before: list[int] = []  # some tokenizers drop the space of a first word
    pending: list[int] = []
    special = renderer.tokenizer.added_tokens_decoder
    for id_ in ids:
        if id_ in special and special[id_].special:
            before, pending = [], []
            found.append("<end>" if id_ in renderer.stop_ids else str(special[id_].content))
            continue
        pending.append(id_)
        text = renderer.decode([*before, *pending])[len(renderer.decode(before)) :]
        if text.endswith("\ufffd") and len(pending) < _LONGEST:
            found.append("")
        else:
            found.append(text)
            before, pending = [id_], []
    return found
