"""Items in the store: their sources, their marks, their measured effect, and every change with who and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import sqlalchemy as sa

from envs.errors import UsageError
from memory.database import Database, chunks
from memory.errors import UnknownIdError
from memory.normalise import item_id
from memory.records import (
    MERGED,
    Extraction,
    Item,
    ItemEffect,
    ItemFlag,
    ItemSource,
    ItemStatus,
    ItemSummary,
    digest,
    now,
)
from memory.schema import EpisodeRow, ItemEffectRow, ItemFlagRow, ItemRow, ItemSourceRow, KnowledgeItemRow

_BATCH = 500
_SUMMARY = [getattr(ItemRow, name) for name in ItemSummary.model_fields if name != "flags"]
_ITEM = [getattr(ItemRow, name) for name in Item.model_fields if name not in ("flags", "sources")]

Order = Literal["support", "effect", "latest"]


class ItemTable(Database):
    """The part of the store that keeps single lines of experience."""

    def add_item(
        self,
        text: str,
        *,
        extraction: Extraction | None = None,
        item: str | None = None,
        round_id: str | None = None,
        status: ItemStatus = ItemStatus.ACTIVE,
        who: str = "engrain",
        why: str = "",
    ) -> Item:
        """Store one line of experience, or a further source of one that is known.

        Args:
            text: the line. The same text up to case, spaces and final punctuation is the same item.
            extraction: where it was said (stored before); None for an item given by hand. Each episode that the
                extraction read is a source, noted once.
            item: id of the known item that this is another wording of; None finds it by its text.
            round_id: the round in which a new item is first seen.
            status: status of a new item; a known one keeps its own, so that a retired item does not come back.
            who: author of the event that is noted with a new item.
            why: reason of that event.

        A source whose episode had the item in its own knowledge is noted as recalled and adds no support.

        Raises:
            UnknownIdError: the extraction, the round or `item` is not stored.
        """
        id_ = item or item_id(text)
        created = now()
        with self._write() as connection:
            if item is None:
                row = {"id": id_, "text": text, "status": ItemStatus(status).value, "round_id": round_id}
                insert = self._insert(ItemRow, skip_existing=True).values(**row, created_at=created, last_seen=created)
                if connection.execute(insert.returning(ItemRow.id)).scalar() is not None:
                    self._log(connection, "item", id_, "added", who, why)
            if extraction is not None:
                episodes, names = (extraction.episode_id, *extraction.others), _names(connection, id_)
                sources = [
                    {
                        "id": digest(id_, extraction.id, *([episode] if number else [])),
                        "item_id": id_,
                        "episode_id": episode,
                        "extraction_id": extraction.id,
                        "text": text,
                        "recalled": _was_known(connection, episode, names),
                        "created_at": created,
                    }
                    for number, episode in enumerate(dict.fromkeys(episodes))
                ]
                self._insert_rows(connection, ItemSourceRow, _unknown_to(connection, id_, sources))
                count_support(connection, [id_])
        return self.item(id_)

    def item(self, id: str) -> Item:
        """One item with its sources.

        Raises:
            UnknownIdError: it is not stored.
        """
        found = self._items(ItemRow.id == id)
        if not found:
            raise UnknownIdError(f"no item {id!r} in {self.url}")
        return found[0]

    def items(
        self,
        status: ItemStatus | str | None = None,
        *,
        round_id: str | None = None,
        limit: int | None = None,
    ) -> list[Item]:
        """Items with their sources, oldest first; `round_id` is the round that first saw them."""
        conditions = []
        if status is not None:
            conditions.append(ItemRow.status == ItemStatus(status).value)
        if round_id is not None:
            conditions.append(ItemRow.round_id == round_id)
        return self._items(*conditions, limit=limit)

    def item_rows(
        self,
        *,
        status: ItemStatus | str | None = None,
        flag: str | None = None,
        search: str | None = None,
        ids: Sequence[str] | None = None,
        by: Order = "support",
        limit: int | None = None,
        offset: int = 0,
    ) -> list[ItemSummary]:
        """Items without their sources. A filter that is None lets all pass.

        Args:
            status: only these.
            flag: only those with this mark.
            search: only those whose text holds this, in any case.
            ids: only these.
            by: `support` puts those that most episodes taught first, `effect` those that help most (never measured
                ones last), `latest` those learned last.
            limit: at most this many.
            offset: leave out this many from the front.
        """
        query = sa.select(*_SUMMARY)
        if status is not None:
            query = query.where(ItemRow.status == ItemStatus(status).value)
        if flag is not None:
            query = query.where(ItemRow.id.in_(sa.select(ItemFlagRow.item_id).where(ItemFlagRow.flag == flag)))
        if ids is not None:
            query = query.where(ItemRow.id.in_(ids))
        if search is not None:
            query = query.where(ItemRow.text.icontains(search, autoescape=True))
        order: dict[str, list[Any]] = {
            "support": [ItemRow.support.desc(), ItemRow.last_seen.desc(), ItemRow.id.desc()],
            "effect": [ItemRow.effect.desc().nulls_last(), ItemRow.id.desc()],
            "latest": [ItemRow.last_seen.desc(), ItemRow.id.desc()],
        }
        query = query.order_by(*order[by])
        query = query.limit(limit if limit is not None else 2**31 - 1 if offset else None).offset(offset or None)
        with self._read() as connection:
            rows = connection.execute(query).mappings().all()
            flags = _flags(connection, [row["id"] for row in rows])
        return [ItemSummary(**row, flags=tuple(dict.fromkeys(f.flag for f in flags[row["id"]]))) for row in rows]

    def _items(self, *conditions: sa.ColumnElement[bool], limit: int | None = None) -> list[Item]:
        query = sa.select(*_ITEM).where(*conditions).order_by(ItemRow.created_at, ItemRow.id)
        with self._read() as connection:
            rows = connection.execute(query.limit(limit)).mappings().all()
            ids = [row["id"] for row in rows]
            flags = _flags(connection, ids)
            sources: dict[str, list[ItemSource]] = defaultdict(list)
            for chunk in chunks(ids, _BATCH):
                found = sa.select(ItemSourceRow.__table__).where(ItemSourceRow.item_id.in_(chunk))
                found = found.order_by(ItemSourceRow.created_at, ItemSourceRow.id)
                for row in connection.execute(found).mappings():
                    source = ItemSource(**{key: row[key] for key in ItemSource.model_fields})
                    sources[row["item_id"]].append(source)
        return [Item(**row, flags=tuple(flags[row["id"]]), sources=tuple(sources[row["id"]])) for row in rows]

    def set_item_status(self, id: str, status: ItemStatus | str, who: str, why: str) -> Item:
        """Retire an item, bring it back or put it in quarantine; the event notes who, why and the status before.

        One that was merged into another item is an item of its own again.

        Raises:
            UnknownIdError: it is not stored.
        """
        value = ItemStatus(status).value
        with self._write() as connection:
            self._set_status(connection, id, value, who, why)
        return self.item(id)

    def _set_status(self, connection: sa.Connection, id: str, status: str, who: str, why: str) -> None:
        query = sa.select(ItemRow.status).where(ItemRow.id == id).with_for_update()
        before = connection.scalar(query)
        if before is None:
            raise UnknownIdError(f"no item {id!r} in {self.url}")
        connection.execute(sa.update(ItemRow).where(ItemRow.id == id).values(status=status))
        connection.execute(sa.delete(ItemFlagRow).where(ItemFlagRow.item_id == id, ItemFlagRow.flag == MERGED))
        self._log(connection, "item", id, status, who, why, {"before": before})

    def flag_item(
        self, id: str, flag: str, *, other: str = "", note: str = "", who: str = "engrain", why: str = ""
    ) -> Item:
        """Mark an item, such as `instance-bound`, or `contradicts` with the id of the `other`; once is enough.

        Raises:
            UnknownIdError: the item is not stored.
        """
        row = {"item_id": id, "flag": flag, "other": other, "note": note, "who": who, "at": now()}
        with self._write() as connection:
            insert = self._insert(ItemFlagRow, skip_existing=True).values(**row).returning(ItemFlagRow.item_id)
            if connection.execute(insert).scalar() is not None:
                detail = {"flag": flag, "other": other, "note": note}
                self._log(connection, "item", id, "flagged", who, why or note or flag, detail)
        return self.item(id)

    def unflag_item(self, id: str, flag: str, *, other: str = "", who: str = "engrain", why: str = "") -> Item:
        """Take a mark off an item; one that it does not have is no error.

        Raises:
            UnknownIdError: the item is not stored.
        """
        with self._write() as connection:
            same = (ItemFlagRow.item_id == id, ItemFlagRow.flag == flag, ItemFlagRow.other == other)
            if connection.execute(sa.delete(ItemFlagRow).where(*same)).rowcount:
                self._log(connection, "item", id, "unflagged", who, why or flag, {"flag": flag, "other": other})
        return self.item(id)

    def merge_items(self, duplicate: str, into: str, who: str, why: str) -> Item:
        """Retire an item in favour of one that says the same, which gains its sources. Returns the one that stays.

        The duplicate keeps its own sources, so that it can be restored.

        Raises:
            UnknownIdError: one of them is not stored.
            UsageError: they are one item.
        """
        if duplicate == into:
            raise UsageError(f"item {into} cannot be merged into itself; name the item that says the same")
        with self._write() as connection:
            self._merge(connection, duplicate, into, who, why)
        return self.item(into)

    def _merge(self, connection: sa.Connection, duplicate: str, into: str, who: str, why: str) -> None:
        if connection.scalar(sa.select(ItemRow.id).where(ItemRow.id == into)) is None:
            raise UnknownIdError(f"no item {into!r} in {self.url}")
        self._set_status(connection, duplicate, ItemStatus.RETIRED.value, who, why)
        found = connection.execute(sa.select(ItemSourceRow.__table__).where(ItemSourceRow.item_id == duplicate))
        sources = [dict(row, id=digest(into, row["id"]), item_id=into) for row in found.mappings()]
        self._insert_rows(connection, ItemSourceRow, _unknown_to(connection, into, sources))
        flag = {"item_id": duplicate, "flag": MERGED, "other": into, "note": "", "who": who, "at": now()}
        self._insert_rows(connection, ItemFlagRow, [flag])
        self._log(connection, "item", into, "merged", who, why, {"duplicate": duplicate})
        count_support(connection, [into])

    def reword_item(self, id: str, text: str, who: str, why: str) -> Item:
        """Put another wording in an item's place: a new item with the old one's sources; the old one is retired.

        The same text up to case, spaces and final punctuation only changes the wording that is shown.

        Raises:
            UnknownIdError: it is not stored.
        """
        new = item_id(text)
        old = self.item(id)
        if new == id:
            with self._write() as connection:
                connection.execute(sa.update(ItemRow).where(ItemRow.id == id).values(text=text))
                self._log(connection, "item", id, "edited", who, why, {"before": old.text})
            return self.item(id)
        created = now()
        with self._write() as connection:
            row = {"id": new, "text": text, "status": ItemStatus.ACTIVE.value, "round_id": old.round_id}
            insert = self._insert(ItemRow, skip_existing=True)
            insert = insert.values(**row, derived_from=id, created_at=created, last_seen=created)
            if connection.execute(insert.returning(ItemRow.id)).scalar() is None:
                self._set_status(connection, new, ItemStatus.ACTIVE.value, who, why)
            self._log(connection, "item", new, "edited", who, why, {"from": id})
            self._merge(connection, id, new, who, why)
        return self.item(new)

    def record_effect(self, effect: ItemEffect) -> ItemEffect:
        """Note what an item was measured to do; the latest measurement is the item's effect from now on.

        The same measurement of the same round again is left alone.

        Raises:
            UnknownIdError: the item or the round is not stored.
        """
        with self._write() as connection:
            insert = self._insert(ItemEffectRow, skip_existing=True).values(**effect.model_dump())
            if connection.execute(insert.returning(ItemEffectRow.id)).scalar() is not None:
                latest = {
                    "effect": effect.effect,
                    "effect_low": effect.low,
                    "effect_high": effect.high,
                    "effect_n": effect.n,
                }
                connection.execute(sa.update(ItemRow).where(ItemRow.id == effect.item_id).values(**latest))
        return self.effects(id=effect.id)[0]

    def effects(
        self, *, item_id: str | None = None, round_id: str | None = None, id: str | None = None
    ) -> list[ItemEffect]:
        """Measured effects, oldest first. A filter that is None lets all pass."""
        query = sa.select(ItemEffectRow.__table__).order_by(ItemEffectRow.created_at, ItemEffectRow.id)
        for column, value in (
            (ItemEffectRow.item_id, item_id),
            (ItemEffectRow.round_id, round_id),
            (ItemEffectRow.id, id),
        ):
            if value is not None:
                query = query.where(column == value)
        with self._read() as connection:
            return [ItemEffect(**row) for row in connection.execute(query).mappings()]


def _flags(connection: sa.Connection, ids: Iterable[str]) -> dict[str, list[ItemFlag]]:
    flags: dict[str, list[ItemFlag]] = defaultdict(list)
    for chunk in chunks(ids, _BATCH):
        query = sa.select(ItemFlagRow.__table__).where(ItemFlagRow.item_id.in_(chunk))
        for row in connection.execute(query.order_by(ItemFlagRow.at, ItemFlagRow.flag, ItemFlagRow.other)).mappings():
            flags[row["item_id"]].append(ItemFlag(**{key: row[key] for key in ItemFlag.model_fields}))
    return flags


def _unknown_to(connection: sa.Connection, item: str, sources: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the sources that the item does not have yet, by itself or through a merge."""
    known = sa.select(ItemSourceRow.extraction_id, ItemSourceRow.episode_id).where(ItemSourceRow.item_id == item)
    present = {tuple(row) for row in connection.execute(known)}
    return [row for row in sources if (row["extraction_id"], row["episode_id"]) not in present]


