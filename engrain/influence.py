"""Which items of a knowledge moved a reply: each is left out in turn, and the reply's log-probability compared."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from agent.episode import Episode
from engrain.errors import NothingSampledError
from engrain.match import sampled_turns
from memory.records import Knowledge
from memory.render import render_knowledge

if TYPE_CHECKING:
    from engrain.scoring import Scorer

#: Items that are left out at most, each at the price of one forward.
MOST_ITEMS = 24

_BULLET = re.compile(r"\s*(?:[-*+•]|\d+[.)])\s+(?=\S)")


@dataclass(frozen=True)
class ItemInfluence:
    """One item. `changes[i]` is log p(reply i | all items) - log p(reply i | all but this one), in nats."""

    id: str  # "" for a line of a text file
    text: str
    changes: tuple[float, ...]

    @property
    def total(self) -> float:
        """Over all replies: above 0 where the item made what was said likelier."""
        return sum(self.changes)


@dataclass(frozen=True)
class Influence:
    """What each item did to each reply.

    `turns` are the numbers, from 1, of the replies that the model sampled, in the order of `changes`; `logprobs` are
    those replies' log-probabilities with all items. `untried` items came after the most that were tried.
    """

    turns: tuple[int, ...]
    logprobs: tuple[float, ...]
    items: tuple[ItemInfluence, ...]
    untried: int
    forwards: int

    def of(self, place: int) -> list[tuple[ItemInfluence, float]]:
        """The items with their change of one reply, the largest either way first."""
        return sorted(((item, item.changes[place]) for item in self.items), key=lambda pair: -abs(pair[1]))

    def facts(self) -> dict[str, Any]:
        """For JSON; items by their total, the largest either way first."""
        items = sorted(self.items, key=lambda item: -abs(item.total))
        return {
            "turns": self.turns,
            "logprobs": self.logprobs,
            "items": [{**asdict(item), "total": item.total} for item in items],
            "untried": self.untried,
            "forwards": self.forwards,
        }


@dataclass(frozen=True)
class _Line:
    """An item, and the whole text without it; None where nothing is left."""

    id: str
    text: str
    rest: str | None


def influence(
    scorer: Scorer,
    episode: Episode,
    knowledge: Knowledge,
    *,
    most: int = MOST_ITEMS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Influence:
    """Leave each item out of the knowledge once, and score the episode's own replies: one forward an item, and one.

    Args:
        scorer: with the weights that played loaded.
        episode: played with this knowledge, or with another or none: then it says what the items would have moved.
        knowledge: whose items are left out; the lines of a text that has none.
        most: how many items are tried, in their order.
        progress: told the forwards done, and all that there will be.

    Raises:
        NothingSampledError: there is no sampled token.
        DistillConfigError: a sequence does not fit the model's context.
    """
    lines = parts(knowledge)
    tried = lines[:most]
    turns = sampled_turns(episode)
    if not turns:
        raise NothingSampledError(f"episode {episode.id[:10]} has no reply that the model sampled and the world heard")
    total = len(tried) + 1

    def replies(text: str | None) -> list[float]:
        sample = scorer.sample(episode, text or "")
        logprobs = scorer.logprobs(sample, sample.teacher_prompt)
        return [sum(logprobs[place]) for _, place in turns]

    whole = replies(knowledge.text)
    progress(1, total)
    found = []
    for done, line in enumerate(tried, 2):
        without = replies(line.rest)
        changes = tuple(a - b for a, b in zip(whole, without, strict=True))
        found.append(ItemInfluence(line.id, line.text, changes))
        progress(done, total)
    return Influence(
        turns=tuple(number + 1 for number, _ in turns),
        logprobs=tuple(whole),
        items=tuple(found),
        untried=len(lines) - len(tried),
        forwards=total,
    )


def parts(knowledge: Knowledge) -> list[_Line]:
    """The knowledge's items, each with the text that is left without it, rendered as it would have been.

    A text that was written by hand is taken line by line: its bullet points, or all its lines where it has none.
    """
    if knowledge.items:
        texts = [item.text for item in knowledge.items]
        if render_knowledge(texts) == knowledge.text:
            return [
                _Line(item.id, item.text, render_knowledge([*texts[:place], *texts[place + 1 :]]) or None)
                for place, item in enumerate(knowledge.items)
            ]
    lines = knowledge.text.splitlines()
    bullets = [place for place, line in enumerate(lines) if _BULLET.match(line)]
    chosen = bullets or [place for place, line in enumerate(lines) if line.strip()]
    return [
        _Line("", _BULLET.sub("", lines[place], 1).strip(), _without(lines, place, only=len(chosen) == 1))
        for place in chosen
    ]


def _without(lines: Sequence[str], place: int, *, only: bool) -> str | None:
    """The text without one line; without its only item nothing is left, not even a heading."""
    return None if only else "\n".join([*lines[:place], *lines[place + 1 :]]).strip() or None
