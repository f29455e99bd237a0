"""Items that cannot both be followed: found by their words here, resolved by what they do on validation tasks.

Two items contradict when they speak of the same thing and one negates the other ("never push the box" beside "push
the box"), names the opposite ("open the door" beside "close the door"), or asks for another form of it ("write the
answer as <answer>12</answer>" beside "write the answer as {"answer": 12}"). Whether they really do is not decided here:
such items never share a knowledge text, and validation decides which one serves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from scipy.sparse import csr_array

from memory.normalise import ANCHOR, ARTICLES, WORD, normalised
from memory.records import Item

_BLOCK = 256  # items that are compared with all others at once
#: Share of common content words from which two items speak of the same thing.
SAME_MATTER = 0.6

_NEGATION = re.compile(
    r"\b(?:not|never|no|none|nothing|without|avoid(?:ing)?|stop|cannot|refuse|skip|\w+n['’]t)\b", re.IGNORECASE
)
_OPPOSITES = [
    frozenset(pair.split("/"))
    for pair in """
    open/close open/shut open/closed left/right up/down north/south east/west first/last before/after take/drop
    push/pull always/rarely more/less most/least many/few high/low higher/lower large/small long/short early/late
    upper/lower uppercase/lowercase capital/small inside/outside enter/leave start/end begin/end top/bottom on/off
    true/false yes/no with/without add/remove raw/cooked increase/decrease fast/slow quickly/slowly safe/dangerous
    forward/backward row/column horizontal/vertical positive/negative minimum/maximum allowed/forbidden keep/discard
    """.split()  # noqa: SIM905
]
_OPPOSED_TO: dict[str, frozenset[str]] = {
    word: frozenset(other for pair in _OPPOSITES if word in pair for other in pair - {word})
    for word in frozenset().union(*_OPPOSITES)
}
# Words that carry no matter of their own: what two items about different things share all the same.
_EMPTY = ARTICLES | frozenset(
    """
    always must should you your it its is are be to of in at by for as and or that this these those when if then do does
    will can has have i we they there here please make sure ensure remember each every any all
    """.split()  # noqa: SIM905
)
_COUNTS = frozenset("one two three four five six seven eight nine ten once twice".split())  # noqa: SIM905


def contradicts(a: str, b: str) -> str | None:
    """Why two items cannot both be followed, as far as words tell; None if they can."""
    a, b = normalised(a), normalised(b)
    words_a, words_b = content(a), content(b)
    opposed = {(w, o) for w in words_a - words_b for o in _OPPOSED_TO.get(w, ()) if o in words_b - words_a}
    shared = words_a & words_b
    whole = words_a | words_b
    matter = len(shared) / (len(whole) - 2 * len(opposed)) if len(whole) > 2 * len(opposed) else 0.0
    if not shared or matter < SAME_MATTER:
        return None
    if (_negations(a) - _negations(b)) % 2:
        return "one negates what the other says"
    if opposed:
        word, other = sorted(opposed)[0]
        return f"{word} against {other}"
    for forms_a, forms_b in ((_markup(a), _markup(b)), (numbers(a), numbers(b))):
        if forms_a and forms_b:
            return None if forms_a & forms_b else f"{min(forms_a)} against {min(forms_b)}"
    return None


def opposed(a: str, b: str) -> bool:
    """Whether one line says the opposite of the other in any word, whatever they speak of."""
    return (
        _negations(a) != _negations(b)
        or any(_OPPOSED_TO.get(word, frozenset()) & content(b) for word in content(a))
    )  # fmt: skip


def contradictions(items: Sequence[Item]) -> dict[tuple[str, str], str]:
    """All pairs of ids `(smaller, larger)` whose items contradict each other, with the reason."""
    ranked = sorted(items, key=lambda item: item.id)
    found = {}
    for row, column in _same_matter(ranked, ranked):
        one, other = ranked[row], ranked[column]
        if row < column and (why := contradicts(one.text, other.text)):
            found[one.id, other.id] = why
    return found


def conflicting(ones: Sequence[Item], others: Sequence[Item]) -> Iterator[tuple[Item, Item, str]]:
    """Each of `ones` with each of `others` that contradicts it and the reason, in their order."""
    for row, column in _same_matter(ones, others):
        if why := contradicts(ones[row].text, others[column].text):
            yield ones[row], others[column], why


def _same_matter(ones: Sequence[Item], others: Sequence[Item]) -> Iterator[tuple[int, int]]:
    """The positions of all pairs that share enough words to speak of the same thing, row by row.

    Counted for all pairs at once, 2,000 items in 0.3 s and 10,000 in 4 s; few are left to be looked at one by one.
    """
    if not ones or not others:
        return
    number: dict[str, int] = {}
    for item in (*ones, *others):
        for word in content(normalised(item.text)):
            number.setdefault(word, len(number))
    words_OV, words_UV, opposites_VV = _words(ones, number), _words(others, number), _opposites(number)
    size_O, size_U = words_OV.sum(axis=1), words_UV.sum(axis=1)
    for start in range(0, len(ones), _BLOCK):
        block = words_OV[start : start + _BLOCK]
        shared = (block @ words_UV.T).toarray()
        opposed = (block @ opposites_VV @ words_UV.T).toarray()  # at least as many as `contradicts` counts
        whole = size_O[start : start + _BLOCK, None] + size_U[None, :] - shared
        enough = (shared > 0) & (shared >= SAME_MATTER * (whole - 2 * opposed) - 1e-9)
        yield from ((start + int(row), int(column)) for row, column in np.argwhere(enough))


def _words(items: Sequence[Item], number: dict[str, int]) -> csr_array:
    """Which words each item holds, 1 or 0: `[items, words]`."""
    places = [(row, number[word]) for row, item in enumerate(items) for word in content(normalised(item.text))]
    rows, columns = zip(*places, strict=True) if places else ((), ())
    return csr_array((np.ones(len(places), dtype=np.int32), (rows, columns)), shape=(len(items), len(number)))


def _opposites(number: dict[str, int]) -> csr_array:
    """Which words are opposites, 1 or 0: `[words, words]`."""
    places = [(number[w], number[o]) for w in number.keys() & _OPPOSED_TO for o in _OPPOSED_TO[w] if o in number]
    rows, columns = zip(*places, strict=True) if places else ((), ())
    return csr_array((np.ones(len(places), dtype=np.int32), (rows, columns)), shape=(len(number), len(number)))


@lru_cache(maxsize=1 << 16)
def _negations(text: str) -> int:
    return len(_NEGATION.findall(text))


@lru_cache(maxsize=1 << 16)  # every new item is compared with all that are active
def content(text: str) -> frozenset[str]:
    """The words that carry the matter: no negations, no forms such as markup or numbers, no empty words."""
    plain = _NEGATION.sub(" ", ANCHOR.sub(_keep_words, normalised(text)))
    return frozenset(WORD.findall(plain)) - _EMPTY - _COUNTS


def _keep_words(match: re.Match[str]) -> str:
    """A quoted phrase is a form; a plain word that is an anchor, such as `only`, is matter."""
    return match[0] if match[0].isalpha() else " "


@lru_cache(maxsize=1 << 16)
def _markup(text: str) -> frozenset[str]:
    """Tags, commands, braces and quotations."""
    return frozenset(form for form in ANCHOR.findall(text) if not form[0].isalnum())


@lru_cache(maxsize=1 << 16)
def numbers(text: str) -> frozenset[str]:
    """The numbers of a text, in digits or in words up to ten."""
    text = normalised(text)
    return frozenset(form for form in ANCHOR.findall(text) if form.isdigit()) | (_COUNTS & set(WORD.findall(text)))
