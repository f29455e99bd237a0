"""What a user names by number, by id or as a file, found."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from envs.errors import UsageError
from memory.records import Knowledge, digest
from memory.store import Store


def find_knowledge(given: str, store: Store) -> Knowledge:
    """A stored knowledge version (`3`, or its id), or the text of a file.

    Raises:
        UsageError: it is neither.
    """
    path = as_path(given) if given else None
    if path is not None and path.is_dir():
        raise UsageError(f"knowledge {given} is a folder; name a text file, or a version in the store")
    if path is not None and path.is_file():
        try:
            text = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"knowledge file {given} cannot be read: {error}") from error
        if not text:
            raise UsageError(f"knowledge file {given} is empty; write the text that shall stand in the system message")
        return Knowledge(id=digest(text), items=(), text=text, tokens=0)
    return store.knowledge(by_number(store.knowledge_versions(), "version", given) or store.full_id("knowledge", given))


def by_number(records: Iterable[Any], field: str, given: str) -> str | None:
    """The id of the record whose number is written in `given`; a number wins over an id that begins with its digits."""
    return next((str(record.id) for record in records if str(getattr(record, field)) == given), None)


def as_path(given: str) -> Path | None:
    """A path that may be asked whether it exists; None for what cannot be one, such as a name that is too long."""
    try:
        path = Path(given).expanduser()
        path.exists()
    except (OSError, RuntimeError):
        return None
    return path
