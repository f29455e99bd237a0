"""Whether a store is whole: digests that match their texts, and references that lead somewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import sqlalchemy as sa

from memory.columns import unpack_ids, unpack_logprobs, unpack_mask
from memory.database import chunks
from memory.episodes import text_digest
from memory.normalise import item_id
from memory.records import Record, digest
from memory.schema import (
    CheckpointRow,
    EpisodeRow,
    EvaluationResultRow,
    EvaluationRow,
    EventRow,
    ItemFlagRow,
    ItemRow,
    ItemSourceRow,
    KnowledgeRow,
    RunRow,
    TextRow,
    TurnRow,
)
from memory.tallies import TallyTable

_BATCH = 500


class Finding(Record):
    """Something that is not as it should be. A `note` is unusual but legitimate, such as weights played elsewhere."""

    level: Literal["error", "note"]
    kind: str
    id: str
    problem: str


#: Columns without a foreign key, and where they lead. Errors, unless playing with foreign weights explains them.
_REFERENCES: tuple[tuple[str, Any, Any, str, Any, Literal["error", "note"]], ...] = (
    ("episode", EpisodeRow.id, EpisodeRow.checkpoint, "checkpoint", CheckpointRow.id, "note"),
    ("episode", EpisodeRow.id, EpisodeRow.knowledge, "knowledge", KnowledgeRow.id, "note"),
    ("episode", EpisodeRow.id, EpisodeRow.run_id, "run", RunRow.id, "error"),
    ("checkpoint", CheckpointRow.id, CheckpointRow.parent, "checkpoint", CheckpointRow.id, "note"),
    ("checkpoint", CheckpointRow.id, CheckpointRow.knowledge, "knowledge", KnowledgeRow.id, "note"),
    ("checkpoint", CheckpointRow.id, CheckpointRow.run_id, "run", RunRow.id, "error"),
    ("run", RunRow.id, RunRow.knowledge, "knowledge", KnowledgeRow.id, "note"),
    ("run", RunRow.id, RunRow.parent, "checkpoint", CheckpointRow.id, "note"),
    ("evaluation", EvaluationRow.id, EvaluationRow.checkpoint, "checkpoint", CheckpointRow.id, "note"),
    ("evaluation", EvaluationRow.id, EvaluationRow.knowledge, "knowledge", KnowledgeRow.id, "note"),
    (
        "evaluation",
        EvaluationResultRow.evaluation_id,
        EvaluationResultRow.episode_id,
        "episode",
        EpisodeRow.id,
        "error",
    ),
    ("item", ItemRow.id, ItemRow.derived_from, "item", ItemRow.id, "error"),
    ("item", ItemFlagRow.item_id, ItemFlagRow.other, "item", ItemRow.id, "error"),
)


class VerifyTable(TallyTable):
    """The part of the store that checks itself."""

    def verify(self) -> Iterator[Finding]:
        """Everything that is wrong, as it is found; reads the whole store.

        Checks the database's own structure, the digest of every text, item and knowledge, that every reference leads
        to a row (or to one that was forgotten on purpose), that token columns are readable and of one length, and
        that counts kept beside what they count agree with it.
        """
        for check in self.checks().values():
            yield from check()

    def checks(self) -> dict[str, Callable[[], Iterator[Finding]]]:
        """The parts of `verify` by what they look at, in its order."""
        return {
            "database": self._verify_database,
            "texts": self._verify_texts,
            "turns": self._verify_turns,
            "episodes": self._verify_episodes,
            "tallies": self._verify_tallies,
            "items": self._verify_items,
            "knowledge": self._verify_knowledge,
            "evaluations": self._verify_evaluations,
            "references": self._verify_references,
        }

    def _verify_database(self) -> Iterator[Finding]:
        if self._engine.dialect.name != "sqlite":
            return  # PostgreSQL checks its own pages and constraints
        with self._read() as connection:
            for (line,) in connection.exec_driver_sql("PRAGMA quick_check(20)"):
                if line != "ok":
                    yield Finding(level="error", kind="database", id="", problem=str(line))
            for table, row, parent, _ in connection.exec_driver_sql("PRAGMA foreign_key_check"):
                problem = f"row {row} refers to something that {parent} lacks"
                yield Finding(level="error", kind="database", id=str(table), problem=problem)

    def _verify_texts(self) -> Iterator[Finding]:
        with self._read() as connection:
            found = connection.execute(sa.select(TextRow.digest, TextRow.body).execution_options(yield_per=_BATCH))
            for digest_, body in found:
                if text_digest(body) != digest_:
                    yield Finding(level="error", kind="text", id=digest_, problem="its digest does not match")

    def _verify_turns(self) -> Iterator[Finding]:
        counted = sa.select(TurnRow.episode_id, sa.func.count().label("n")).group_by(TurnRow.episode_id).subquery()
        wrong = sa.select(EpisodeRow.id, EpisodeRow.turns, counted.c.n)
        wrong = wrong.outerjoin(counted, counted.c.episode_id == EpisodeRow.id)
        with self._read() as connection:
            for id_, said, found in connection.execute(
                wrong.where(EpisodeRow.turns != sa.func.coalesce(counted.c.n, 0))
            ):
                yield Finding(level="error", kind="episode", id=id_, problem=f"{found or 0} of {said} turns are stored")
            for name in ("observation", "action", "feedback"):
                lost = sa.select(TurnRow.episode_id, TurnRow.number)
                lost = lost.outerjoin(TextRow, TextRow.digest == getattr(TurnRow, name))
                for id_, number in connection.execute(lost.where(TextRow.digest.is_(None))):
                    problem = f"the {name} of turn {number + 1} is lost"
                    yield Finding(level="error", kind="episode", id=id_, problem=problem)

    def _verify_episodes(self) -> Iterator[Finding]:
        columns = [EpisodeRow.token_ids, EpisodeRow.loss_mask, EpisodeRow.logprobs]
        query = sa.select(EpisodeRow.id, EpisodeRow.messages, EpisodeRow.tokens, EpisodeRow.sampled, *columns)
        with self._read() as connection, self._read() as other:
            query = query.order_by(EpisodeRow.id).execution_options(yield_per=_BATCH)
            rows = connection.execute(query).mappings()
            for batch in rows.partitions():
                wanted = {digest_ for row in batch for _, digest_ in row["messages"]}
                stored: set[str] = set()
                for chunk in chunks(wanted, _BATCH):
                    stored.update(other.execute(sa.select(TextRow.digest).where(TextRow.digest.in_(chunk))).scalars())
                for row in batch:
                    if any(digest_ not in stored for _, digest_ in row["messages"]):
                        yield Finding(level="error", kind="episode", id=row["id"], problem="a message's text is lost")
                    if problem := _token_fault(row):
                        yield Finding(level="error", kind="episode", id=row["id"], problem=problem)

    def _verify_tallies(self) -> Iterator[Finding]:
        with self._read() as connection:
            for env, split, more in self._wrong_tallies(connection):
                problem = f"its count is off by {more:+d} episodes" if more else "its turns, tokens or solved are off"
                yield Finding(level="error", kind="tally", id=f"{env} {split}", problem=problem)

    def _verify_items(self) -> Iterator[Finding]:
        learned = sa.select(ItemSourceRow).where(ItemSourceRow.item_id == ItemRow.id, ItemSourceRow.recalled.is_(False))
        support = learned.with_only_columns(sa.func.count(sa.distinct(ItemSourceRow.episode_id))).scalar_subquery()
        with self._read() as connection:
            for id_, text, said, found in connection.execute(
                sa.select(ItemRow.id, ItemRow.text, ItemRow.support, support)
            ):
                if item_id(text) != id_:
                    yield Finding(level="error", kind="item", id=id_, problem="its id does not match its text")
                if said != found:
                    problem = f"{said} episodes are said to support it, {found} do"
                    yield Finding(level="error", kind="item", id=id_, problem=problem)

    def _verify_knowledge(self) -> Iterator[Finding]:
        with self._read() as connection:
            for id_, text in connection.execute(sa.select(KnowledgeRow.id, KnowledgeRow.text)):
                if digest(text) != id_:
                    yield Finding(level="error", kind="knowledge", id=id_, problem="its id does not match its text")

    def _verify_evaluations(self) -> Iterator[Finding]:
        solved = sa.func.sum(sa.cast(EvaluationResultRow.success, sa.Integer))
        query = (
            sa.select(EvaluationRow.id, EvaluationRow.n, EvaluationRow.successes, sa.func.count(), solved)
            .join(EvaluationResultRow, EvaluationResultRow.evaluation_id == EvaluationRow.id)
            .group_by(EvaluationRow.id, EvaluationRow.n, EvaluationRow.successes)
        )
        with self._read() as connection:
            for id_, n, successes, found, found_solved in connection.execute(query):
                if (n, successes) != (found, found_solved):
                    problem = f"it says {successes} of {n}, its results say {found_solved} of {found}"
                    yield Finding(level="error", kind="evaluation", id=id_, problem=problem)

    def _verify_references(self) -> Iterator[Finding]:
        with self._read() as connection:
            forgotten = set(
                connection.execute(sa.select(EventRow.subject).where(EventRow.action == "forgotten")).scalars()
            )
            for kind, own, column, target, key, level in _REFERENCES:
                there = sa.orm.aliased(key.class_)
                known = getattr(there, key.key)
                lost = sa.select(sa.func.min(own), column, sa.func.count()).outerjoin(there, known == column)
                lost = lost.where(column.is_not(None), column != "", known.is_(None)).group_by(column)
                for id_, reference, count in connection.execute(lost):
                    if reference not in forgotten:
                        more = f", and {count - 1} more like it" if count > 1 else ""
                        problem = f"its {target} {reference} is not in this store{more}"
                        yield Finding(level=level, kind=kind, id=id_, problem=problem)


def _token_fault(row: Any) -> str:
    try:
        ids, mask = unpack_ids(row["token_ids"]), unpack_mask(row["loss_mask"])
        logprobs = unpack_logprobs(row["logprobs"])
    except Exception as error:  # zlib and numpy have errors of their own for broken bytes
        return f"its tokens cannot be read ({error})"
    if not len(ids) == len(mask) == len(logprobs) == row["tokens"] or sum(mask) != row["sampled"]:
        return "its token columns disagree"
    return ""
