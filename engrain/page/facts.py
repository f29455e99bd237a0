"""What a round's page holds, apart from how it looks. All of it comes out of the store and goes out as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict

from engrain.gate import Gain, Look, Rate


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Outcome(StrEnum):
    """What became of a round, in the word that stands on top of its page."""

    PROMOTED = "promoted"
    ROLLED_BACK = "promoted, rolled back since"
    REJECTED = "rejected"
    STOPPED = "stopped early"
    FAILED = "failed"
    UNFINISHED = "unfinished"


class Measured(_Frozen):
    """An accuracy on one split, by who played."""

    student: str
    env: str
    split: str
    rate: Rate
    mean_score: float


class OtherWorld(_Frozen):
    """A world that was not trained on: three accuracies, and the paired change from before to after."""

    world: str
    before: Rate | None = None
    in_context: Rate | None = None
    after: Rate | None = None
    change: Gain | None = None


class Candidate(_Frozen):
    """A knowledge text that was scored on validation tasks."""

    version: int | None
    id: str
    lines: int
    tokens: int
    rate: Rate
    chosen: bool


class Source(_Frozen):
    """An episode that taught an item; None where it is not in the store any more."""

    episode: str
    env: str | None
    split: str | None
    solved: bool | None
    reader: str | None  # the model that wrote the item


class Learned(_Frozen):
    """An item that the round learned or used."""

    id: str
    text: str
    status: str
    chosen: bool  # it stands in the text that was distilled
    support: int  # episodes that taught it
    flags: tuple[str, ...] = ()
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    method: str | None = None
    sources: tuple[Source, ...] = ()


class Text(_Frozen):
    """The knowledge that was chosen, as it stood in the system message."""

    id: str
    version: int | None
    text: str
    lines: int
    tokens: int
    left_out: int  # items that the token budget left out


class Training(_Frozen):
    """The run's curves by step; `stopped` says why it ended early."""

    objective: str
    steps: int
    chosen_step: int | None = None
    stopped: str | None = None
    validation: Mapping[int, Rate] = {}
    divergence: Mapping[int, float] = {}  # mean over sampled tokens, nats
    entropy: Mapping[int, float] = {}  # the student's, nats
    leak_rate: float | None = None  # share of the last step's replies that cite their experience


class RoundPoint(_Frozen):
    """What a round of the same model and world measured on its test tasks."""

    number: int
    promoted: bool
    scores: Mapping[str, Rate]


class Reply(_Frozen):
    """One reply, and what the world answered to it."""

    action: str
    answer: str = ""


class Played(_Frozen):
    """One student's episode of an example's task."""

    student: str
    solved: bool
    score: float
    replies: tuple[Reply, ...]
    more: int = 0  # replies that are not shown
    feedback: str = ""
    error: str | None = None


class Example(_Frozen):
    """One task, played by each student."""

    kind: str
    task: str
    prompt: str
    played: tuple[Played, ...]


class Examples(_Frozen):
    """Examples of each kind, and how many tasks there are of it."""

    split: str = ""
    after: str = ""  # the student that is compared with the bare one
    counts: Mapping[str, int] = {}
    shown: tuple[Example, ...] = ()


class Ancestor(_Frozen):
    """A checkpoint of the chain, latest first."""

    checkpoint: str
    status: str
    round: int | None
    method: str | None
    step: int | None
    episodes: int  # played for its training
    knowledge: int | None  # version of the text that it was taught
    lines: int


class Spent(_Frozen):
    """What one part of the round played."""

    part: str
    episodes: int
    replies: int
    tokens: int  # in all sequences, prompts and replies
    sampled: int  # of these, sampled by the model


class Machine(_Frozen):
    """What the round ran on, as its `report.json` notes it."""

    processor: str | None = None
    cores: int | None = None
    memory_gib: float | None = None
    accelerator: str | None = None


class Cost(_Frozen):
    """Time and tokens. Seconds are wall-clock, over all the pieces that a round was played in."""

    seconds: float
    sampling: float = 0.0  # of the training
    teacher: float = 0.0
    student: float = 0.0
    peak_memory: int = 0  # bytes
    parts: tuple[Spent, ...] = ()
    machine: Machine | None = None
    versions: Mapping[str, str] = {}

    @property
    def total(self) -> Spent:
        """All parts together."""
        sums = {name: sum(getattr(part, name) for part in self.parts) for name in ("episodes", "replies", "tokens")}
        return Spent(part="all", sampled=sum(part.sampled for part in self.parts), **sums)


class Words(_Frozen):
    """The page in words: one line, what happened, and what to keep in mind."""

    headline: str = ""
    story: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()


class ReportPage(_Frozen):
    """All that the page of a round holds."""

    number: int
    id: str
    model: str
    world: str
    options: Mapping[str, Any]
    seed: int
    outcome: Outcome
    reason: str
    stage: str
    begun: datetime
    changed: datetime
    words: Words = Words()
    gap: Gain | None = None  # on validation tasks, in context against bare
    gain: Gain | None = None  # on test tasks, distilled against bare
    looks: tuple[Look, ...] = ()
    measured: tuple[Measured, ...] = ()
    others: tuple[OtherWorld, ...] = ()
    ood_margin: float | None = None
    given: bool = False  # the knowledge, as a text or a stored version: nothing was played for it
    extracted: int | None = None  # items that were written, before duplicates were merged
    malformed: int | None = None
    refused: int = 0  # lines that admission turned away
    knowledge: Text | None = None
    candidates: tuple[Candidate, ...] = ()
    items: tuple[Learned, ...] = ()
    training: Training | None = None
    rounds: tuple[RoundPoint, ...] = ()
    examples: Examples = Examples()
    lineage: tuple[Ancestor, ...] = ()
    before_lineage: str = ""  # what the oldest of these was trained from
    cost: Cost
    settings: Mapping[str, Any]

    def rate(self, student: str) -> Rate | None:
        """A student's accuracy on test tasks: `bare`, `in_context` or `distilled`."""
        return next((row.rate for row in self.measured if row.student == student), None)

    @property
    def recovery(self) -> float | None:
        """Share of the in-context gap on test tasks that stands in the weights; None where there is none."""
        from engrain.gate import recovery

        bare, in_context, distilled = (self.rate(name) for name in ("bare", "in_context", "distilled"))
        if bare is None or in_context is None or distilled is None:
            return None
        return recovery(bare.accuracy, in_context.accuracy, distilled.accuracy)
