"""A whole store out to files and back: JSON lines for people and pipes, Parquet for data frames. Exact both ways.

Rows come table by table, those that others refer to first. A store that is read in again keeps what it has: rows whose
id is taken are left alone, and rounds and knowledge versions whose number is taken get the next one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import sqlalchemy as sa

from memory.columns import (
    AnyText,
    JsonText,
    Timestamp,
    WideInteger,
    escape_text,
    pack_ids,
    pack_logprobs,
    pack_mask,
    unescape_text,
    unpack_ids,
    unpack_logprobs,
    unpack_mask,
)
from memory.database import VERSION_TABLE, chunks
from memory.errors import BadStoreError
from memory.items import count_support
from memory.schema import Base, EpisodeRow, EventRow, ItemRow, KnowledgeRow, LeaseRow, RoundRow, TallyRow
from memory.tallies import Changes, TallyTable, changes_by

HEADER = "engrain"  # the key of the first line, and of `store.json` beside Parquet files
_HEAD = "store.json"
_BATCH = 500
_TABLES: dict[str, type[Base]] = {mapper.class_.__tablename__: mapper.class_ for mapper in Base.registry.mappers}
_LEFT_OUT = (LeaseRow.__tablename__, TallyRow.__tablename__)  # of the moment, and what follows from the rest
_ORDER = [table.name for table in Base.metadata.sorted_tables if table.name not in _LEFT_OUT]
_UNPACK: dict[str, Callable[[bytes], Sequence[Any]]] = {
    "token_ids": unpack_ids, "loss_mask": unpack_mask, "logprobs": unpack_logprobs,
}  # fmt: skip
_PACK: dict[str, Callable[[Sequence[Any]], bytes]] = {
    "token_ids": pack_ids, "loss_mask": pack_mask, "logprobs": pack_logprobs,
}  # fmt: skip

#: Columns whose values Parquet cannot hold, and how they go out and come home.
_PARQUET: tuple[tuple[type, Callable[[Any], str], Callable[[str], Any]], ...] = (
    (AnyText, escape_text, unescape_text), (JsonText, json.dumps, json.loads), (WideInteger, str, int),
)  # fmt: skip

Row = dict[str, Any]
Progress = Callable[[str, int], None]  # a table's name and how many of its rows were just moved


class TransferTable(TallyTable):
    """The part of the store that goes out to files and comes back."""

    def export_jsonl(self, file: TextIO, progress: Progress | None = None) -> dict[str, int]:
        """Write the whole store as JSON lines: first what it holds, then one line a row. Returns rows by table."""
        with self._snapshot() as connection:
            header = self._header(connection)
            file.write(json.dumps({HEADER: header}) + "\n")
            for name in _ORDER:
                for rows in self._export(connection, name):
                    file.writelines(json.dumps({"table": name, **_jsonable(row)}) + "\n" for row in rows)
                    if progress:
                        progress(name, len(rows))
        return dict(header["rows"])

    def export_parquet(self, folder: Path, progress: Progress | None = None) -> dict[str, int]:
        """Write the whole store as one Parquet file a table, with `store.json` beside them. Returns rows by table.

        An export that fails leaves nothing behind, and a folder that was there as it was.
        """
        import pyarrow as pa
        from pyarrow import parquet

        with _draft(folder) as draft, self._snapshot() as connection:
            header = self._header(connection)
            for name in _ORDER:
                schema = pa.schema(
                    [(column.name, _arrow_type(column)) for column in Base.metadata.tables[name].columns]
                )
                with parquet.ParquetWriter(draft / f"{name}.parquet", schema, compression="zstd") as writer:
                    for rows in self._export(connection, name):
                        flat = [_for_parquet(name, _jsonable(row)) for row in rows]
                        writer.write_table(pa.Table.from_pylist(flat, schema=schema))
                        if progress:
                            progress(name, len(rows))
            (draft / _HEAD).write_text(json.dumps({HEADER: header}, indent=2) + "\n")
        return dict(header["rows"])

    def import_jsonl(self, file: Iterable[str], progress: Progress | None = None) -> dict[str, int]:
        """Read what `export_jsonl` wrote, wholly or not at all. Returns how many rows were new, by table.

        Raises:
            BadStoreError: not such a file, cut off, or written by a newer version.
        """
        lines = iter(file)
        header = self._check_header(next(lines, ""))
        return self._import(header, _read_lines(lines), progress)

    def import_parquet(self, folder: Path, progress: Progress | None = None) -> dict[str, int]:
        """Read what `export_parquet` wrote, wholly or not at all. Returns how many rows were new, by table.

        Raises:
            BadStoreError: no such folder, or written by a newer version.
        """
        try:
            header = self._check_header((folder / _HEAD).read_text())
        except OSError as error:
            raise BadStoreError(f"{folder} holds no exported store: {error}") from None
        return self._import(header, _read_parquet(folder), progress)

    # -- out ----------------------------------------------------------------------------------------------------

    def _snapshot(self) -> Any:
        """A connection that sees one state of the store however long the export takes."""
        return self._read(isolation="REPEATABLE READ" if self._engine.dialect.name == "postgresql" else None)

    def _header(self, connection: sa.Connection) -> dict[str, Any]:
        revision = connection.execute(sa.text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()  # noqa: S608
        counted = {
            name: connection.scalar(sa.select(sa.func.count()).select_from(Base.metadata.tables[name])) or 0
            for name in _ORDER
        }
        return {"revision": revision, "rows": counted}

    def _export(self, connection: sa.Connection, name: str) -> Iterator[list[Row]]:
        table = Base.metadata.tables[name]
        order = [table.c.version] if name == "knowledge" else list(table.primary_key.columns)
        found = connection.execute(sa.select(table).order_by(*order).execution_options(yield_per=_BATCH))
        for rows in found.mappings().partitions():
            yield [dict(row) for row in rows]

    # -- in -----------------------------------------------------------------------------------------------------

    def _check_header(self, line: str) -> dict[str, Any]:
        try:
            header = json.loads(line)[HEADER]
            revision, _ = header["revision"], dict(header["rows"])
        except (ValueError, KeyError, TypeError):
            raise BadStoreError("this is no exported store; `engrain memory export` writes one") from None
        with self._read() as connection:
            own = connection.execute(sa.text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()  # noqa: S608
        if str(revision) > str(own):
            raise BadStoreError(f"the file was written by a newer version of Engrain ({revision}); upgrade Engrain")
        return dict(header)

    def _import(
        self, header: Mapping[str, Any], tables: Iterable[tuple[str, Row]], progress: Progress | None
    ) -> dict[str, int]:
        seen: dict[str, int] = dict.fromkeys(_ORDER, 0)
        new: dict[str, int] = dict.fromkeys(_ORDER, 0)
        changes: Changes = {}
        parents: dict[str, str] = {}
        with self._write() as connection:
            self._one_at_a_time(connection)
            fresh_log = connection.scalar(sa.select(EventRow.id).limit(1)) is None
            for name, rows in _batches(tables):
                seen[name] += len(rows)
                if name == "events":
                    new[name] += self._import_events(connection, rows, fresh_log)
                else:
                    new[name] += self._import_rows(connection, name, rows, changes, parents)
                if progress:
                    progress(name, len(rows))
            if missing := {name: count for name, count in header["rows"].items() if seen.get(name) != count}:
                name, count = next(iter(missing.items()))
                raise BadStoreError(
                    f"the file is cut off: it should hold {count} rows of {name} and holds {seen.get(name, 0)}; "
                    "nothing was imported"
                )
            self._after_import(connection, parents)
            self._tally(connection, changes)
        return new

    def _import_rows(
        self, connection: sa.Connection, name: str, rows: list[Row], changes: Changes, parents: dict[str, str]
    ) -> int:
        if name in ("rounds", "knowledge"):
            rows = self._renumbered(connection, RoundRow if name == "rounds" else KnowledgeRow, rows)
        if name == "knowledge":  # a version may have a lower number than its parent, where that one got another
            parents |= {row["id"]: row["parent"] for row in rows if row["parent"] is not None}
            rows = [{**row, "parent": None} for row in rows]
        if name == "episodes":
            added = self._insert_new(connection, EpisodeRow, rows)
            first = {row["id"]: row for row in reversed(rows)}  # in a file that says one twice, the first is kept
            changes_by((first[id_] for id_ in added), before=changes)
            return len(added)
        return self._insert_rows(connection, _TABLES[name], rows)

    def _renumbered(self, connection: sa.Connection, table: Any, rows: list[Row]) -> list[Row]:
        """Rows that are not stored yet; where another row has their number they get the next free one."""
        field = "number" if table is RoundRow else "version"
        column = getattr(table, field)
        stored: dict[str, int] = dict(connection.execute(sa.select(table.id, column)).tuples().all())
        taken, fresh = set(stored.values()), [row for row in rows if row["id"] not in stored]
        for row in fresh:
            if row[field] in taken:
                row[field] = max(taken) + 1
            taken.add(row[field])
        return fresh

    def _import_events(self, connection: sa.Connection, rows: list[Row], keep_ids: bool) -> int:
        """Events have numbers of their own in every store; what tells them apart is what they say."""
        if keep_ids:
            self._insert_rows(connection, EventRow, rows)
            return len(rows)
        subjects = sorted({row["subject"] for row in rows})
        query = sa.select(EventRow.at, EventRow.subject, EventRow.action, EventRow.who)
        known = {tuple(found) for found in connection.execute(query.where(EventRow.subject.in_(subjects)))}
        fresh = [row for row in rows if (row["at"], row["subject"], row["action"], row["who"]) not in known]
        if fresh:
            plain = [{key: value for key, value in row.items() if key != "id"} for row in fresh]
            connection.execute(sa.insert(EventRow), plain)
        return len(fresh)

    def _after_import(self, connection: sa.Connection, parents: Mapping[str, str]) -> None:
        if parents:
            own = sa.update(KnowledgeRow).where(KnowledgeRow.id == sa.bindparam("child"))
            pairs = [{"child": child, "above": parent} for child, parent in parents.items()]
            connection.execute(own.values(parent=sa.bindparam("above")), pairs)
        count_support(connection, connection.execute(sa.select(ItemRow.id)).scalars().all())
        if self._engine.dialect.name == "postgresql":
            last = sa.select(sa.func.max(EventRow.id)).scalar_subquery()
            sequence = sa.func.pg_get_serial_sequence("events", "id")
            connection.execute(sa.select(sa.func.setval(sequence, sa.func.coalesce(last, 1))))


@contextmanager
def _draft(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` at the end; into one that is there its files move one by one,
    `store.json` last: without it no export is read."""
    folder = folder.resolve()
    there = folder.is_dir()
    draft = folder / ".part" if there else folder.with_name(f".{folder.name}.part")
    shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed
    draft.mkdir(parents=True)
    try:
        yield draft
        if there:
            (folder / _HEAD).unlink(missing_ok=True)
            for file in sorted(draft.iterdir(), key=lambda file: file.name == _HEAD):
                file.replace(folder / file.name)
        else:
            draft.replace(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _batches(tables: Iterable[tuple[str, Row]]) -> Iterator[tuple[str, list[Row]]]:
    """Rows of one table together, at most `_BATCH` of them."""
    for chunk in chunks(tables, _BATCH):
        by_table: dict[str, list[Row]] = {}
        for name, row in chunk:
            by_table.setdefault(name, []).append(row)
        yield from by_table.items()


def _read_lines(lines: Iterator[str]) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(lines, 2):
        try:
            row = json.loads(line)
            if (name := row.pop("table")) not in _ORDER:
                raise ValueError(f"there is no table {name!r}")
            yield name, _typed(name, row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadStoreError(f"line {number} is no row of a store ({error}); nothing was imported") from None


def _read_parquet(folder: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    from pyarrow import parquet

    for name in _ORDER:
        try:
            with parquet.ParquetFile(folder / f"{name}.parquet") as file:
                for batch in file.iter_batches(_BATCH):
                    for row in batch.to_pylist():
                        yield name, _typed(name, _for_parquet(name, row, back=True))
        except FileNotFoundError:
            continue  # an older version lacked this table; the count in the header says if it is missed
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:
            raise BadStoreError(f"{folder / name}.parquet cannot be read ({error}); nothing was imported") from None


def _jsonable(row: Mapping[str, Any]) -> Row:
    plain: Row = {}
    for key, value in row.items():
        if isinstance(value, bytes):
            plain[key] = _UNPACK[key](value)
        else:
            plain[key] = value.isoformat() if isinstance(value, datetime) else value
    return plain


def _typed(name: str, row: Mapping[str, Any]) -> Row:
    columns = Base.metadata.tables[name].columns
    typed: Row = {}
    for key, value in row.items():
        kind = columns[key].type
        if value is not None and isinstance(kind, sa.LargeBinary):
            typed[key] = _PACK[key](value)
        else:
            typed[key] = datetime.fromisoformat(value) if isinstance(kind, Timestamp) and value is not None else value
    return typed


def _for_parquet(name: str, row: Row, *, back: bool = False) -> Row:
    """Any text as valid Unicode, JSON as text and wide integers in decimal, as Parquet holds them; or `back` again."""
    columns = Base.metadata.tables[name].columns
    held = dict(row)
    for key, value in row.items():
        for kind, out, home in _PARQUET:
            if value is not None and isinstance(columns[key].type, kind):
                held[key] = home(value) if back else out(value)
    return held


def _arrow_type(column: sa.Column[Any]) -> Any:
    import pyarrow as pa

    lists = {"token_ids": pa.int32(), "loss_mask": pa.bool_(), "logprobs": pa.float32()}
    if isinstance(column.type, sa.LargeBinary):
        return pa.list_(lists[column.name])
    if isinstance(column.type, sa.Boolean):
        return pa.bool_()
    if isinstance(column.type, sa.Integer):
        return pa.int64()
    return pa.float64() if isinstance(column.type, sa.Double) else pa.string()
