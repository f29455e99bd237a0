"""Whether an item holds for other tasks too, or quotes one task: its numbers, its names, its things, its answer.

What belongs to one task is found by comparison with others of its family. A number or a name is its own where it stands
in this task's texts and not in those of most others. Any other word is its own where the world names something by it
("the oak chest") and hardly any other task speaks of it anywhere; that takes several other tasks to tell. What the
feedback of several tasks says is the world's own (the `12` of "an answer is only read in this form:
<answer>12</answer>"), even if a task happens to hold it.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from agent.episode import Episode

#: Share of a family's tasks from which on a number or name that they all hold is general.
_COMMON = 0.5
#: Other tasks without which no word can be told to be rare.
_ENOUGH = 8
#: Share of the other tasks that may speak of a thing which is still one task's own; one of them always may.
_RARE = 0.1
_NUMBER = re.compile(r"(?<![\w.])\d+(?:[.,]\d+)*")
# A capital letter that does not begin a sentence or a line, and headings such as `-= Attic =-`.
_NAME = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]{2,}(?: [A-Z][a-z]+)*|(?<=-= )[^=\n]{2,40}(?= =-)")
_THING = re.compile(r"\b(?:an?|the|some|your)\s+([^\W\d_]{3,})(?:\s+([^\W\d_]{3,}))?", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]{3,}")
_SEARCHED = 20_000
_LONG = 60  # characters of a parameter that may be a term by itself

_ONES = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen
""".split()  # noqa: SIM905
_TENS = ["", "", *"twenty thirty forty fifty sixty seventy eighty ninety".split()]  # noqa: SIM905
_IN_WORDS = re.compile(
    r"\b(?:{0})(?:(?:[-\s]|(?<=thousand),\s|(?:(?<=hundred)|(?<=thousand))\sand\s)(?:{0}))*\b".format(
        "|".join([*_ONES, *_TENS[2:], "hundred", "thousand"])
    )
)
_PLAIN_WORDS = 10  # numbers up to this one are ordinary words: "write one line"
_SPELLED_BELOW = 10_000


def instance_terms(episodes: Sequence[Episode], others: Sequence[Episode] = ()) -> dict[str, frozenset[str]]:
    """By id of each of `episodes`: the numbers, names and words (lower case) that belong to its task alone.

    Args:
        episodes: of one family of tasks. With one task alone, every number and name that is not in its feedback counts
            as its own.
        others: further episodes of the family to compare with; the more, the better the general is told from the
            particular.
    """
    by_task: dict[str, list[Episode]] = defaultdict(list)
    for episode in {e.id: e for e in (*others, *episodes)}.values():
        by_task[episode.task.id].append(episode)
    own = {task: frozenset(term for episode in played for term in _own(episode)) for task, played in by_task.items()}
    count = Counter(term for terms in own.values() for term in terms)
    said = Counter(
        term for played in by_task.values() for term in frozenset(_terms(episode.feedback for episode in played))
    )
    several = len(by_task) > 1
    general = {term for term, n in count.items() if several and n >= _COMMON * len(by_task)}
    general |= {term for term, n in said.items() if n > 1 or not several}
    things = _rare_things(by_task) if len(by_task) > _ENOUGH else {}
    return {
        episode.id: (own[episode.task.id] - general) | things.get(episode.task.id, frozenset()) for episode in episodes
    }


def quoted_terms(text: str, terms: Collection[str]) -> list[str]:
    """Those of one task's terms that an item quotes, sorted. A number above ten may be written in words."""
    plain = text.casefold()
    spelled = {_as_spelled(found) for found in _IN_WORDS.findall(plain)}
    return sorted(
        term
        for term in terms
        if re.search(rf"(?<![\w.]){re.escape(term)}(?![\w]|\.\d)", plain)
        or (term.isdecimal() and len(term) <= len(str(_SPELLED_BELOW)) and _in_words(int(term)) in spelled)
    )


def _rare_things(by_task: Mapping[str, Sequence[Episode]]) -> dict[str, frozenset[str]]:
    """By task: what its world names there and hardly any other task's texts speak of."""
    texts = {task: [text for e in played for text in _world(e)] for task, played in by_task.items()}
    spoken = Counter(
        word for lines in texts.values() for word in {w for line in lines for w in _WORD.findall(line.casefold())}
    )
    most = 1 + max(1, int(_RARE * (len(by_task) - 1)))  # the task itself is one
    return {
        task: frozenset(
            word
            for line in lines
            for found in _THING.findall(line)
            for word in map(str.casefold, filter(None, found))
            if spoken[word] <= most
        )
        for task, lines in texts.items()
    }


def _world(episode: Episode) -> Iterator[str]:
    """What the world says in an episode, the feedback included."""
    for text in (
        *(message.content for message in episode.messages if message.role == "user"),
        *(turn.observation for turn in episode.turns),
        episode.feedback,
    ):
        yield text[:_SEARCHED]


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


def _in_words(number: int) -> str | None:
    """`125` as "one hundred twenty five"; None for numbers that are ordinary words, or too large."""
    return _words(number) if _PLAIN_WORDS < number < _SPELLED_BELOW else None


def _words(number: int) -> str:
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            rest = f" {_words(number % size)}" if number % size else ""
            return f"{_words(number // size)} {name}{rest}"
    if number < len(_ONES):
        return _ONES[number]
    return _TENS[number // 10] + (f" {_ONES[number % 10]}" if number % 10 else "")


def _as_spelled(found: str) -> str:
    words = [word for word in re.split(r"[-,\s]+", found) if word != "and"]
    return " ".join(["one", *words] if words[0] in ("hundred", "thousand") else words)
