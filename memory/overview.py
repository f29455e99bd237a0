"""What a store holds, in counts that are cheap to read, and whole ids for the beginnings that people type."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Literal

import sqlalchemy as sa

from memory.errors import UnknownIdError
from memory.schema import (
    Base,
    CheckpointRow,
    EpisodeRow,
    EvaluationRow,
    EventRow,
    ExtractionRow,
    ItemRow,
    KnowledgeRow,
    RoundRow,
    RunRow,
    TallyRow,
    TextRow,
    TurnRow,
)
from memory.tallies import TallyTable

Kind = Literal["episode", "item", "knowledge", "checkpoint", "round", "run"]

_TABLES: dict[str, Any] = {
    "episode": EpisodeRow,
    "item": ItemRow,
    "knowledge": KnowledgeRow,
    "checkpoint": CheckpointRow,
    "round": RoundRow,
    "run": RunRow,
}
_ALL: dict[str, type[Base]] = {
    **_TABLES, "turn": TurnRow, "text": TextRow, "extraction": ExtractionRow, "evaluation": EvaluationRow,
    "event": EventRow,
}  # fmt: skip
_TALLIED = {"episode": TallyRow.episodes, "turn": TallyRow.turns}
_NEAR = 200  # ids among which the nearest one is looked for


class OverviewTable(TallyTable):
    """The part of the store that counts and finds."""

    def full_id(self, kind: Kind, prefix: str) -> str:
        """The id that begins with `prefix`, an exact one first.

        Raises:
            UnknownIdError: none does, or several do; the message names the nearest ones.
        """
        column = _TABLES[kind].id
        with self._read() as connection:
            if prefix and connection.scalar(sa.select(column).where(column == prefix)) is not None:
                return prefix
            found = self._beginning(connection, kind, prefix, 4)
            if not found:
                near = self._nearest(connection, kind, prefix)
                hint = f"the nearest is {near}" if near else "`engrain memory stats` says what there is"
                raise UnknownIdError(f"no {kind} {prefix!r} in {self.url}; {hint}")
        if len(found) > 1:
            raise UnknownIdError(f"{prefix!r} could be {', '.join(found)}; give more of the {kind}'s id")
        return found[0]

    def ids(self, kind: Kind, prefix: str = "", limit: int = 50) -> list[str]:
        """Ids that begin with `prefix`, in their order."""
        with self._read() as connection:
            return self._beginning(connection, kind, prefix, limit) if prefix else self._some(connection, kind, limit)

    def _beginning(self, connection: sa.Connection, kind: Kind, prefix: str, limit: int) -> list[str]:
        """Ids between the prefix and the next string that does not begin with it: the key's own index finds them."""
        if not prefix:
            return []
        column = _TABLES[kind].id
        query = sa.select(column).where(column.startswith(prefix, autoescape=True)).order_by(column).limit(limit)
        if self._engine.dialect.name == "sqlite":  # its LIKE ignores case and reads all ids
            query = sa.select(column).where(column >= prefix, column < prefix + "\U0010ffff")
            query = query.order_by(column).limit(limit)
        return [str(id_) for id_ in connection.execute(query).scalars()]

    def _some(self, connection: sa.Connection, kind: Kind, limit: int) -> list[str]:
        column = _TABLES[kind].id
        return [str(id_) for id_ in connection.execute(sa.select(column).order_by(column).limit(limit)).scalars()]

    def _nearest(self, connection: sa.Connection, kind: Kind, given: str) -> str | None:
        """The stored id most like the one given, among those that share its beginning and some others."""
        for length in range(min(len(given) - 1, 16), 0, -1):
            if pool := self._beginning(connection, kind, given[:length], _NEAR):
                break
        else:
            pool = []
        pool = list(dict.fromkeys([*pool, *self._some(connection, kind, _NEAR)]))
        short = {id_[: max(len(given), 4)]: id_ for id_ in reversed(pool)}
        found = difflib.get_close_matches(given, [*short, *pool], n=1, cutoff=0.4)
        return short.get(found[0], found[0]) if found else None

    def counts(self) -> dict[str, int]:
        """How many rows of each kind there are."""
        return self._count(_TABLES)

    def all_counts(self) -> dict[str, int]:
        """The same for every kind, turns, texts and events among them; reads more of the store."""
        return self._count(_ALL)

    def _count(self, kinds: Iterable[str]) -> dict[str, int]:
        """Counts of these kinds; the large ones need no counting."""
        queries = {
            kind: sa.select(sa.func.sum(_TALLIED[kind]))
            if kind in _TALLIED
            else sa.select(sa.func.count()).select_from(_ALL[kind])
            for kind in kinds
        }
        with self._read() as connection:
            return {kind: int(connection.scalar(query) or 0) for kind, query in queries.items()}

    def item_statuses(self) -> dict[str, int]:
        """How many items have each status."""
        query = sa.select(ItemRow.status, sa.func.count()).group_by(ItemRow.status).order_by(ItemRow.status)
        with self._read() as connection:
            return dict(connection.execute(query).tuples().all())

    def size(self) -> int:
        """Bytes that the database takes on disk."""
        with self._read() as connection:
            if self._engine.dialect.name == "postgresql":
                return int(connection.scalar(sa.text("SELECT pg_database_size(current_database())")) or 0)
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar() or 0
            return int(pages) * int(connection.exec_driver_sql("PRAGMA page_size").scalar() or 0)
