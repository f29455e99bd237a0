"""Rounds, checkpoints, evaluations and events in the store."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from memory.database import Database, chunks
from memory.errors import ConflictError, UnknownIdError
from memory.records import (
    CheckpointRecord,
    CheckpointStatus,
    EvaluationRecord,
    EvaluationResult,
    Event,
    RoundRecord,
    RoundStatus,
    RunRecord,
    new_id,
    now,
)
from memory.schema import CheckpointRow, EvaluationResultRow, EvaluationRow, EventRow, RoundRow, RunRow

_BATCH = 500


class LineageTable(Database):
    """The part of the store that keeps what was done with what was learned."""

    def create_round(self, config: Mapping[str, Any], seed: int, model: str) -> RoundRecord:
        """Begin a round under the next number; `config` must be JSON values."""
        id_, created = new_id(), now()
        with self._write() as connection:
            self._one_at_a_time(connection)
            number = (connection.scalar(sa.select(sa.func.max(RoundRow.number))) or 0) + 1
            row = {
                "id": id_, "number": number, "model": model, "seed": seed, "config": dict(config), "stage": "",
                "state": {}, "status": RoundStatus.RUNNING.value, "created_at": created, "updated_at": created,
            }  # fmt: skip
            connection.execute(sa.insert(RoundRow), row)
            self._log(connection, "round", id_, "created", "engrain", f"round {number}")
        return self.round(id_)

    def round(self, id_or_number: str | int) -> RoundRecord:
        """One round, by id or by number (as a number or in digits).

        Raises:
            UnknownIdError: it is not stored.
        """
        key = str(id_or_number)
        found = [] if isinstance(id_or_number, int) else self._rounds(RoundRow.id == key)
        if not found and key.isascii() and key.isdigit() and len(key) < 10:
            found = self._rounds(RoundRow.number == int(key))
        if not found:
            raise UnknownIdError(f"no round {key!r} in {self.url}")
        return found[0]

    def rounds(self, limit: int | None = None) -> list[RoundRecord]:
        """All rounds by number; with a limit the latest ones."""
        return self._rounds(limit=limit)

    def unfinished_round(self, model: str) -> RoundRecord | None:
        """The latest round of this model whose status is still `running`, for resuming."""
        found = self._rounds(RoundRow.model == model, RoundRow.status == RoundStatus.RUNNING.value)
        return found[-1] if found else None

    def update_round(
        self,
        id: str,
        *,
        stage: str | None = None,
        state: Mapping[str, Any] | None = None,
        status: RoundStatus | str | None = None,
        verdict: str | None = None,
    ) -> RoundRecord:
        """Set what is given and leave the rest; `state` replaces the old one whole.

        Raises:
            UnknownIdError: it is not stored.
        """
        given = {"stage": stage, "state": state, "status": status, "verdict": verdict}
        values: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        if state is not None:
            values["state"] = dict(state)
        if status is not None:
            values["status"] = str(status)
        with self._write() as connection:
            update = sa.update(RoundRow).where(RoundRow.id == id).values(**values, updated_at=now())
            if not connection.execute(update).rowcount:
                raise UnknownIdError(f"no round {id!r} in {self.url}")
            if status is not None:
                self._log(connection, "round", id, str(status), "engrain", verdict or "")
        return self.round(id)

    def _rounds(self, *conditions: sa.ColumnElement[bool], limit: int | None = None) -> list[RoundRecord]:
        query = sa.select(RoundRow.__table__).where(*conditions).order_by(RoundRow.number.desc()).limit(limit)
        with self._read() as connection:
            return [RoundRecord(**row) for row in connection.execute(query).mappings()][::-1]

    def add_run(self, run: RunRecord) -> RunRecord:
        """Store a training run that begins; one that is stored already is left alone, and comes back as it is.

        Raises:
            UnknownIdError: its round is not stored.
        """
        with self._write() as connection:
            insert = self._insert(RunRow, skip_existing=True).values(**run.model_dump()).returning(RunRow.id)
            if connection.execute(insert).scalar() is not None:
                self._log(connection, "run", run.id, "created", "engrain", run.method)
        return self.run(run.id)

    def finish_run(
        self, id: str, status: RoundStatus | str, *, reason: str = "", metrics: Sequence[Mapping[str, Any]] = ()
    ) -> RunRecord:
        """Note how a training run ended and what it measured at each step.

        Raises:
            UnknownIdError: it is not stored.
        """
        values = {
            "status": RoundStatus(status).value, "reason": reason, "metrics": [dict(m) for m in metrics],
            "finished_at": now(),
        }  # fmt: skip
        with self._write() as connection:
            if not connection.execute(sa.update(RunRow).where(RunRow.id == id).values(**values)).rowcount:
                raise UnknownIdError(f"no run {id!r} in {self.url}")
            self._log(connection, "run", id, str(values["status"]), "engrain", reason)
        return self.run(id)

    def run(self, id: str) -> RunRecord:
        """One training run.

        Raises:
            UnknownIdError: it is not stored.
        """
        found = self._runs(RunRow.id == id)
        if not found:
            raise UnknownIdError(f"no run {id!r} in {self.url}")
        return found[0]

    def runs(self, *, round_id: str | None = None, knowledge: str | None = None) -> list[RunRecord]:
        """Training runs, oldest first. A filter that is None lets all pass."""
        given = ((RunRow.round_id, round_id), (RunRow.knowledge, knowledge))
        return self._runs(*(column == value for column, value in given if value is not None))

    def _runs(self, *conditions: sa.ColumnElement[bool]) -> list[RunRecord]:
        query = sa.select(RunRow.__table__).where(*conditions).order_by(RunRow.created_at, RunRow.id)
        with self._read() as connection:
            return [RunRecord(**row) for row in connection.execute(query).mappings()]

    def add_checkpoint(self, checkpoint: CheckpointRecord) -> CheckpointRecord:
        """Store a checkpoint; the same one again is left alone.

        Raises:
            ConflictError: its id already stands for other weights.
            UnknownIdError: its round is not stored.
        """
        row = {**checkpoint.model_dump(), "status": checkpoint.status.value}
        with self._write() as connection:
            insert = self._insert(CheckpointRow, skip_existing=True).values(**row)
            if connection.execute(insert.returning(CheckpointRow.id)).scalar() is not None:
                self._log(connection, "checkpoint", checkpoint.id, checkpoint.status.value, "engrain", "added")
        stored = self.checkpoint(checkpoint.id)
        if (stored.model, stored.parent, stored.knowledge) != (
            checkpoint.model,
            checkpoint.parent,
            checkpoint.knowledge,
        ):
            raise ConflictError(f"checkpoint id {checkpoint.id!r} already stands for other weights in {self.url}")
        return stored

    def move_checkpoint(self, id: str, path: str, who: str, why: str) -> CheckpointRecord:
        """Note that a checkpoint's weights lie in another folder now; the event says where they were.

        Raises:
            UnknownIdError: it is not stored.
        """
        before = self.checkpoint(id).path
        with self._write() as connection:
            connection.execute(sa.update(CheckpointRow).where(CheckpointRow.id == id).values(path=path))
            self._log(connection, "checkpoint", id, "moved", who, why, {"before": before, "path": path})
        return self.checkpoint(id)

    def checkpoint(self, id: str) -> CheckpointRecord:
        """One checkpoint.

        Raises:
            UnknownIdError: it is not stored.
        """
        found = self._checkpoints(CheckpointRow.id == id)
        if not found:
            raise UnknownIdError(f"no checkpoint {id!r} in {self.url}")
        return found[0]

    def checkpoints(self, *, model: str | None = None, round_id: str | None = None) -> list[CheckpointRecord]:
        """Checkpoints, oldest first."""
        conditions = []
        if model is not None:
            conditions.append(CheckpointRow.model == model)
        if round_id is not None:
            conditions.append(CheckpointRow.round_id == round_id)
        return self._checkpoints(*conditions)

    def promote(self, id: str, who: str = "engrain", why: str = "") -> CheckpointRecord:
        """Make this checkpoint the one its model plays with from now on.

        Raises:
            UnknownIdError: it is not stored.
        """
        return self.set_checkpoint_status(id, CheckpointStatus.PROMOTED, who, why)

    def set_checkpoint_status(
        self, id: str, status: CheckpointStatus | str, who: str = "engrain", why: str = ""
    ) -> CheckpointRecord:
        """Promote, reject or roll back, and note who did it and why. After a roll-back the one before is current.

        Raises:
            UnknownIdError: it is not stored.
        """
        status = CheckpointStatus(status)
        values: dict[str, Any] = {"status": status.value}
        if status is CheckpointStatus.PROMOTED:
            values["promoted_at"] = now()
        with self._write() as connection:
            update = sa.update(CheckpointRow).where(CheckpointRow.id == id).values(**values)
            if not connection.execute(update).rowcount:
                raise UnknownIdError(f"no checkpoint {id!r} in {self.url}")
            self._log(connection, "checkpoint", id, status.value, who, why)
        return self.checkpoint(id)

    def current_checkpoint(self, model: str) -> CheckpointRecord | None:
        """The promoted checkpoint of this model that was promoted last; None is the base model."""
        found = self._checkpoints(CheckpointRow.model == model, CheckpointRow.status == CheckpointStatus.PROMOTED.value)
        return max(found, key=lambda record: record.promoted_at or record.created_at, default=None)

    def current_checkpoints(self) -> list[CheckpointRecord]:
        """The current checkpoint of each model that has one."""
        promoted = self._checkpoints(CheckpointRow.status == CheckpointStatus.PROMOTED.value)
        latest = sorted(promoted, key=lambda record: record.promoted_at or record.created_at)
        return list({record.model: record for record in latest}.values())

    def _checkpoints(self, *conditions: sa.ColumnElement[bool]) -> list[CheckpointRecord]:
        query = sa.select(CheckpointRow.__table__).where(*conditions)
        query = query.order_by(CheckpointRow.created_at, CheckpointRow.id)
        with self._read() as connection:
            return [CheckpointRecord(**row) for row in connection.execute(query).mappings()]

    def add_evaluation(self, evaluation: EvaluationRecord) -> EvaluationRecord:
        """Store an evaluation; one of the same id is left alone, and what is stored comes back.

        Raises:
            UnknownIdError: its round is not stored.
        """
        results = [
            {"evaluation_id": evaluation.id, "position": position, **result.model_dump()}
            for position, result in enumerate(evaluation.results)
        ]
        with self._write() as connection:
            insert = self._insert(EvaluationRow, skip_existing=True).values(
                **evaluation.model_dump(exclude={"results"})
            )
            if connection.execute(insert.returning(EvaluationRow.id)).scalar() is not None:
                self._insert_rows(connection, EvaluationResultRow, results)
        return self._evaluations(EvaluationRow.id == evaluation.id)[0]

    def evaluations(
        self,
        round_id: str | None = None,
        *,
        name: str | None = None,
        checkpoint: str | None = None,
        knowledge: str | None = None,
        env: str | None = None,
        split: str | None = None,
        names: Sequence[str] | None = None,
        results: bool = True,
    ) -> list[EvaluationRecord]:
        """Evaluations, oldest first. A filter that is None lets all pass; `results` False leaves single tasks out."""
        filters = {
            "round_id": round_id, "name": name, "checkpoint": checkpoint, "knowledge": knowledge, "env": env,
            "split": split,
        }  # fmt: skip
        conditions = [getattr(EvaluationRow, key) == str(value) for key, value in filters.items() if value is not None]
        if names is not None:
            conditions.append(EvaluationRow.name.in_(names))
        return self._evaluations(*conditions, with_results=results)

    def _evaluations(self, *conditions: sa.ColumnElement[bool], with_results: bool = True) -> list[EvaluationRecord]:
        query = sa.select(EvaluationRow.__table__).where(*conditions)
        with self._read() as connection:
            query = query.order_by(EvaluationRow.created_at, EvaluationRow.id)
            rows = connection.execute(query).mappings().all()
            found: dict[str, list[EvaluationResult]] = defaultdict(list)
            for chunk in chunks((row["id"] for row in rows if with_results), _BATCH):
                query = sa.select(EvaluationResultRow.__table__)
                query = query.where(EvaluationResultRow.evaluation_id.in_(chunk))
                for row in connection.execute(query.order_by(EvaluationResultRow.position)).mappings():
                    result = EvaluationResult(**{key: row[key] for key in EvaluationResult.model_fields})
                    found[row["evaluation_id"]].append(result)
        return [EvaluationRecord(**row, results=tuple(found[row["id"]])) for row in rows]

    def events(
        self,
        *,
        subject: str | None = None,
        kind: str | None = None,
        action: str | None = None,
        limit: int | None = None,
    ) -> list[Event]:
        """What was changed by whom and why, oldest first; with a limit the latest ones."""
        query = sa.select(EventRow.__table__).order_by(EventRow.id.desc()).limit(limit)
        for column, value in ((EventRow.subject, subject), (EventRow.kind, kind), (EventRow.action, action)):
            if value is not None:
                query = query.where(column == value)
        with self._read() as connection:
            return [Event(**row) for row in connection.execute(query).mappings()][::-1]

    def note(self, kind: str, subject: str, action: str, who: str, why: str, detail: Any = None) -> None:
        """Append an event: something happened to `subject` (an id) that no row of its own tells.

        Args:
            kind: what the subject is, such as `item` or `extraction`.
            subject: its id.
            action: what was done, in one word.
            who: a person's name, or `engrain`.
            why: the reason, in words.
            detail: further JSON values.
        """
        with self._write() as connection:
            self._log(connection, kind, subject, action, who, why, detail)
