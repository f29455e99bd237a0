"""Episodes that came from outside the rounds: played by people or by other processes."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa

from envs.base import Split
from memory.database import Database
from memory.schema import EpisodeRow


class ArrivalTable(Database):
    """The part of the store that says what is new for a loop."""

    def arrivals(self, env: str, since: datetime | None = None) -> int:
        """How many training episodes of a world were stored after a time, and belong to no round or training run."""
        query = sa.select(sa.func.count()).where(*_arrived(env, since))
        with self._read() as connection:
            return connection.scalar(query) or 0

    def arrived(self, env: str, since: datetime | None, *, until: datetime, limit: int) -> list[str]:
        """Ids of those that `arrivals` counts, stored no later than `until`, newest first."""
        query = sa.select(EpisodeRow.id).where(*_arrived(env, since), EpisodeRow.added_at <= until)
        query = query.order_by(EpisodeRow.added_at.desc(), EpisodeRow.id).limit(limit)
        with self._read() as connection:
            return list(connection.execute(query).scalars())


def _arrived(env: str, since: datetime | None) -> list[sa.ColumnElement[bool]]:
    conditions = [
        EpisodeRow.env == env,
        EpisodeRow.split == Split.TRAIN.value,
        EpisodeRow.round_id.is_(None),
        EpisodeRow.run_id.is_(None),
    ]
    return conditions if since is None else [*conditions, EpisodeRow.added_at > since]
