"""What the store gives and takes: frozen records. Times are in UTC."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def digest(*parts: object) -> str:
    """20 hex digits that stand for these parts in this order."""
    return hashlib.sha256("\0".join(str(part) for part in parts).encode("utf-8", "surrogatepass")).hexdigest()[:20]


def new_id() -> str:
    """A random id for what has no content to derive one from."""
    return uuid.uuid4().hex[:20]


def now() -> datetime:
    """The current time in UTC."""
    return datetime.now(UTC)


class Record(BaseModel):
    """Base of all records: frozen, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ItemStatus(StrEnum):
    """Whether an item may enter knowledge."""

    ACTIVE = "active"
    QUARANTINED = "quarantined"  # waits for evidence or for a person
    RETIRED = "retired"  # taken out by hand, or another item says it
    ABSORBED = "absorbed"  # the weights know it: having it in the context changes nothing any more
    HARMFUL = "harmful"  # having it in the context costs accuracy


class CheckpointStatus(StrEnum):
    """What judgement made of a checkpoint."""

    CANDIDATE = "candidate"
    PROMOTED = "promoted"
    REJECTED = "rejected"
    ROLLED_BACK = "rolled_back"


class RoundStatus(StrEnum):
    """Where a round stands; `running` also after its process was killed."""

    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


class EpisodeSummary(Record):
    """An episode without its texts and tokens, for listings. `tokens` counts all, `sampled` the model's own."""

    id: str
    task_id: str
    env: str
    split: str
    round_id: str | None
    stage: str
    model: str
    checkpoint: str | None
    knowledge: str | None
    run_id: str | None
    success: bool
    score: float
    reward: float
    stop_reason: str
    error: str | None
    human: bool
    turns: int
    tokens: int
    sampled: int
    started_at: datetime
    seconds: float


class Extraction(Record):
    """What one model wrote about one episode, or about several, and what the parser made of it."""

    id: str
    episode_id: str
    others: tuple[str, ...] = ()  # ids of the further episodes that it read
    model: str
    checkpoint: str | None
    mode: str
    prompt_version: str
    seed: int
    output: str
    items: tuple[str, ...]
    malformed: tuple[str, ...]  # lines that tried to be an item and failed, verbatim


class ItemSource(Record):
    """One place where an item was said. `recalled`: the episode's own knowledge held it, so it proves nothing."""

    episode_id: str | None
    extraction_id: str | None
    text: str
    recalled: bool
    created_at: datetime


#: The mark of an item whose place another one took, its `other`.
MERGED = "merged"


class ItemFlag(Record):
    """A mark on an item, such as `instance-bound` or `contradicts`; `other` is the item it contradicts, "" for none."""

    flag: str
    other: str = ""
    note: str = ""
    who: str = "engrain"
    at: datetime = Field(default_factory=now)


def _effect_id(fields: dict[str, Any]) -> str:
    """Within a round the same measurement has the same id, so that a stage played again writes the same row."""
    if fields.get("round_id") is None:
        return new_id()
    keys = ("round_id", "item_id", "method", "env", "split", "checkpoint", "knowledge")
    return digest("effect", *(fields.get(key) for key in keys))


class ItemEffect(Record):
    """What an item in the context does to accuracy: a difference in [-1, 1] with its 95% interval `low..high`.

    `n` is the number of tasks or pairs behind it; `knowledge` the text that it was measured within; `checkpoint` the
    weights that played, None for the base model.
    """

    item_id: str
    method: str  # "leave-one-out" or "randomised"
    env: str
    split: str
    effect: float
    low: float
    high: float
    n: int
    round_id: str | None = None
    checkpoint: str | None = None
    knowledge: str | None = None
    created_at: datetime = Field(default_factory=now)
    id: str = Field(default_factory=_effect_id)


class Item(Record):
    """One line of experience and where it came from, oldest source first. The effect is the one measured last."""

    id: str
    text: str
    status: ItemStatus = ItemStatus.ACTIVE
    round_id: str | None = None
    created_at: datetime = Field(default_factory=now)
    derived_from: str | None = None  # the item that this one is a new wording of
    effect: float | None = None
    effect_low: float | None = None
    effect_high: float | None = None
    effect_n: int | None = None
    flags: tuple[ItemFlag, ...] = ()
    sources: tuple[ItemSource, ...] = ()

    @property
    def support(self) -> int:
        """Number of distinct episodes that taught it; an episode that only recalled it does not count."""
        return len({source.episode_id for source in self.sources if source.episode_id and not source.recalled})

    @property
    def last_seen(self) -> datetime:
        """When it was last learned anew."""
        return max((source.created_at for source in self.sources if not source.recalled), default=self.created_at)


