"""Foreign text on its way to a terminal."""

from __future__ import annotations


def printable(value: object) -> str:
    """Foreign text without what a terminal would obey: control characters become U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in str(value))
