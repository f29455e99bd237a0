"""Leases: one process at a time holds a name, and must say again and again that it is alive.

All times are the database's own, in seconds since 1970: holders on different machines need not agree on the time.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from memory.database import Database
from memory.records import Record
from memory.schema import LeaseRow


class Lease(Record):
    """Who holds a name. `machine` is where `pid` means something; `token` tells two holders of one pid apart."""

    name: str
    token: str
    host: str
    machine: str
    pid: int
    since: float
    expires: float

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since, UTC)
        return f"process {self.pid} on {self.host}, since {since:%Y-%m-%d %H:%M:%S} UTC"


class LeaseTable(Database):
    """The part of the store that says who is at work on it."""

    def take_lease(
        self,
        name: str,
        token: str,
        *,
        host: str,
        machine: str,
        pid: int,
        seconds: float,
        is_gone: Callable[[Lease], bool] = lambda lease: False,
    ) -> Lease:
        """Take the lease `name` for so many seconds, unless another holds it. The lease of whoever holds it now.

        Args:
            name: at most 128 ASCII characters.
            token: the caller's own; it holds the lease if the answer's token is this one.
            host: the caller's machine, for people to read.
            machine: the same, exactly.
            pid: the caller.
            seconds: how long the lease lasts if it is not renewed.
            is_gone: whether the holder of a lease that has not expired is known to be dead.
        """
        with self._write() as connection:
            self._one_at_a_time(connection)
            time = self._time(connection)
            held = self._lease(connection, name)
            if held is not None and held.token != token and held.expires > time and not is_gone(held):
                return held
            lease = Lease(
                name=name, token=token, host=host, machine=machine, pid=pid, since=time, expires=time + seconds
            )
            connection.execute(sa.delete(LeaseRow).where(LeaseRow.name == name))
            connection.execute(sa.insert(LeaseRow), lease.model_dump())
        return lease

    def renew_lease(self, name: str, token: str, seconds: float) -> bool:
        """Hold a lease for so many seconds from now; False if another process has taken it."""
        with self._write() as connection:
            update = sa.update(LeaseRow).where(LeaseRow.name == name, LeaseRow.token == token)
            return bool(connection.execute(update.values(expires=self._time(connection) + seconds)).rowcount)

    def drop_lease(self, name: str, token: str) -> None:
        """Give a lease back; one that another process holds is left alone."""
        with self._write() as connection:
            connection.execute(sa.delete(LeaseRow).where(LeaseRow.name == name, LeaseRow.token == token))

    def lease(self, name: str) -> Lease | None:
        """The lease as it stands, expired or not."""
        with self._read() as connection:
            return self._lease(connection, name)

    def held_lease(self, name: str) -> Lease | None:
        """The lease, unless it has expired by the database's clock."""
        with self._read() as connection:
            found = self._lease(connection, name)
            return found if found is not None and found.expires > self._time(connection) else None

    def _lease(self, connection: sa.Connection, name: str) -> Lease | None:
        row = connection.execute(sa.select(LeaseRow.__table__).where(LeaseRow.name == name)).mappings().first()
        return Lease(**row) if row else None

    def _time(self, connection: sa.Connection) -> float:
        """Seconds since 1970 by the database's clock, at this moment and not at the transaction's start."""
        if self._engine.dialect.name == "postgresql":
            clock: Any = sa.extract("epoch", sa.func.clock_timestamp())
        else:
            clock = (sa.func.julianday("now") - 2440587.5) * 86400.0
        return float(connection.scalar(sa.select(clock)) or 0.0)
