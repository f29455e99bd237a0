"""The store: everything Engrain remembers, in one database."""

from __future__ import annotations

from typing import Any, Literal

import sqlalchemy as sa

from memory.episodes import EpisodeTable
from memory.errors import UnknownIdError
from memory.experience import ExperienceTable
from memory.lineage import LineageTable
from memory.schema import CheckpointRow, EpisodeRow, ItemRow, KnowledgeRow, RoundRow, RunRow

Kind = Literal["episode", "item", "knowledge", "checkpoint", "round", "run"]

_TABLES: dict[str, Any] = {
    "episode": EpisodeRow,
    "item": ItemRow,
    "knowledge": KnowledgeRow,
    "checkpoint": CheckpointRow,
    "round": RoundRow,
    "run": RunRow,
}


class Store(EpisodeTable, ExperienceTable, LineageTable):
    """Episodes, items, knowledge, checkpoints, evaluations and rounds, with what came from what.

    `with Store.open("runs.db") as store: ...`. Every write is one transaction; several processes may write at once.
    All methods raise `StoreError` when the database fails under them. `url` is for people: its password is hidden.
    """

    def full_id(self, kind: Kind, prefix: str) -> str:
        """The id that begins with `prefix`, an exact one first.

        Raises:
            UnknownIdError: none does, or several do; the message names some of them.
        """
        column = _TABLES[kind].id
        with self._read() as connection:
            if prefix and connection.scalar(sa.select(column).where(column == prefix)) is not None:
                return prefix
            query = sa.select(column).where(column.startswith(prefix, autoescape=True)).order_by(column).limit(4)
            found = list(connection.execute(query).scalars()) if prefix else []
        found = [id_ for id_ in found if id_.startswith(prefix)]  # SQLite's LIKE ignores case
        if not found:
            raise UnknownIdError(f"no {kind} {prefix!r} in {self.url}; list what there is")
        if len(found) > 1:
            raise UnknownIdError(f"{prefix!r} could be {', '.join(found)}; give more of the {kind}'s id")
        return str(found[0])

    def counts(self) -> dict[str, int]:
        """How many rows of each kind there are."""
        with self._read() as connection:
            return {
                kind: connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0
                for kind, table in _TABLES.items()
            }
