"""Text on its way to a terminal: what others wrote, and how many there are."""

from __future__ import annotations


def printable(value: object) -> str:
    """Foreign text without what a terminal would obey: control characters become U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in str(value))


def count(number: int, what: str) -> str:
    """`1 turn`, `2 turns`."""
    return f"{number} {what}{'' if number == 1 else 's'}"
