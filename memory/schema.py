"""The tables. Lineage runs task -> episode -> extraction -> item -> knowledge -> run -> checkpoint -> evaluation.

Ids are text chosen by the writer (digests), so that writing twice is writing once. Long texts are content-addressed
in `texts`: a prompt that a thousand episodes share is one row. `episodes.checkpoint` and `.knowledge` carry no
foreign key, because an agent may be played with weights that this store never saw trained; `turns` carries none to
`texts`, because the database would read all turns for every text that is deleted. `Store.verify` checks these.
Any change here needs a new file in `migrations/versions`; a test compares the two.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Double, ForeignKey, Index, LargeBinary, MetaData, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from memory.columns import AnyText, JsonText, Timestamp, WideInteger

NAMING = {
    "pk": "pk_%(table_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "ix": "ix_%(table_name)s_%(column_0_name)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
}


class Base(DeclarativeBase):
    """Declarative base; constraint names are fixed so that migrations can name them."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {str: AnyText, float: Double, datetime: Timestamp, bytes: LargeBinary, Any: JsonText}  # noqa: RUF012


def _key(target: str | None = None, **options: Any) -> Any:
    """An id column of at most 128 ASCII characters, with a foreign key if `target` is given."""
    return mapped_column(String(128), *([ForeignKey(target)] if target else []), **options)


class RoundRow(Base):
    """One run of play -> extract -> curate -> select -> consolidate -> judge."""

    __tablename__ = "rounds"
    id: Mapped[str] = _key(primary_key=True)
    number: Mapped[int] = mapped_column(unique=True)
    model: Mapped[str]
    seed: Mapped[int] = mapped_column(WideInteger)
    config: Mapped[Any]
    stage: Mapped[str]
    state: Mapped[Any]
    status: Mapped[str] = mapped_column(String(32), index=True)
    verdict: Mapped[str | None]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]


class TextRow(Base):
    """A text under the digest of its content."""

    __tablename__ = "texts"
    digest: Mapped[str] = mapped_column(String(32), primary_key=True)
    body: Mapped[str]


class TaskRow(Base):
    """What was played. The split stands with the episode: a task in two splits must be seen, not hidden."""

    __tablename__ = "tasks"
    id: Mapped[str] = _key(primary_key=True)
    env: Mapped[str] = mapped_column(String(128), index=True)
    seed: Mapped[int] = mapped_column(WideInteger)
    parameters: Mapped[Any]


class EpisodeRow(Base):
    """One played task. Blobs stand last, so that listings do not read them."""

    __tablename__ = "episodes"
    id: Mapped[str] = _key(primary_key=True)
    task_id: Mapped[str] = _key("tasks.id", index=True)
    env: Mapped[str] = mapped_column(String(128))
    split: Mapped[str] = mapped_column(String(32))
    round_id: Mapped[str | None] = _key("rounds.id")
    run_id: Mapped[str | None] = _key()  # the training run that it was played for
    stage: Mapped[str] = mapped_column(String(64))
    model: Mapped[str]
    checkpoint: Mapped[str | None] = _key()
    knowledge: Mapped[str | None] = _key(index=True)
    success: Mapped[bool]
    score: Mapped[float]
    reward: Mapped[float]
    stop_reason: Mapped[str] = mapped_column(String(32))
    error: Mapped[str | None]
    human: Mapped[bool]
    turns: Mapped[int]
    tokens: Mapped[int]
    sampled: Mapped[int]
    prompt_length: Mapped[int]
    started_at: Mapped[datetime]
    seconds: Mapped[float]
    added_at: Mapped[datetime]
    sampling: Mapped[Any]
    messages: Mapped[Any]  # [[role, digest of the content], ...]
    feedback: Mapped[str]
    token_ids: Mapped[bytes]
    loss_mask: Mapped[bytes]
    logprobs: Mapped[bytes]
    # Listings go newest first, so each filter's index holds the time.
    __table_args__ = (
        Index("ix_episodes_started_at", "started_at", "id"),
        Index("ix_episodes_env", "env", "started_at", "id", "split", "success"),
        Index("ix_episodes_checkpoint", "checkpoint", "started_at", "id"),
        Index("ix_episodes_round_id", "round_id", "started_at", "id", "stage", "success"),
        Index("ix_episodes_run_id", "run_id", "success"),
    )


