"""Episodes in the store: every text once, every token exactly as it was sampled."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from agent.episode import Episode, Turn
from envs.base import Task
from memory.columns import (
    pack_ids,
    pack_logprobs,
    pack_mask,
    unpack_ids,
    unpack_logprobs,
    unpack_mask,
)
from memory.database import chunks
from memory.errors import ConflictError, UnknownIdError
from memory.records import EpisodeSummary, now
from memory.schema import EpisodeRow, RoundRow, TaskRow, TextRow, TurnRow
from memory.tallies import TallyTable, changes_by

_BATCH = 200  # episodes a transaction, and ids a query
_SUMMARY = [getattr(EpisodeRow, name) for name in EpisodeSummary.model_fields]


class EpisodeTable(TallyTable):
    """The part of the store that keeps episodes, their tasks and their turns."""

    def add_episodes(
        self, episodes: Iterable[Episode], *, round_id: str | None = None, stage: str = "", run_id: str | None = None
    ) -> int:
        """Store episodes that are not there yet, 200 a transaction, and return how many were new.

        `run_id` is the training run that they were played for.
        Log-probabilities are kept as float32. Task parameters must be JSON values.

        Raises:
            ConflictError: a task id already stands for another task.
            UnknownIdError: there is no such round.
        """
        return sum(self._add_batch(batch, round_id, stage, run_id) for batch in chunks(episodes, _BATCH))

    def _add_batch(self, batch: Sequence[Episode], round_id: str | None, stage: str, run_id: str | None) -> int:
        unique = {episode.id: episode for episode in batch}
        texts: dict[str, str] = {}
        rows = [{**_episode_row(episode, round_id, stage, texts), "run_id": run_id} for episode in unique.values()]
        turns = {id_: _turn_rows(episode, texts) for id_, episode in unique.items()}
        with self._write() as connection:
            if (
                round_id is not None
                and connection.scalar(sa.select(RoundRow.id).where(RoundRow.id == round_id)) is None
            ):
                raise UnknownIdError(f"no round {round_id!r} in {self.url}")
            self._add_tasks(connection, {e.task.id: e.task for e in unique.values()})
            # Sorted, so that two writers of the same texts wait for each other instead of deadlocking.
            bodies = sorted((digest, body) for body, digest in texts.items())
            self._insert_rows(connection, TextRow, [{"digest": digest, "body": body} for digest, body in bodies])
            added = self._insert_new(connection, EpisodeRow, sorted(rows, key=lambda row: str(row["id"])))
            self._insert_rows(connection, TurnRow, [row for id_ in sorted(added) for row in turns[id_]])
            self._tally(connection, changes_by(row for row in rows if row["id"] in added))
        return len(added)

    def _add_tasks(self, connection: sa.Connection, tasks: Mapping[str, Task]) -> None:
        rows = [
            {"id": t.id, "env": t.env, "seed": t.seed, "parameters": dict(t.parameters)}
            for t in sorted(tasks.values(), key=lambda task: task.id)
        ]
        self._insert_rows(connection, TaskRow, rows)
        query = sa.select(TaskRow.id, TaskRow.env, TaskRow.seed, TaskRow.parameters)
        for id_, env, seed, parameters in connection.execute(query.where(TaskRow.id.in_(list(tasks)))):
            task = tasks[id_]
            if (env, seed, _canonical(parameters)) != (task.env, task.seed, _canonical(dict(task.parameters))):
                raise ConflictError(f"task id {id_!r} already stands for another task in {self.url}")

    def has_episodes(self, ids: Iterable[str]) -> set[str]:
        """Those of `ids` that are stored."""
        found: set[str] = set()
        with self._read() as connection:
            for chunk in chunks(ids, _BATCH):
                found.update(connection.execute(sa.select(EpisodeRow.id).where(EpisodeRow.id.in_(chunk))).scalars())
        return found

    def episode(self, id: str) -> Episode:
        """One episode, equal to the one that was stored.

        Raises:
            UnknownIdError: it is not stored.
        """
        with self._read() as connection:
            found = self._load(connection, [id])
        if not found:
            raise UnknownIdError(f"no episode {id!r} in {self.url}")
        return found[0]

    def episodes(self, *, limit: int | None = None, offset: int = 0, **filters: Any) -> list[Episode]:
        """Whole episodes, oldest first; takes the filters of `episode_rows`."""
        with self._read() as connection:
            query = _listing(sa.select(EpisodeRow.id), limit=limit, offset=offset, **filters)
            ids = list(connection.execute(query).scalars())
            return [episode for chunk in chunks(ids, _BATCH) for episode in self._load(connection, chunk)]

    def episode_rows(
        self,
        *,
        env: str | None = None,
        split: str | None = None,
        checkpoint: str | None = None,
        knowledge: str | None = None,
        round_id: str | None = None,
        stage: str | None = None,
        success: bool | None = None,
        run_id: str | None = None,
        before: str | None = None,
        newest_first: bool = False,
        limit: int | None = None,
        offset: int = 0,
    ) -> list[EpisodeSummary]:
        """Episodes without texts and tokens, oldest first unless `newest_first`. A filter that is None lets all pass.

        `checkpoint` and `knowledge` are ids; "" picks episodes played with none. `before` is the id of an episode:
        only those that began before it, which is how a long list is read page by page.
        """
        query = _listing(
            sa.select(*_SUMMARY), env=env, split=split, checkpoint=checkpoint, knowledge=knowledge,
            round_id=round_id, stage=stage, success=success, run_id=run_id, before=before,
            newest_first=newest_first, limit=limit, offset=offset,
        )  # fmt: skip
        with self._read() as connection:
            return [EpisodeSummary(**row) for row in connection.execute(query).mappings()]

    def stage_counts(self, round_id: str) -> list[tuple[str, int, int]]:
        """What a round played so far, from its index alone: each stage, how many episodes, and how many were solved."""
        solved = sa.func.sum(sa.cast(EpisodeRow.success, sa.Integer))
        query = sa.select(EpisodeRow.stage, sa.func.count(), solved).where(EpisodeRow.round_id == round_id)
        query = query.group_by(EpisodeRow.stage).order_by(sa.func.min(EpisodeRow.started_at), EpisodeRow.stage)
        with self._read() as connection:
            return [(stage, episodes, won) for stage, episodes, won in connection.execute(query)]

    def _load(self, connection: sa.Connection, ids: Sequence[str]) -> list[Episode]:
        """The stored ones of at most `_BATCH` ids, in their order."""
        query = sa.select(EpisodeRow.__table__, TaskRow.seed, TaskRow.parameters).join(TaskRow)
        rows = {row["id"]: row for row in connection.execute(query.where(EpisodeRow.id.in_(ids))).mappings()}
        turns = defaultdict(list)
        turn_query = sa.select(TurnRow.__table__).where(TurnRow.episode_id.in_(ids)).order_by(TurnRow.number)
        for row in connection.execute(turn_query).mappings():
            turns[row["episode_id"]].append(row)
        wanted = {digest for row in rows.values() for _, digest in row["messages"]}
        wanted.update(row[key] for list_ in turns.values() for row in list_ for key in _TEXTS)
        texts: dict[str, str] = {}
        for chunk in chunks(wanted, _BATCH):
            found = connection.execute(sa.select(TextRow.digest, TextRow.body).where(TextRow.digest.in_(chunk)))
            texts.update((digest, body) for digest, body in found)
        return [_episode(rows[id_], turns[id_], texts) for id_ in ids if id_ in rows]


_TEXTS = ("observation", "action", "feedback")


def _listing(
    query: sa.Select[Any],
    *,
    limit: int | None,
    offset: int,
    before: str | None = None,
    newest_first: bool = False,
    **filters: Any,
) -> sa.Select[Any]:
    if before is not None:
        # one value, not a joined row: PostgreSQL then reads on in the index's order and sorts nothing
        began = sa.select(EpisodeRow.started_at).where(EpisodeRow.id == before).scalar_subquery()
        query = query.where(sa.tuple_(EpisodeRow.started_at, EpisodeRow.id) < sa.tuple_(began, sa.literal(before)))
    for name, value in filters.items():
        if name not in ("env", "split", "checkpoint", "knowledge", "round_id", "stage", "success", "run_id"):
            raise TypeError(f"episodes have no filter {name!r}")
        column = getattr(EpisodeRow, name)
        if value == "" and name in ("checkpoint", "knowledge"):
            query = query.where(column.is_(None))
        elif value is not None:
            query = query.where(column == (value if isinstance(value, bool) else str(value)))
    order = [EpisodeRow.started_at, EpisodeRow.id]
    query = query.order_by(*([column.desc() for column in order] if newest_first else order))
    return query.limit(limit if limit is not None else 2**31 - 1 if offset else None).offset(offset or None)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def text_digest(text: str) -> str:
    """The 32 hex digits that a text is stored under."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _keep(text: str, texts: dict[str, str]) -> str:
    """Note a text to be stored and return the digest it is stored under; `texts` has the digest of each."""
    digest = texts.get(text)
    if digest is None:
        digest = texts[text] = text_digest(text)
    return digest


