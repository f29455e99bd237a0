"""Extractions, items and knowledge versions in the store."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from memory.database import Database, chunks
from memory.errors import UnknownIdError
from memory.normalise import item_id
from memory.records import (
    Extraction,
    Item,
    ItemSource,
    ItemStatus,
    Knowledge,
    KnowledgeItem,
    digest,
    now,
)
from memory.schema import (
    EpisodeRow,
    ExtractionRow,
    ItemRow,
    ItemSourceRow,
    KnowledgeItemRow,
    KnowledgeRow,
)

_BATCH = 500


class ExperienceTable(Database):
    """The part of the store that keeps what was learned, in words."""

    def add_extraction(self, extraction: Extraction, round_id: str | None = None) -> None:
        """Store an extraction; one that is there already is left alone.

        Raises:
            UnknownIdError: its episode or the round is not stored.
        """
        row = {**extraction.model_dump(), "round_id": round_id, "created_at": now()}
        with self._write() as connection:
            self._insert_rows(connection, ExtractionRow, [row])

    def extractions(self, *, episode_id: str | None = None, round_id: str | None = None) -> list[Extraction]:
        """Extractions, oldest first."""
        query = sa.select(*(getattr(ExtractionRow, name) for name in Extraction.model_fields))
        if episode_id is not None:
            query = query.where(ExtractionRow.episode_id == episode_id)
        if round_id is not None:
            query = query.where(ExtractionRow.round_id == round_id)
        query = query.order_by(ExtractionRow.created_at, ExtractionRow.id)
        with self._read() as connection:
            return [Extraction(**row) for row in connection.execute(query).mappings()]

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
            extraction: where it was said (stored before); None for an item given by hand. A source is noted once.
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
                insert = self._insert(ItemRow, skip_existing=True).values(**row, created_at=created)
                if connection.execute(insert.returning(ItemRow.id)).scalar() is not None:
                    self._log(connection, "item", id_, "added", who, why)
            if extraction is not None:
                source = {
                    "id": digest(id_, extraction.id),
                    "item_id": id_,
                    "episode_id": extraction.episode_id,
                    "extraction_id": extraction.id,
                    "text": text,
                    "recalled": _was_known(connection, extraction.episode_id, id_),
                    "created_at": created,
                }
                self._insert_rows(connection, ItemSourceRow, [source])
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

    def _items(self, *conditions: sa.ColumnElement[bool], limit: int | None = None) -> list[Item]:
        query = sa.select(ItemRow.__table__).where(*conditions).order_by(ItemRow.created_at, ItemRow.id)
        with self._read() as connection:
            rows = connection.execute(query.limit(limit)).mappings().all()
            sources: dict[str, list[ItemSource]] = defaultdict(list)
            for chunk in chunks((row["id"] for row in rows), _BATCH):
                query = sa.select(ItemSourceRow.__table__).where(ItemSourceRow.item_id.in_(chunk))
                query = query.order_by(ItemSourceRow.created_at, ItemSourceRow.id)
                for row in connection.execute(query).mappings():
                    source = ItemSource(**{key: row[key] for key in ItemSource.model_fields})
                    sources[row["item_id"]].append(source)
        return [Item(**row, sources=tuple(sources[row["id"]])) for row in rows]

    def set_item_status(self, id: str, status: ItemStatus | str, who: str, why: str) -> Item:
        """Retire an item, bring it back or put it in quarantine, and note who did it and why.

        Raises:
            UnknownIdError: it is not stored.
        """
        value = ItemStatus(status).value
        with self._write() as connection:
            update = sa.update(ItemRow).where(ItemRow.id == id).values(status=value)
            if not connection.execute(update).rowcount:
                raise UnknownIdError(f"no item {id!r} in {self.url}")
            self._log(connection, "item", id, value, who, why)
        return self.item(id)

    def add_knowledge(self, knowledge: Knowledge, round_id: str | None = None, parent: str | None = None) -> Knowledge:
        """Store a knowledge text under the next version number; one that is stored keeps its number and origin.

        Items that are not stored yet are added, as given by hand.

        Raises:
            UnknownIdError: the round or the parent version is not stored.
        """
        created = now()
        with self._write() as connection:
            self._one_at_a_time(connection)
            if connection.scalar(sa.select(KnowledgeRow.id).where(KnowledgeRow.id == knowledge.id)) is None:
                version = (connection.scalar(sa.select(sa.func.max(KnowledgeRow.version))) or 0) + 1
                plain = knowledge.model_dump(include={"id", "text", "tokens", "dropped"})
                lineage = {"version": version, "round_id": round_id, "parent": parent, "created_at": created}
                connection.execute(sa.insert(KnowledgeRow), {**plain, **lineage})
                new = {"status": ItemStatus.ACTIVE.value, "round_id": round_id, "created_at": created}
                self._insert_rows(connection, ItemRow, [{"id": i.id, "text": i.text, **new} for i in knowledge.items])
                places = [
                    {"knowledge_id": knowledge.id, "position": n, "item_id": item.id, "text": item.text}
                    for n, item in enumerate(knowledge.items)
                ]
                self._insert_rows(connection, KnowledgeItemRow, places)
                self._log(connection, "knowledge", knowledge.id, "added", "engrain", f"version {version}")
        return self.knowledge(knowledge.id)

    def knowledge(self, id_or_version: str | int) -> Knowledge:
        """One knowledge text, by id or by version number (as a number or in digits).

        Raises:
            UnknownIdError: it is not stored.
        """
        key = str(id_or_version)
        found = [] if isinstance(id_or_version, int) else self._knowledge(KnowledgeRow.id == key)
        if not found and key.isascii() and key.isdigit() and len(key) < 10:
            found = self._knowledge(KnowledgeRow.version == int(key))
        if not found:
            raise UnknownIdError(f"no knowledge {key!r} in {self.url}")
        return found[0]

    def knowledge_versions(self, *, round_id: str | None = None) -> list[Knowledge]:
        """All knowledge texts by version number."""
        return self._knowledge(*([KnowledgeRow.round_id == round_id] if round_id is not None else []))

    def _knowledge(self, *conditions: sa.ColumnElement[bool]) -> list[Knowledge]:
        query = sa.select(KnowledgeRow.__table__).where(*conditions).order_by(KnowledgeRow.version)
        with self._read() as connection:
            rows = connection.execute(query).mappings().all()
            items: dict[str, list[KnowledgeItem]] = defaultdict(list)
            for chunk in chunks((row["id"] for row in rows), _BATCH):
                query = sa.select(KnowledgeItemRow.__table__).where(KnowledgeItemRow.knowledge_id.in_(chunk))
                for row in connection.execute(query.order_by(KnowledgeItemRow.position)).mappings():
                    items[row["knowledge_id"]].append(KnowledgeItem(id=row["item_id"], text=row["text"]))
        return [_knowledge_record(row, items[row["id"]]) for row in rows]


def _knowledge_record(row: Any, items: Sequence[KnowledgeItem]) -> Knowledge:
    return Knowledge(**{**row, "dropped": tuple(row["dropped"]), "items": tuple(items)})


def _was_known(connection: sa.Connection, episode_id: str, item_id: str) -> bool:
    """Whether the knowledge that an episode was played with held this item."""
    query = (
        sa.select(KnowledgeItemRow.item_id)
        .join(EpisodeRow, EpisodeRow.knowledge == KnowledgeItemRow.knowledge_id)
        .where(EpisodeRow.id == episode_id, KnowledgeItemRow.item_id == item_id)
    )
    return connection.execute(query).first() is not None
