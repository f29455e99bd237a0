"""Forgetting for good: an episode or an item, everything that was made from it, and which checkpoints learned it.

What is followed: episode -> extractions that read it -> items that nothing else taught, and their new wordings ->
knowledge texts that hold them -> episodes played and evaluations made with those texts in the context, and so on.
Weights cannot forget by deletion: checkpoints stay, and are named.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import sqlalchemy as sa

from memory.database import chunks
from memory.errors import UnknownIdError
from memory.items import count_support
from memory.records import Record
from memory.schema import (
    CheckpointRow,
    EpisodeRow,
    EvaluationResultRow,
    EvaluationRow,
    EventRow,
    ExtractionEpisodeRow,
    ExtractionRow,
    ItemEffectRow,
    ItemFlagRow,
    ItemRow,
    ItemSourceRow,
    KnowledgeItemRow,
    KnowledgeRow,
    RunRow,
    TaskRow,
    TextRow,
    TurnRow,
)
from memory.tallies import TALLIED, Changes, TallyTable, changes_by

_BATCH = 500


class Forgotten(Record):
    """Ids of what is deleted, sorted; `weakened` are items that lose a source and stay; `checkpoints` learned it."""

    episodes: tuple[str, ...] = ()
    extractions: tuple[str, ...] = ()
    items: tuple[str, ...] = ()
    knowledge: tuple[str, ...] = ()
    evaluations: tuple[str, ...] = ()
    weakened: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()


class ForgetTable(TallyTable):
    """The part of the store that deletes."""

    def forget_plan(self, kind: Literal["episode", "item"], id: str) -> Forgotten:
        """What `forget` would delete.

        Raises:
            UnknownIdError: it is not stored.
        """
        with self._read() as connection:
            return self._plan(connection, kind, id)

    def forget(self, kind: Literal["episode", "item"], id: str, who: str, why: str) -> Forgotten:
        """Delete an episode or an item with everything derived from it, events about it included.

        An event without any of its text notes that it was forgotten, for it, for each knowledge text and for each
        checkpoint that had learned it. On SQLite the freed pages are overwritten and the write-ahead log emptied;
        backups and PostgreSQL's archives are yours to see to.

        Raises:
            UnknownIdError: it is not stored.
        """
        with self._write() as connection:
            if self._engine.dialect.name == "postgresql":  # nobody writes a text while unused ones are looked for
                connection.execute(sa.text("LOCK TABLE texts IN EXCLUSIVE MODE"))
            else:
                connection.exec_driver_sql("PRAGMA secure_delete = ON")
            plan = self._plan(connection, kind, id)
            self._delete(connection, plan)
            for subject_kind, subjects in (
                (kind, [id]),
                ("knowledge", plan.knowledge),
                ("checkpoint", plan.checkpoints),
            ):
                action = "learned what was forgotten" if subject_kind == "checkpoint" else "forgotten"
                for subject in subjects:
                    self._log(connection, subject_kind, subject, action, who, why)
        if self._engine.dialect.name == "sqlite":
            with self._read() as connection:
                connection.rollback()
                connection.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return plan

    def _plan(self, connection: sa.Connection, kind: str, id: str) -> Forgotten:
        table: Any = EpisodeRow if kind == "episode" else ItemRow
        if connection.scalar(sa.select(table.id).where(table.id == id)) is None:
            raise UnknownIdError(f"no {kind} {id!r} in {self.url}")
        find = _Finder(connection)
        episodes: set[str] = {id} if kind == "episode" else set()
        items: set[str] = {id} if kind == "item" else set()
        extractions: set[str] = set()
        knowledge: set[str] = set()
        touched: set[str] = set()
        before = -1
        while before != (before := len(episodes) + len(items) + len(extractions) + len(knowledge)):
            extractions |= find(ExtractionRow.id, ExtractionRow.episode_id, episodes)
            extractions |= find(ExtractionEpisodeRow.extraction_id, ExtractionEpisodeRow.episode_id, episodes)
            touched |= find(ItemSourceRow.item_id, ItemSourceRow.episode_id, episodes)
            touched |= find(ItemSourceRow.item_id, ItemSourceRow.extraction_id, extractions)
            items |= {item for item in touched - items if not find.taught_elsewhere(item, episodes, extractions)}
            items |= find(ItemRow.id, ItemRow.derived_from, items)
            knowledge |= find(KnowledgeItemRow.knowledge_id, KnowledgeItemRow.item_id, items)
            episodes |= find(EpisodeRow.id, EpisodeRow.knowledge, knowledge)
        return Forgotten(
            episodes=tuple(sorted(episodes)),
            extractions=tuple(sorted(extractions)),
            items=tuple(sorted(items)),
            knowledge=tuple(sorted(knowledge)),
            evaluations=tuple(sorted(find(EvaluationRow.id, EvaluationRow.knowledge, knowledge))),
            weakened=tuple(sorted(touched - items)),
            checkpoints=tuple(sorted(find.checkpoints(episodes, knowledge))),
        )

    def _delete(self, connection: sa.Connection, plan: Forgotten) -> None:
        texts, tasks = _texts_of(connection, plan.episodes)

        def delete(column: Any, values: Iterable[str], *, unset: bool = False) -> None:
            """Delete the rows where a column has one of these values, or only the value."""
            change: Any = sa.update(column.class_).values({column.key: None}) if unset else sa.delete(column.class_)
            for chunk in chunks(values, _BATCH):
                connection.execute(change.where(column.in_(chunk)))

        delete(ItemSourceRow.episode_id, plan.episodes)
        delete(ItemSourceRow.extraction_id, plan.extractions)
        delete(ItemSourceRow.item_id, plan.items)
        delete(ExtractionEpisodeRow.extraction_id, plan.extractions)
        delete(ExtractionRow.id, plan.extractions)
        delete(TurnRow.episode_id, plan.episodes)
        for column in (ItemFlagRow.item_id, ItemFlagRow.other, ItemEffectRow.item_id):
            delete(column, plan.items)
        delete(ItemEffectRow.knowledge, plan.knowledge, unset=True)
        delete(EvaluationResultRow.evaluation_id, plan.evaluations)
        delete(EvaluationRow.id, plan.evaluations)
        delete(EvaluationResultRow.episode_id, plan.episodes, unset=True)
        delete(KnowledgeItemRow.knowledge_id, plan.knowledge)
        delete(KnowledgeRow.parent, plan.knowledge, unset=True)
        delete(KnowledgeRow.id, plan.knowledge)
        delete(ItemRow.id, plan.items)
        gone: Changes = {}
        for chunk in chunks(plan.episodes, _BATCH):
            deleted = sa.delete(EpisodeRow).where(EpisodeRow.id.in_(chunk)).returning(*TALLIED)
            changes_by(connection.execute(deleted).mappings(), -1, gone)
        for subjects in (plan.episodes, plan.extractions, plan.items, plan.knowledge):
            delete(EventRow.subject, subjects)
        delete(TaskRow.id, tasks - _Finder(connection)(EpisodeRow.task_id, EpisodeRow.task_id, tasks))
        delete(TextRow.digest, _unused(connection, texts))
        count_support(connection, plan.weakened)
        self._tally(connection, gone)


class _Finder:
    """Values of one column in the rows where another has one of many values."""

    def __init__(self, connection: sa.Connection) -> None:
        self.connection = connection

    def __call__(self, wanted: Any, column: Any, values: Iterable[str]) -> set[str]:
        found: set[str] = set()
        for chunk in chunks(values, _BATCH):
            found.update(self.connection.execute(sa.select(wanted).where(column.in_(chunk)).distinct()).scalars())
        return found

    def taught_elsewhere(self, item: str, episodes: set[str], extractions: set[str]) -> bool:
        """Whether a source remains that taught the item, rather than one that only recalled it."""
        query = sa.select(ItemSourceRow.episode_id, ItemSourceRow.extraction_id)
        query = query.where(ItemSourceRow.item_id == item, ItemSourceRow.recalled.is_(False))
        return any(e not in episodes and x not in extractions for e, x in self.connection.execute(query))

    def checkpoints(self, episodes: set[str], knowledge: set[str]) -> set[str]:
        """Checkpoints whose training saw any of these, and all that were trained on from them."""
        runs = self(RunRow.id, RunRow.knowledge, knowledge) | self(EpisodeRow.run_id, EpisodeRow.id, episodes)
        found = self(CheckpointRow.id, CheckpointRow.knowledge, knowledge)
        found |= self(CheckpointRow.id, CheckpointRow.run_id, {run for run in runs if run})
        for chunk in chunks(episodes, _BATCH):  # from before runs were noted: the round's checkpoints
            trained = sa.select(EpisodeRow.round_id).where(EpisodeRow.id.in_(chunk), EpisodeRow.stage == "train")
            rounds = self.connection.execute(trained.where(EpisodeRow.run_id.is_(None))).scalars()
            found |= self(CheckpointRow.id, CheckpointRow.round_id, {id_ for id_ in rounds if id_})
        before = -1
        while before != (before := len(found)):
            found |= self(CheckpointRow.id, CheckpointRow.parent, found)
        return found


def _texts_of(connection: sa.Connection, episodes: Iterable[str]) -> tuple[set[str], set[str]]:
    """Digests of all texts of these episodes, and the ids of their tasks."""
    texts: set[str] = set()
    tasks: set[str] = set()
    for chunk in chunks(episodes, _BATCH):
        rows = connection.execute(sa.select(EpisodeRow.messages, EpisodeRow.task_id).where(EpisodeRow.id.in_(chunk)))
        for messages, task in rows:
            tasks.add(task)
            texts.update(digest for _, digest in messages)
        turns = sa.select(TurnRow.observation, TurnRow.action, TurnRow.feedback).where(TurnRow.episode_id.in_(chunk))
        for row in connection.execute(turns):
            texts.update(row)
    return texts, tasks


def _unused(connection: sa.Connection, texts: set[str]) -> set[str]:
    """Those texts that no turn and no message refers to any more; reads all turns and messages once."""
    unused = set(texts)
    if not unused:
        return unused
    for query in (
        sa.select(TurnRow.observation, TurnRow.action, TurnRow.feedback),
        sa.select(EpisodeRow.messages),
    ):
        rows = connection.execute(query.execution_options(yield_per=5000))
        for row in rows:
            unused.difference_update([digest for _, digest in row[0]] if len(row) == 1 else row)
    return unused
