"""Whether an item holds for other tasks too, or quotes one task: its numbers, its names, its answer.

What belongs to one task is found by comparison: a number or a name that stands in this episode's task, replies or
parameters and not in those of most others. What the feedback of several episodes says is the world's own (the `12` of
"an answer is only read in this form: <answer>12</answer>"), even if a task happens to hold it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from agent.episode import Episode

#: Share of a family's episodes from which on what they all say is general.
_COMMON = 0.5
_NUMBER = re.compile(r"(?<![\w.])\d+(?:[.,]\d+)*")
# A capital letter that does not begin a sentence or a line, and headings such as `-= Attic =-`.
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]{2,}(?: [A-Z][a-z]+)*|(?<=-= )[^=\n]{2,40}(?= =-)")
_SEARCHED = 20_000
_LONG = 60  # characters of a parameter that may be a term by itself


def instance_terms(episodes: Sequence[Episode]) -> dict[str, frozenset[str]]:
    """By episode id: the numbers and names (lower case) that belong to its task alone.

    Args:
        episodes: of one family of tasks; the more there are, the better the general is told from the particular. With
            one alone, everything that is not in its feedback counts as its own.
    """
    own = {episode.id: frozenset(_own(episode)) for episode in episodes}
    count = Counter(term for terms in own.values() for term in terms)
    said = Counter(term for episode in episodes for term in frozenset(_terms([episode.feedback])))
    several = len(episodes) > 1
    general = {term for term, n in count.items() if several and n >= _COMMON * len(episodes)}
    general |= {term for term, n in said.items() if n > 1 or not several}
    return {id_: terms - general for id_, terms in own.items()}


def quoted_terms(text: str, terms: Collection[str]) -> list[str]:
    """Those of one task's terms that an item quotes, sorted."""
    plain = text.casefold()
    return sorted(term for term in terms if re.search(rf"(?<![\w.]){re.escape(term)}(?![\w]|\.\d)", plain))


def _own(episode: Episode) -> Iterator[str]:
    yield from _terms(
        [turn.observation for turn in episode.turns]
        + [turn.action for turn in episode.turns]
        + [message.content for message in episode.messages if message.role == "user"]
    )
    for value in _leaves(episode.task.parameters):
        yield from _terms([value])
        if 1 < len(value) <= _LONG and any(c.isalpha() for c in value) and " " not in value:
            yield value.casefold()


def _terms(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for pattern in (_NUMBER, _NAME):
            yield from (found.strip().casefold() for found in pattern.findall(text[:_SEARCHED]))


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool)):
        yield str(value)