def count_support(connection: sa.Connection, ids: Iterable[str]) -> None:
    """Bring the columns that follow from sources up to date."""
    learned = sa.select(ItemSourceRow).where(ItemSourceRow.item_id == ItemRow.id, ItemSourceRow.recalled.is_(False))
    support = learned.with_only_columns(sa.func.count(sa.distinct(ItemSourceRow.episode_id))).scalar_subquery()
    seen = learned.with_only_columns(sa.func.max(ItemSourceRow.created_at)).scalar_subquery()
    values = {"support": support, "last_seen": sa.func.coalesce(seen, ItemRow.created_at)}
    for chunk in chunks(ids, _BATCH):
        connection.execute(sa.update(ItemRow).where(ItemRow.id.in_(chunk)).values(**values))


def _names(connection: sa.Connection, item_id: str) -> set[str]:
    """The ids that an item has gone by: its own, and those of the items that were merged into it."""
    merged = sa.select(ItemFlagRow.item_id).where(ItemFlagRow.flag == MERGED)
    names, fresh = {item_id}, {item_id}
    while fresh:
        fresh = set(connection.scalars(merged.where(ItemFlagRow.other.in_(fresh)))) - names
        names |= fresh
    return names


def _was_known(connection: sa.Connection, episode_id: str, names: set[str]) -> bool:
    """Whether the knowledge that an episode was played with held an item, under any of its ids."""
    query = (
        sa.select(KnowledgeItemRow.item_id)
        .join(EpisodeRow, EpisodeRow.knowledge == KnowledgeItemRow.knowledge_id)
        .where(EpisodeRow.id == episode_id, KnowledgeItemRow.item_id.in_(names))
    )
    return connection.execute(query).first() is not None
