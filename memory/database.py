"""One database, opened, migrated and made safe for several processes: SQLite by default, PostgreSQL by URL."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.dialects import postgresql, sqlite

from memory.errors import BadStoreError, StoreError, UnknownIdError
from memory.records import now
from memory.schema import Base, EventRow

if TYPE_CHECKING:  # a store that is up to date opens without Alembic, which takes a fifth of a second to load
    from alembic.config import Config
    from alembic.script import ScriptDirectory

VERSION_TABLE = "engrain_version"
_VERSION = sa.text(f"SELECT version_num FROM {VERSION_TABLE}")  # noqa: S608
BUSY_SECONDS = 60  # how long a writer waits for another process's transaction on SQLite
CACHE_KIB = 64 * 1024  # pages that a SQLite connection may keep in memory, taken as they are read
WAL_PAGES = 8192  # of 4 KiB, after which SQLite's write-ahead log goes into the file
_MIGRATIONS = Path(__file__).parent / "migrations"
_LOCK = 0x456E67726169  # "Engrai": PostgreSQL advisory lock for what must happen one at a time

_T = TypeVar("_T")


def chunks(values: Iterable[_T], size: int) -> Iterator[list[_T]]:
    """Lists of at most `size` values, in order, read as they are needed."""
    chunk: list[_T] = []
    for value in values:
        chunk.append(value)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def parse_url(url_or_path: str) -> sa.URL:
    """The database URL meant by a URL or by a plain path, which is a SQLite file.

    Raises:
        BadStoreError: not a URL of a database we support.
    """
    if url_or_path == ":memory:":
        return sa.URL.create("sqlite", database=":memory:")
    if "://" not in url_or_path:
        if not url_or_path.strip() or "\0" in url_or_path:
            raise BadStoreError("the store's path is empty or holds a NUL; give a file or a database URL")
        return sa.URL.create("sqlite", database=str(Path(url_or_path).expanduser()))
    scheme = url_or_path.split("://", 1)[0]
    try:
        url = sa.make_url(url_or_path)
    except (exc.ArgumentError, ValueError):
        raise BadStoreError(f"the {scheme}:// URL of the store cannot be read; its form is {_FORMS}") from None
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername not in ("sqlite", "sqlite+pysqlite", "postgresql+psycopg"):
        raise BadStoreError(f"{scheme!r} is no database that stores experience; use {_FORMS}")
    if url.host and "@" in url.host:  # part of the password would stand in every message about the host
        raise BadStoreError(f"the {scheme}:// URL of the store holds two '@'; write the password's own as %40")
    if "password" in url.query:  # moved to where it is hidden when the URL is shown
        url = url.set(password=str(url.query["password"])).difference_update_query(["password"])
    return url


_FORMS = "a file path, sqlite:///PATH or postgresql://USER:PASSWORD@HOST/NAME"


def _reason(error: BaseException) -> str:
    """The first line of a driver's message."""
    cause = getattr(error, "orig", None) or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


def _is_silent(error: exc.DBAPIError) -> bool:
    """Whether a server could not be reached, as opposed to one that answered and refused (psycopg has no code)."""
    module = type(error.orig).__module__
    return isinstance(error, exc.OperationalError) and module.startswith("psycopg") and "FATAL:" not in str(error)


def _is_full(error: exc.DBAPIError) -> bool:
    """Whether SQLite had no room on the disk."""
    return getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL


def newest_revision() -> str:
    """The revision that this version writes: the last of those in `migrations/versions`, named `rNNNN_what.py`."""
    return max(path.name for path in (_MIGRATIONS / "versions").glob("r*_*.py")).partition("_")[0]


def _alembic(connection: sa.Connection) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