class ItemSummary(Record):
    """An item without its sources, for listings: how many episodes taught it, and when it was last learned."""

    id: str
    text: str
    status: ItemStatus
    round_id: str | None
    created_at: datetime
    derived_from: str | None
    support: int
    last_seen: datetime | None
    effect: float | None
    effect_low: float | None
    effect_high: float | None
    effect_n: int | None
    flags: tuple[str, ...] = ()


class KnowledgeItem(Record):
    """An item as it stands in one knowledge text."""

    id: str
    text: str


class Knowledge(Record):
    """The exact text that stands first in the system message. Made by `memory.render.compose`.

    `id` is a digest of the text, which follows from the items' texts in their order. `version`, `round_id`, `parent`
    and `created_at` are filled in by the store.
    """

    id: str
    items: tuple[KnowledgeItem, ...]
    text: str
    tokens: int
    dropped: tuple[str, ...] = ()  # ids of items that the token budget left out
    version: int | None = None
    round_id: str | None = None
    parent: str | None = None
    created_at: datetime | None = None


class RunRecord(Record):
    """One training. `metrics` is what the trainer noted at each step; `reason` says why it ended early, or failed."""

    id: str
    round_id: str | None = None
    method: str
    model: str
    parent: str | None = None  # the checkpoint that it went on from; None is the base model
    knowledge: str | None = None
    folder: str
    seed: int
    config: Mapping[str, Any]
    status: str = RoundStatus.RUNNING.value
    reason: str = ""
    metrics: tuple[Mapping[str, Any], ...] = ()
    created_at: datetime = Field(default_factory=now)
    finished_at: datetime | None = None


class CheckpointRecord(Record):
    """Weights on disk. `manifest` is what training wrote beside them."""

    id: str
    model: str
    path: str
    kind: str = "lora"
    parent: str | None = None
    knowledge: str | None = None
    round_id: str | None = None
    run_id: str | None = None
    status: CheckpointStatus = CheckpointStatus.CANDIDATE
    manifest: Mapping[str, Any] = Field(default_factory=dict)
    created_at: datetime = Field(default_factory=now)
    promoted_at: datetime | None = None


class EvaluationResult(Record):
    """One task's outcome; `score` in [0, 1]."""

    task_id: str
    episode_id: str | None = None
    success: bool
    score: float


def _evaluation_id(fields: dict[str, Any]) -> str:
    """Within a round the same measurement has the same id, so that a stage played again is not counted twice."""
    if fields.get("round_id") is None:
        return new_id()
    return digest(*(fields.get(key) for key in ("round_id", "name", "checkpoint", "knowledge", "env", "split")))


class EvaluationRecord(Record):
    """An accuracy in [0, 1] with its 95% interval `low..high`, and the outcome of each task."""

    name: str
    round_id: str | None = None
    checkpoint: str | None = None
    knowledge: str | None = None
    env: str
    split: str
    n: int
    successes: int
    accuracy: float
    low: float
    high: float
    mean_score: float
    results: tuple[EvaluationResult, ...] = ()
    created_at: datetime = Field(default_factory=now)
    id: str = Field(default_factory=_evaluation_id)


class RoundRecord(Record):
    """One round. `state` is the loop's own notebook for resuming; `status` is a `RoundStatus` value."""

    id: str
    number: int
    model: str
    seed: int
    config: Mapping[str, Any]
    stage: str = ""
    state: Mapping[str, Any] = Field(default_factory=dict)
    status: str = RoundStatus.RUNNING.value
    verdict: str | None = None
    created_at: datetime
    updated_at: datetime


class Event(Record):
    """Who changed what, when and why; `detail` holds what else is worth keeping, such as the value before."""

    id: int
    at: datetime
    who: str
    kind: str
    subject: str
    action: str
    why: str
    detail: Any = None
