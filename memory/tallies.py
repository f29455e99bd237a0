"""How many episodes there are of each env and split, kept as they come and go, so that nobody has to count them.

The row of an env and split changes in the transaction that adds or deletes its episodes, as its last statement:
writers wait for each other there only while one of them commits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import sqlalchemy as sa

from memory.database import Database
from memory.records import Record
from memory.schema import EpisodeRow, TallyRow

COUNTED = ("episodes", "solved", "turns", "tokens", "sampled")
TALLIED = [getattr(EpisodeRow, name) for name in ("env", "split", "success", "turns", "tokens", "sampled")]


class Tally(Record):
    """Episodes of one env and split: how many, how many solved, and their turns and tokens in all."""

    env: str
    split: str
    episodes: int
    solved: int
    turns: int
    tokens: int
    sampled: int


Changes = dict[tuple[str, str], list[int]]  # by env and split, what is added to each of `COUNTED`


def changes_by(episodes: Iterable[Mapping[Any, Any]], sign: int = 1, before: Changes | None = None) -> Changes:
    """What rows of episodes (with the columns `TALLIED`) change when they come, or with `sign` -1 go.

    `before` is added to, for episodes that come in parts.
    """
    changes = {} if before is None else before
    for row in episodes:
        change = changes.setdefault((row["env"], row["split"]), [0] * len(COUNTED))
        for place, n in enumerate((1, row["success"], row["turns"], row["tokens"], row["sampled"])):
            change[place] += sign * n
    return changes


class TallyTable(Database):
    """The part of the store that keeps count of episodes."""

    def tallies(self) -> list[Tally]:
        """Episodes by env and split."""
        query = sa.select(TallyRow.__table__).order_by(TallyRow.env, TallyRow.split)
        with self._read() as connection:
            return [Tally(**row) for row in connection.execute(query).mappings()]

    def _tally(self, connection: sa.Connection, changes: Changes) -> None:
        """Write changes down; a tally that comes to no episodes goes."""
        insert = self._insert(TallyRow)
        sums = {name: TallyRow.__table__.c[name] + insert.excluded[name] for name in COUNTED}
        upsert = insert.on_conflict_do_update(index_elements=["env", "split"], set_=sums)
        for (env, split), change in sorted(changes.items()):  # in one order, so that two writers do not deadlock
            connection.execute(upsert, {"env": env, "split": split, **dict(zip(COUNTED, change, strict=True))})
        if any(episodes < 0 for episodes, *_ in changes.values()):
            connection.execute(sa.delete(TallyRow).where(TallyRow.episodes == 0))

    def _wrong_tallies(self, connection: sa.Connection) -> Iterator[tuple[str, str, int]]:
        """Env, split and how many episodes too many the tally says, where it disagrees in any count; reads all."""
        solved = sa.func.sum(sa.cast(EpisodeRow.success, sa.Integer))
        sums = [sa.func.sum(getattr(EpisodeRow, name)) for name in COUNTED[2:]]
        keys = (EpisodeRow.env, EpisodeRow.split)
        there = sa.select(*keys, *(-count for count in (sa.func.count(), solved, *sums))).group_by(*keys)
        said = sa.select(TallyRow.env, TallyRow.split, *(getattr(TallyRow, name) for name in COUNTED))
        both = said.union_all(there).subquery()  # one statement, so that it sees one state of the store
        left = [sa.func.sum(both.c[name]) for name in COUNTED]
        query = sa.select(both.c.env, both.c.split, left[0]).group_by(both.c.env, both.c.split)
        for env, split, more in connection.execute(query.having(sa.or_(*(count != 0 for count in left)))):
            yield env, split, int(more)
