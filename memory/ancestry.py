"""Where a checkpoint comes from: run, knowledge, items, extractions and episodes, and the checkpoints before it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import sqlalchemy as sa

from memory.errors import UnknownIdError
from memory.experience import ExperienceTable
from memory.lineage import LineageTable
from memory.records import (
    CheckpointRecord,
    EvaluationRecord,
    ItemEffect,
    ItemSummary,
    Knowledge,
    Record,
    RunRecord,
)
from memory.schema import (
    CheckpointRow,
    EpisodeRow,
    EvaluationRow,
    ExtractionRow,
    ItemSourceRow,
    KnowledgeItemRow,
    KnowledgeRow,
    RunRow,
)

SOURCES = 5  # sources that a lineage shows of each item, unless asked for more


class Origin(Record):
    """One source of an item with the episode and the extraction it came from; None where it was given by hand."""

    item_id: str
    text: str
    recalled: bool
    episode_id: str | None
    extraction_id: str | None
    mode: str | None
    writer: str | None  # the model that wrote it
    env: str | None
    split: str | None
    task_id: str | None
    success: bool | None
    round_id: str | None


class ItemOrigin(Record):
    """An item in a knowledge text: its place and wording there, and its sources, those that taught it first."""

    position: int
    wording: str
    item: ItemSummary
    sources: tuple[Origin, ...]


class CheckpointLineage(Record):
    """A checkpoint and all that it was made from; `parent` goes back to the base model."""

    checkpoint: CheckpointRecord
    run: RunRecord | None
    training_episodes: int
    training_solved: int
    knowledge: Knowledge | None
    items: tuple[ItemOrigin, ...]
    evaluations: tuple[EvaluationRecord, ...]  # without the results of single tasks
    parent: CheckpointLineage | None = None


class Blame(Record):
    """How an item came into a checkpoint: the training that taught it, and everything known about the item."""

    checkpoint: str
    item: ItemSummary
    through: tuple[CheckpointLineage, ...]  # the checkpoints of the lineage that were trained on it, latest first
    sources: tuple[Origin, ...]
    effects: tuple[ItemEffect, ...]


class AncestryTable(ExperienceTable, LineageTable):
    """The part of the store that answers where things come from."""

    def lineage(
        self,
        checkpoint: str,
        *,
        sources: int | None = SOURCES,
        generations: int = 100,
        detailed: int | None = None,
    ) -> CheckpointLineage:
        """A checkpoint's tree, back to the episodes and through at most so many checkpoints before it.

        Args:
            checkpoint: its id.
            sources: at most this many sources of each item; None is all.
            generations: how many parents to follow.
            detailed: of how many checkpoints to read the items, latest first; None is all.

        Raises:
            UnknownIdError: it is not stored.
        """
        chain = self._chain(checkpoint, generations)
        oldest, *younger = reversed(self._lineages(chain, sources, detailed=detailed))
        found = oldest
        for level in younger:
            found = level.model_copy(update={"parent": found})
        return found

    def blame(self, checkpoint: str, item: str, *, sources: int | None = None) -> Blame:
        """How an item came into a checkpoint or into one before it.

        Raises:
            UnknownIdError: one of them is not stored, or no training of the lineage had the item.
        """
        chain = self._chain(checkpoint, 100)
        texts = [record.knowledge for record in chain if record.knowledge]
        with self._read() as connection:
            query = sa.select(KnowledgeItemRow.knowledge_id).where(
                KnowledgeItemRow.item_id == item, KnowledgeItemRow.knowledge_id.in_(texts)
            )
            having = set(connection.execute(query).scalars())
            found = self._origins(connection, [item], sources)[item]
        summaries = self.item_rows(ids=[item])
        if not summaries:
            raise UnknownIdError(f"no item {item!r} in {self.url}")
        if not having:
            raise UnknownIdError(
                f"checkpoint {checkpoint} and those before it were not trained on item {item}; "
                f"`engrain memory lineage {checkpoint}` shows on what"
            )
        through = self._lineages([record for record in chain if record.knowledge in having], 0)
        mine = [
            level.model_copy(update={"items": tuple(place for place in level.items if place.item.id == item)})
            for level in through
        ]
        effects = tuple(self.effects(item_id=item))
        return Blame(
            checkpoint=checkpoint, item=summaries[0], through=tuple(mine), sources=tuple(found), effects=effects
        )

    def _chain(self, checkpoint: str, generations: int) -> list[CheckpointRecord]:
        """A checkpoint and those before it, as far as they are stored."""
        own = sa.select(CheckpointRow.id, CheckpointRow.parent, sa.literal(0).label("age"))
        found = own.where(CheckpointRow.id == checkpoint).cte("found", recursive=True)
        before = sa.select(CheckpointRow.id, CheckpointRow.parent, found.c.age + 1)
        before = before.join(found, CheckpointRow.id == found.c.parent).where(found.c.age < generations)
        found = found.union_all(before)
        with self._read() as connection:
            ages = connection.execute(sa.select(found.c.id, found.c.age).order_by(found.c.age)).tuples().all()
        order = list(dict.fromkeys(id_ for id_, _ in ages))  # a forged circle ends where it began
        if not order:
            raise UnknownIdError(f"no checkpoint {checkpoint!r} in {self.url}")
        records = {record.id: record for record in self._checkpoints(CheckpointRow.id.in_(order))}
        return [records[id_] for id_ in order]

    def _lineages(
        self, chain: Sequence[CheckpointRecord], sources: int | None, *, detailed: int | None = None
    ) -> list[CheckpointLineage]:
        """What each of these checkpoints was made from, read together."""
        run_ids = [record.run_id for record in chain if record.run_id]
        text_ids = [record.knowledge for record in chain if record.knowledge]
        runs: dict[str | None, RunRecord] = {run.id: run for run in self._runs(RunRow.id.in_(run_ids))}
        texts: dict[str | None, Knowledge] = {text.id: text for text in self._knowledge(KnowledgeRow.id.in_(text_ids))}
        measured: dict[str | None, list[EvaluationRecord]] = defaultdict(list)
        of_these = EvaluationRow.checkpoint.in_([record.id for record in chain])
        for evaluation in self._evaluations(of_these, with_results=False):
            measured[evaluation.checkpoint].append(evaluation)
        shown = {record.knowledge for record in chain[:detailed]}
        items = list(dict.fromkeys(place.id for id_ in shown if id_ in texts for place in texts[id_].items))
        summaries = {row.id: row for row in self.item_rows(ids=items)}
        solved = sa.func.sum(sa.cast(EpisodeRow.success, sa.Integer))
        played = sa.select(EpisodeRow.run_id, sa.func.count(), solved).group_by(EpisodeRow.run_id)
        with self._read() as connection:
            origins = self._origins(connection, items, sources)
            trained = connection.execute(played.where(EpisodeRow.run_id.in_(run_ids)))
            counts = {run: (episodes, won) for run, episodes, won in trained}
        lineages = []
        for record in chain:
            text = texts.get(record.knowledge)
            episodes, won = counts.get(record.run_id, (0, 0))
            places = [
                ItemOrigin(position=n, wording=place.text, item=summaries[place.id], sources=tuple(origins[place.id]))
                for n, place in enumerate(text.items if text and text.id in shown else (), 1)
            ]
            lineages.append(
                CheckpointLineage(
                    checkpoint=record,
                    run=runs.get(record.run_id),
                    training_episodes=episodes,
                    training_solved=won,
                    knowledge=text,
                    items=tuple(places),
                    evaluations=tuple(measured[record.id]),
                )
            )
        return lineages

    def _origins(self, connection: sa.Connection, items: list[str], limit: int | None) -> dict[str, list[Origin]]:
        """The sources of items with their episodes: what was learned before what was recalled, oldest first."""
        origins: dict[str, list[Origin]] = defaultdict(list)
        if not items or limit == 0:
            return origins
        rank = sa.func.row_number().over(
            partition_by=ItemSourceRow.item_id,
            order_by=[ItemSourceRow.recalled, ItemSourceRow.created_at, ItemSourceRow.id],
        )
        plain = [
            getattr(ItemSourceRow, name) for name in ("item_id", "text", "recalled", "episode_id", "extraction_id")
        ]
        ranked = sa.select(*plain, rank.label("rank")).where(ItemSourceRow.item_id.in_(items)).subquery()
        query = (
            sa.select(
                ranked.c.item_id, ranked.c.text, ranked.c.recalled, ranked.c.episode_id, ranked.c.extraction_id,
                ExtractionRow.mode, ExtractionRow.model.label("writer"), EpisodeRow.env, EpisodeRow.split,
                EpisodeRow.task_id, EpisodeRow.success, EpisodeRow.round_id,
            )
            .outerjoin(ExtractionRow, ExtractionRow.id == ranked.c.extraction_id)
            .outerjoin(EpisodeRow, EpisodeRow.id == ranked.c.episode_id)
            .order_by(ranked.c.item_id, ranked.c.rank)
        )  # fmt: skip
        if limit is not None:
            query = query.where(ranked.c.rank <= limit)
        for row in connection.execute(query):  # as tuples in the order of the fields: there may be thousands
            origins[row.item_id].append(Origin(**dict(zip(Origin.model_fields, row, strict=True))))
        return origins
