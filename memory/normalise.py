"""When two lines say the same: exactly (one id), or nearly (worth merging)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from functools import lru_cache

from memory.records import Item, digest

#: Share of common words from which two items with the same anchors are one.
NEAR = 0.8

WORD = re.compile(r"\w+")
ARTICLES = frozenset({"a", "an", "the"})
# What a lesson hangs on: markup, quoted forms, numbers and negations. Items that differ here differ.
ANCHOR = re.compile(
    r"</?[^<>\s]{1,40}>|\\\w+|`[^`]*`|\"[^\"]*\"|\d+|[{}\[\]]|\b(?:not|never|no|none|without|avoid|unless|only|\w+n['’]t)\b"
)


@lru_cache(maxsize=1 << 16)  # every new line is compared with all items
def normalised(text: str) -> str:
    """Lower case, single spaces, no punctuation at the end except a closing bracket or quote."""
    text = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return text.rstrip(".!?;:, ") or text


@lru_cache(maxsize=1 << 16)
def _anchors(text: str) -> frozenset[str]:
    return frozenset(ANCHOR.findall(text))


@lru_cache(maxsize=1 << 16)
def _words(text: str) -> frozenset[str]:
    return frozenset(WORD.findall(text)) - ARTICLES


def item_id(text: str) -> str:
    """The id that all spellings of one line share."""
    return digest(normalised(text))


def same_anchors(a: str, b: str) -> bool:
    """Whether two lines hold the same markup, numbers and negations."""
    return _anchors(normalised(a)) == _anchors(normalised(b))


def similarity(a: str, b: str) -> float:
    """Share of common words of two lines (Jaccard) in [0, 1]; 0 if they differ in markup, numbers or negations."""
    if not same_anchors(a, b):
        return 0.0
    a, b = normalised(a), normalised(b)
    words_a, words_b = _words(a), _words(b)
    if not words_a or not words_b:
        return float(a == b)
    return len(words_a & words_b) / len(words_a | words_b)


def nearest(
    text: str, known: Iterable[Item], threshold: float = NEAR, likeness: Callable[[str, str], float] = similarity
) -> Item | None:
    """The known item that says the same as `text`, the most alike first; None if none is alike enough."""
    id_ = item_id(text)
    best, best_likeness = None, threshold
    for item in known:
        if item.id == id_:
            return item
        found = likeness(text, item.text)
        if found > best_likeness or (best is None and found >= best_likeness):
            best, best_likeness = item, found
    return best
