"""Finding the answer in a model's reply: under a convention, or anywhere.

All scans are linear in the reply's length; a reply is text to search, never to evaluate.
"""

from __future__ import annotations

import json
import re
from enum import StrEnum
from fractions import Fraction

_NUMBER = re.compile(r"(?<![\w.)])[-+−]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?|\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_PLAIN = re.compile(r"[-+]?(?:\d{1,60}(?:\.\d{0,60})?|\.\d{1,60})(?:/\d{1,60})?")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_ANSWER_IS = re.compile(r"\banswer\s*(?:is|=|:)[ \t]*:?[ \t]*([^\n]{1,200})", re.IGNORECASE)
#: Replies longer than this are searched at their end only: an answer stands last.
_SEARCHED = 100_000
#: Opening braces tried, from the last one back; bounds the price of a reply that is full of them.
_BRACES = 64


class Convention(StrEnum):
    """The only form in which an answer counts. `none` counts it anywhere."""

    NONE = "none"
    ANSWER_TAG = "answer_tag"
    JSON = "json"
    BOXED = "boxed"

    @property
    def example(self) -> str:
        """The form with a fixed value that says nothing about any task's answer; "" for `none`."""
        return _EXAMPLES[self]


_EXAMPLES = {
    Convention.NONE: "",
    Convention.ANSWER_TAG: "<answer>12</answer>",
    Convention.JSON: '{"answer": 12}',
    Convention.BOXED: "\\boxed{12}",
}


def plain_number(text: str) -> Fraction | None:
    """The value of an integer, decimal or `a/b`, thousands commas allowed; None for anything else.

    No exponents and at most 60 digits a part, so that no text is expensive.
    """
    text = text.strip().replace("−", "-")
    if len(text) > 130:
        return None
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    if not _PLAIN.fullmatch(text):
        return None
    top, _, bottom = text.partition("/")
    if bottom and not int(bottom):
        return None
    return Fraction(top) / (int(bottom) if bottom else 1)


def find_answer(reply: str, convention: Convention, *, numeric: bool = True) -> str | None:
    """The answer that `reply` gives under `convention`, or None where it gives none; the last one where several.

    Without a convention a `\\boxed{}`, an "answer is X" and, where the answer is `numeric`, the last number count;
    where it is not, the last line does.
    """
    text = reply[-_SEARCHED:]
    match convention:
        case Convention.ANSWER_TAG:
            found = _tagged(text)
        case Convention.JSON:
            found = _in_json(text)
        case Convention.BOXED:
            found = _boxed(text)
        case Convention.NONE:
            found = _anywhere(text, numeric)
    return found.strip() or None if found else None


def _tagged(text: str) -> str | None:
    start = text.rfind("<answer>", 0, max(text.rfind("</answer>"), 0))
    return text[start + len("<answer>") : text.find("</answer>", start)] if start >= 0 else None


def _in_json(text: str) -> str | None:
    start = len(text)
    for _ in range(_BRACES):
        start = text.rfind("{", 0, start)
        if start < 0:
            return None
        try:
            value = json.JSONDecoder().raw_decode(text, start)[0].get("answer")
        except (ValueError, RecursionError):
            continue
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return str(value)
    return None


def _boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    begin = start + len("\\boxed{")
    depth = 1
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin:position]
    return None


def _anywhere(text: str, numeric: bool) -> str | None:
    if boxed := _boxed(text):
        return boxed
    stated: list[str] = [found.strip().strip("*$` ").rstrip(".!") for found in _ANSWER_IS.findall(text)]
    if numeric:
        _, equals, right = stated[-1].rpartition("=") if stated else ("", "", "")
        # "The answer is 12 because 3 times 4" gives 12, "the answer is 3 * 4 = 12" too.
        said = _NUMBER.findall(right)
        numbers = (said if equals else said[:1]) or _NUMBER.findall(text)
        return str(numbers[-1]).rstrip(",") if numbers else None
    if stated:
        return stated[-1]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].rstrip(".!") if lines else None
