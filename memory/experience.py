"""Extractions and knowledge versions in the store."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from memory.database import chunks
from memory.errors import UnknownIdError
from memory.items import ItemTable
from memory.records import Extraction, ItemStatus, Knowledge, KnowledgeItem, now
from memory.schema import ExtractionEpisodeRow, ExtractionRow, ItemRow, KnowledgeItemRow, KnowledgeRow

_BATCH = 500


class ExperienceTable(ItemTable):
    """The part of the store that keeps what was learned, in words."""

    def add_extraction(self, extraction: Extraction, round_id: str | None = None) -> None:
        """Store an extraction; one that is there already is left alone.

        Raises:
            UnknownIdError: its episode or the round is not stored.
        """
        row = {**extraction.model_dump(exclude={"others"}), "round_id": round_id, "created_at": now()}
        others = [
            {"extraction_id": extraction.id, "position": position, "episode_id": episode}
            for position, episode in enumerate(extraction.others, 1)
        ]
        with self._write() as connection:
            self._insert_rows(connection, ExtractionRow, [row])
            self._insert_rows(connection, ExtractionEpisodeRow, others)

    def extractions(self, *, episode_id: str | None = None, round_id: str | None = None) -> list[Extraction]:
        """Extractions, oldest first; those of an episode include those that read it among others."""
        query = sa.select(*(getattr(ExtractionRow, name) for name in Extraction.model_fields if name != "others"))
        if episode_id is not None:
            among = sa.select(ExtractionEpisodeRow.extraction_id).where(ExtractionEpisodeRow.episode_id == episode_id)
            query = query.where(sa.or_(ExtractionRow.episode_id == episode_id, ExtractionRow.id.in_(among)))
        if round_id is not None:
            query = query.where(ExtractionRow.round_id == round_id)
        query = query.order_by(ExtractionRow.created_at, ExtractionRow.id)
        with self._read() as connection:
            rows = connection.execute(query).mappings().all()
            others: dict[str, list[str]] = defaultdict(list)
            for chunk in chunks((row["id"] for row in rows), _BATCH):
                further = sa.select(ExtractionEpisodeRow.__table__)
                further = further.where(ExtractionEpisodeRow.extraction_id.in_(chunk))
                for row in connection.execute(further.order_by(ExtractionEpisodeRow.position)).mappings():
                    others[row["extraction_id"]].append(row["episode_id"])
        return [Extraction(**row, others=tuple(others[row["id"]])) for row in rows]

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
                new = {
                    "status": ItemStatus.ACTIVE.value,
                    "round_id": round_id,
                    "created_at": created,
                    "last_seen": created,
                }
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

    def knowledge_versions(self, *, round_id: str | None = None, limit: int | None = None) -> list[Knowledge]:
        """All knowledge texts by version number; with a limit the latest ones."""
        return self._knowledge(*([KnowledgeRow.round_id == round_id] if round_id is not None else []), limit=limit)

    def knowledge_holding(self, item_id: str) -> list[tuple[str, int]]:
        """Id and version of every knowledge text that holds an item, by version number."""
        query = sa.select(KnowledgeRow.id, KnowledgeRow.version).join(KnowledgeItemRow)
        query = query.where(KnowledgeItemRow.item_id == item_id).order_by(KnowledgeRow.version)
        with self._read() as connection:
            return [(id_, version) for id_, version in connection.execute(query)]

    def restore_knowledge(self, id: str, who: str, why: str) -> list[str]:
        """Make the items of a version active and retire the active ones that it lacks. Returns the changed ones' ids.

        Raises:
            UnknownIdError: it is not stored.
        """
        wanted = {place.id for place in self.knowledge(id).items}
        changed = []
        with self._write() as connection:
            statuses = connection.execute(sa.select(ItemRow.id, ItemRow.status).order_by(ItemRow.id)).tuples().all()
            for item, status in statuses:
                target = ItemStatus.ACTIVE if item in wanted else ItemStatus.RETIRED
                if (item in wanted and status != target) or (item not in wanted and status == ItemStatus.ACTIVE):
                    self._set_status(connection, item, target.value, who, why)
                    changed.append(item)
            self._log(connection, "knowledge", id, "restored", who, why)
        return changed

    def _knowledge(self, *conditions: sa.ColumnElement[bool], limit: int | None = None) -> list[Knowledge]:
        query = sa.select(KnowledgeRow.__table__).where(*conditions).order_by(KnowledgeRow.version.desc()).limit(limit)
        with self._read() as connection:
            rows = connection.execute(query).mappings().all()[::-1]
            items: dict[str, list[KnowledgeItem]] = defaultdict(list)
            for chunk in chunks((row["id"] for row in rows), _BATCH):
                query = sa.select(KnowledgeItemRow.__table__).where(KnowledgeItemRow.knowledge_id.in_(chunk))
                for row in connection.execute(query.order_by(KnowledgeItemRow.position)).mappings():
                    items[row["knowledge_id"]].append(KnowledgeItem(id=row["item_id"], text=row["text"]))
        return [_knowledge_record(row, items[row["id"]]) for row in rows]


def _knowledge_record(row: Any, items: Sequence[KnowledgeItem]) -> Knowledge:
    return Knowledge(**{**row, "dropped": tuple(row["dropped"]), "items": tuple(items)})