def _episode_row(episode: Episode, round_id: str | None, stage: str, texts: dict[str, str]) -> dict[str, Any]:
    return {
        "id": episode.id,
        "task_id": episode.task.id,
        "env": episode.task.env,
        "split": episode.task.split.value,
        "round_id": round_id,
        "stage": stage,
        "model": episode.model,
        "checkpoint": episode.checkpoint,
        "knowledge": episode.knowledge,
        "success": episode.success,
        "score": episode.score,
        "reward": episode.reward,
        "stop_reason": episode.stop_reason.value,
        "error": episode.error,
        "human": episode.human,
        "turns": len(episode.turns),
        "tokens": len(episode.token_ids),
        "sampled": episode.sampled,
        "prompt_length": episode.prompt_length,
        "started_at": episode.started_at,
        "seconds": episode.seconds,
        "added_at": now(),
        "sampling": episode.sampling.model_dump(mode="json"),
        "messages": [[message.role, _keep(message.content, texts)] for message in episode.messages],
        "feedback": episode.feedback,
        "token_ids": pack_ids(episode.token_ids),
        "loss_mask": pack_mask(episode.loss_mask),
        "logprobs": pack_logprobs(episode.logprobs),
    }


def _turn_rows(episode: Episode, texts: dict[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "episode_id": episode.id,
            "number": number,
            "observation": _keep(turn.observation, texts),
            "action": _keep(turn.action, texts),
            "feedback": _keep(turn.feedback, texts),
            "start": turn.start,
            "end": turn.end,
            "finish_reason": turn.finish_reason.value,
            "reward": turn.reward,
            "seconds": turn.seconds,
            "choices": turn.choices,
        }
        for number, turn in enumerate(episode.turns)
    ]


def _episode(row: Mapping[Any, Any], turns: Sequence[Mapping[Any, Any]], texts: Mapping[str, str]) -> Episode:
    task = {"id": row["task_id"], **{key: row[key] for key in ("env", "split", "seed", "parameters")}}
    plain = ("id", "prompt_length", "reward", "score", "success", "feedback", "stop_reason", "error", "model",
             "checkpoint", "knowledge", "sampling", "started_at", "seconds", "human")  # fmt: skip
    return Episode.model_validate(
        {
            **{key: row[key] for key in plain},
            "task": task,
            "messages": [{"role": role, "content": texts[digest]} for role, digest in row["messages"]],
            "turns": [
                {
                    key: texts[value] if key in _TEXTS else value
                    for key, value in turn.items()
                    if key in Turn.model_fields
                }
                for turn in turns
            ],
            "token_ids": unpack_ids(row["token_ids"]),
            "loss_mask": unpack_mask(row["loss_mask"]),
            "logprobs": unpack_logprobs(row["logprobs"]),
        }
    )