class TallyRow(Base):
    """Sums over the episodes of one env and split. They follow from `episodes`: no part of what is exported."""

    __tablename__ = "tallies"
    env: Mapped[str] = mapped_column(String(128), primary_key=True)
    split: Mapped[str] = mapped_column(String(32), primary_key=True)
    episodes: Mapped[int] = mapped_column(BigInteger)
    solved: Mapped[int] = mapped_column(BigInteger)
    turns: Mapped[int] = mapped_column(BigInteger)
    tokens: Mapped[int] = mapped_column(BigInteger)
    sampled: Mapped[int] = mapped_column(BigInteger)


class TurnRow(Base):
    """One observation and the action on it; the three texts are digests into `texts`."""

    __tablename__ = "turns"
    episode_id: Mapped[str] = _key("episodes.id", primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    observation: Mapped[str] = mapped_column(String(32))
    action: Mapped[str] = mapped_column(String(32))
    feedback: Mapped[str] = mapped_column(String(32))
    start: Mapped[int]
    end: Mapped[int]
    finish_reason: Mapped[str] = mapped_column(String(32))
    reward: Mapped[float]
    seconds: Mapped[float]
    choices: Mapped[Any | None]  # what the reply was restricted to
    __table_args__ = ({"sqlite_with_rowid": False},)  # one B-tree instead of two


class ExtractionRow(Base):
    """What a model wrote when it looked back at one episode, or at several: `episode_id` is the first."""

    __tablename__ = "extractions"
    id: Mapped[str] = _key(primary_key=True)
    episode_id: Mapped[str] = _key("episodes.id", index=True)
    round_id: Mapped[str | None] = _key("rounds.id", index=True)
    model: Mapped[str]
    checkpoint: Mapped[str | None] = _key()
    mode: Mapped[str] = mapped_column(String(32))
    prompt_version: Mapped[str] = mapped_column(String(32))
    seed: Mapped[int] = mapped_column(WideInteger)
    output: Mapped[str]
    items: Mapped[Any]
    malformed: Mapped[Any]
    created_at: Mapped[datetime]


class ExtractionEpisodeRow(Base):
    """A further episode that an extraction read."""

    __tablename__ = "extraction_episodes"
    extraction_id: Mapped[str] = _key("extractions.id", primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    episode_id: Mapped[str] = _key("episodes.id", index=True)


class ItemRow(Base):
    """One line of experience, under the digest of its normalised text.

    `support` and `last_seen` follow from its sources, the effect from its latest measurement: kept here to sort by.
    """

    __tablename__ = "items"
    id: Mapped[str] = _key(primary_key=True)
    text: Mapped[str]
    status: Mapped[str] = mapped_column(String(32))
    round_id: Mapped[str | None] = _key("rounds.id")
    created_at: Mapped[datetime]
    derived_from: Mapped[str | None] = _key(index=True)  # the item that this one is a new wording of
    support: Mapped[int] = mapped_column(server_default="0")
    last_seen: Mapped[datetime | None]
    effect: Mapped[float | None]
    effect_low: Mapped[float | None]
    effect_high: Mapped[float | None]
    effect_n: Mapped[int | None]
    __table_args__ = (
        Index("ix_items_support", "support", "last_seen", "id"),
        Index("ix_items_status", "status", "support", "last_seen", "id"),
        Index("ix_items_effect", "effect"),
    )


class ItemFlagRow(Base):
    """A mark on an item. `other` is a second item that it is about, "" for none."""

    __tablename__ = "item_flags"
    item_id: Mapped[str] = _key("items.id", primary_key=True)
    flag: Mapped[str] = mapped_column(String(64), primary_key=True)
    other: Mapped[str] = _key(primary_key=True)
    note: Mapped[str]
    who: Mapped[str]
    at: Mapped[datetime]


class ItemEffectRow(Base):
    """What having an item in the context did to accuracy, with its 95% interval; `n` tasks or pairs were played."""

    __tablename__ = "item_effects"
    id: Mapped[str] = _key(primary_key=True)
    item_id: Mapped[str] = _key("items.id", index=True)
    round_id: Mapped[str | None] = _key("rounds.id", index=True)
    method: Mapped[str] = mapped_column(String(32))
    env: Mapped[str] = mapped_column(String(128))
    split: Mapped[str] = mapped_column(String(32))
    checkpoint: Mapped[str | None] = _key()
    knowledge: Mapped[str | None] = _key()
    effect: Mapped[float]
    low: Mapped[float]
    high: Mapped[float]
    n: Mapped[int]
    created_at: Mapped[datetime]


class ItemSourceRow(Base):
    """Where an item was said. `text` is the wording there; recalled ones count for nothing."""

    __tablename__ = "item_sources"
    id: Mapped[str] = _key(primary_key=True)
    item_id: Mapped[str] = _key("items.id", index=True)
    episode_id: Mapped[str | None] = _key("episodes.id", index=True)
    extraction_id: Mapped[str | None] = _key("extractions.id", index=True)
    text: Mapped[str]
    recalled: Mapped[bool]
    created_at: Mapped[datetime]


class KnowledgeRow(Base):
    """A version: the exact text that stands first in the system message."""

    __tablename__ = "knowledge"
    id: Mapped[str] = _key(primary_key=True)
    version: Mapped[int] = mapped_column(unique=True)
    text: Mapped[str]
    tokens: Mapped[int]
    dropped: Mapped[Any]
    round_id: Mapped[str | None] = _key("rounds.id", index=True)
    parent: Mapped[str | None] = _key("knowledge.id")
    created_at: Mapped[datetime]


class KnowledgeItemRow(Base):
    """An item's place in a version, with the wording it had there."""

    __tablename__ = "knowledge_items"
    knowledge_id: Mapped[str] = _key("knowledge.id", primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    item_id: Mapped[str] = _key("items.id", index=True)
    text: Mapped[str]


class RunRow(Base):
    """One training: knowledge and a parent go in, checkpoints come out. `metrics` is what the trainer noted a step."""

    __tablename__ = "runs"
    id: Mapped[str] = _key(primary_key=True)
    round_id: Mapped[str | None] = _key("rounds.id", index=True)
    method: Mapped[str] = mapped_column(String(32))
    model: Mapped[str]
    parent: Mapped[str | None] = _key()
    knowledge: Mapped[str | None] = _key(index=True)
    folder: Mapped[str]
    seed: Mapped[int] = mapped_column(WideInteger)
    config: Mapped[Any]
    status: Mapped[str] = mapped_column(String(32))
    reason: Mapped[str]
    metrics: Mapped[Any]
    created_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]


class CheckpointRow(Base):
    """Weights on disk and what they were made from."""

    __tablename__ = "checkpoints"
    id: Mapped[str] = _key(primary_key=True)
    model: Mapped[str]
    path: Mapped[str]
    kind: Mapped[str] = mapped_column(String(32))
    parent: Mapped[str | None] = _key()
    knowledge: Mapped[str | None] = _key(index=True)
    round_id: Mapped[str | None] = _key("rounds.id", index=True)
    run_id: Mapped[str | None] = _key(index=True)
    status: Mapped[str] = mapped_column(String(32), index=True)
    manifest: Mapped[Any]
    created_at: Mapped[datetime]
    promoted_at: Mapped[datetime | None]


class EvaluationRow(Base):
    """One measured accuracy with its 95% interval."""

    __tablename__ = "evaluations"
    id: Mapped[str] = _key(primary_key=True)
    name: Mapped[str] = mapped_column(String(128))
    round_id: Mapped[str | None] = _key("rounds.id", index=True)
    checkpoint: Mapped[str | None] = _key(index=True)
    knowledge: Mapped[str | None] = _key()
    env: Mapped[str] = mapped_column(String(128))
    split: Mapped[str] = mapped_column(String(32))
    n: Mapped[int]
    successes: Mapped[int]
    accuracy: Mapped[float]
    low: Mapped[float]
    high: Mapped[float]
    mean_score: Mapped[float]
    created_at: Mapped[datetime]


class EvaluationResultRow(Base):
    """The outcome of one task of an evaluation: what pairing needs."""

    __tablename__ = "evaluation_results"
    evaluation_id: Mapped[str] = _key("evaluations.id", primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    task_id: Mapped[str] = _key()
    episode_id: Mapped[str | None] = _key()
    success: Mapped[bool]
    score: Mapped[float]


class EventRow(Base):
    """Who changed what, when and why. Only ever appended to; `detail` says what it was before, where that helps."""

    __tablename__ = "events"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    at: Mapped[datetime]
    who: Mapped[str]
    kind: Mapped[str] = mapped_column(String(32))
    subject: Mapped[str] = _key(index=True)
    action: Mapped[str] = mapped_column(String(64))
    why: Mapped[str]
    detail: Mapped[Any | None]


class LeaseRow(Base):
    """Who holds a name, until when, in seconds since 1970 by the database's clock. No part of what is exported."""

    __tablename__ = "leases"
    name: Mapped[str] = _key(primary_key=True)
    token: Mapped[str] = _key()
    host: Mapped[str]
    machine: Mapped[str]
    pid: Mapped[int]
    since: Mapped[float]
    expires: Mapped[float]