class Database:
    """Connections and transactions. `Store` adds what is kept in them."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self.url = engine.url.render_as_string(hide_password=True)

    @classmethod
    def open(cls, url_or_path: str, *, create: bool = True) -> Self:
        """Open a store, making the SQLite file and its folders, and bring its tables up to this version.

        Args:
            url_or_path: a plain path or `sqlite:///PATH` for SQLite, `postgresql://...` for PostgreSQL.
            create: False refuses a SQLite file that does not exist yet.

        Raises:
            BadStoreError: not a database, not ours, or written by a newer version. The message holds no password.
            StoreError: the server does not answer.
        """
        url = parse_url(url_or_path)
        shown = url.render_as_string(hide_password=True)
        try:
            store = cls(_connectable(url, create))
        except (OSError, ImportError, exc.ArgumentError) as error:
            raise BadStoreError(f"cannot open the store {shown}: {_reason(error)}; name another with --store") from None
        try:
            store._migrate()
        except exc.DBAPIError as error:
            store.close()
            kind = StoreError if _is_silent(error) or _is_full(error) else BadStoreError
            raise kind(f"cannot open the store {shown}: {_reason(error)}") from None
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Close all connections. Closing twice does nothing."""
        self._engine.dispose()

    def settle(self) -> None:
        """Return when all that was written would outlast a loss of power.

        SQLite syncs its log only now and then; a process that is killed loses nothing by that. PostgreSQL always does.
        """
        if self._engine.dialect.name == "sqlite":
            with self._translated(), self._engine.connect() as connection:
                raw = connection.connection.driver_connection
                assert raw is not None  # noqa: S101
                raw.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _read(self, isolation: Any = None) -> Iterator[sa.Connection]:
        """A connection for reading; on PostgreSQL only `isolation` makes several queries see one state."""
        with self._translated(), self._engine.connect() as connection:
            yield connection.execution_options(isolation_level=isolation) if isolation else connection

    @contextmanager
    def _write(self) -> Iterator[sa.Connection]:
        """A transaction that is wholly kept or wholly undone. On SQLite it is the only writer from its start."""
        with self._translated(), self._engine.connect() as connection:
            connection = connection.execution_options(engrain_write=True)
            with connection.begin():
                yield connection

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except exc.IntegrityError as error:
            raise UnknownIdError(
                f"the store {self.url} lacks something this write refers to: {_reason(error)}"
            ) from error
        except exc.DBAPIError as error:
            raise StoreError(f"the store {self.url} failed: {_reason(error)}") from error

    def _one_at_a_time(self, connection: sa.Connection) -> None:
        """Until this transaction ends, no other process passes here. SQLite's write lock does it already."""
        if self._engine.dialect.name == "postgresql":
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})

    def _insert(self, table: type[Base], *, skip_existing: bool = False) -> Any:
        """An insert for this dialect; `skip_existing` leaves rows alone whose key is taken."""
        insert: Any = postgresql.insert if self._engine.dialect.name == "postgresql" else sqlite.insert
        statement = insert(table)
        return statement.on_conflict_do_nothing() if skip_existing else statement

    def _insert_rows(self, connection: sa.Connection, table: type[Base], rows: Sequence[Mapping[str, Any]]) -> int:
        """Insert rows of the same columns, leaving alone those whose key is taken; returns how many were not."""
        if not rows:
            return 0
        statement, values = self._bulk(table, rows)
        return connection.execute(statement.execution_options(preserve_rowcount=True), values).rowcount

    def _insert_new(self, connection: sa.Connection, table: type[Base], rows: Sequence[Mapping[str, Any]]) -> set[str]:
        """The same, for a table with an `id`; returns the ids that were not taken."""
        if not rows:
            return set()
        statement, values = self._bulk(table, rows)
        return set(connection.execute(statement.returning(table.__table__.c["id"]), values).scalars())

    def _bulk(self, table: type[Base], rows: Sequence[Mapping[str, Any]]) -> tuple[Any, Any]:
        """A statement and its parameters. PostgreSQL takes a column as one array: one statement for all rows."""
        statement = self._insert(table, skip_existing=True)
        if self._engine.dialect.name != "postgresql":
            return statement, rows
        columns = [table.__table__.c[name] for name in rows[0]]
        arrays = [
            sa.func.unnest(sa.bindparam(f"all_{column.name}", type_=postgresql.ARRAY(column.type, dimensions=1)))
            for column in columns
        ]
        values = {f"all_{column.name}": [row[column.name] for row in rows] for column in columns}
        return statement.from_select(columns, sa.select(*arrays)), values

    def _log(
        self, connection: sa.Connection, kind: str, subject: str, action: str, who: str, why: str, detail: Any = None
    ) -> None:
        row = {"at": now(), "who": who, "kind": kind, "subject": subject, "action": action, "why": why}
        connection.execute(sa.insert(EventRow), {**row, "detail": detail})

    def _migrate(self) -> None:
        """Run the migrations that this database lacks; several processes may open an empty one at once."""
        with self._engine.connect() as connection:  # a store that lacks none opens without waiting for a writer
            opened_before = sa.inspect(connection).has_table(VERSION_TABLE)
            if opened_before and connection.execute(_VERSION).scalar() == newest_revision():
                return
        from alembic import command
        from alembic.script import ScriptDirectory

        with self._engine.connect() as connection:
            connection = connection.execution_options(engrain_write=True)
            with connection.begin():
                self._one_at_a_time(connection)
                config = _alembic(connection)
                scripts = ScriptDirectory.from_config(config)
                tables = set(sa.inspect(connection).get_table_names())
                if VERSION_TABLE in tables:
                    found = connection.execute(_VERSION).scalar()
                    self._check_version(found, scripts)
                    if found == scripts.get_current_head():
                        return
                elif taken := sorted(tables & set(Base.metadata.tables)):
                    raise BadStoreError(
                        f"{self.url} holds a table {taken[0]!r} that is not Engrain's; name another database"
                    )
                command.upgrade(config, "head")

    def _check_version(self, found: str | None, scripts: ScriptDirectory) -> None:
        from alembic.util import CommandError

        try:
            known = found is None or scripts.get_revision(found) is not None
        except CommandError:
            known = False
        if not known:
            raise BadStoreError(
                f"the store {self.url} was written by a newer version of Engrain (revision {found}); "
                "upgrade Engrain or name another store"
            )


def _connectable(url: sa.URL, create: bool) -> sa.Engine:
    if url.drivername.startswith("postgresql"):
        return sa.create_engine(url, pool_pre_ping=True)
    if url.database in (None, "", ":memory:"):
        engine = sa.create_engine(url, poolclass=sa.StaticPool, connect_args={"check_same_thread": False})
    else:
        path = Path(str(url.database))
        if not create and not path.exists():
            raise BadStoreError(f"there is no store at {path}; play or improve first, or name one with --store")
        path.parent.mkdir(parents=True, exist_ok=True)
        engine = sa.create_engine(url, connect_args={"timeout": BUSY_SECONDS})
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _: object) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves: the driver's own would be too late for DDL
    connection.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
    connection.execute("PRAGMA foreign_keys = ON")
    if connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
        connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    # Digests fall anywhere in their index: what a batch of them touches must fit, and be written back seldom.
    connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
    connection.execute(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")


def _begin_sqlite(connection: sa.Connection) -> None:
    # A writer that starts as a reader cannot wait for the lock later: SQLite answers "locked" at once.
    write = connection.get_execution_options().get("engrain_write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
