"""How far the running round is: its stage, what it played and trained so far, and whether anybody is at work on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engrain.lease import is_gone, lease_name
from engrain.ui.training import Training, is_validation
from memory.leases import Lease
from memory.records import RoundRecord, RoundStatus, digest
from memory.store import Store

#: The stages of a round in their order, with what happens in each.
STAGES = {
    "play": "plays training tasks without knowledge",
    "extract": "reads its episodes and writes items",
    "curate": "admits items and merges duplicates",
    "select": "measures knowledge in context on validation tasks",
    "consolidate": "trains the knowledge into the weights",
    "judge": "plays test tasks and other worlds for the verdict",
}
_LATEST = 20  # rounds among which a running one is looked for


@dataclass(frozen=True)
class Played:
    """Episodes of one kind in the round; `planned` is None where the settings do not say how many there will be."""

    stage: str
    episodes: int
    solved: int
    planned: int | None


@dataclass(frozen=True)
class Progress:
    """A round that is not over. `holder` is the process at work on it; None: it waits to be taken up again.

    `played` is without the validations of `training`, which is None before there is any.
    """

    round: RoundRecord
    holder: Lease | None
    played: tuple[Played, ...]
    training: Training | None = None

    @property
    def stages(self) -> list[tuple[str, str, str]]:
        """Name, words, and `done`, `now` or `next`; a round whose text was given begins at select."""
        names = list(STAGES)
        if self.round.config.get("knowledge") is not None:
            names = names[names.index("select") :]
        at = names.index(self.round.stage) if self.round.stage in names else -1
        return [
            (name, STAGES[name], "now" if place == at else "done" if place < at else "next")
            for place, name in enumerate(names)
        ]

    @property
    def said(self) -> str:
        """What a screen reader is told whenever it changes: no numbers, or it would speak all the time."""
        doing = f"{self.round.stage} {STAGES.get(self.round.stage, '')}".strip()
        return f"Round {self.round.number}: {doing if self.holder else 'nobody is at work on it'}."

    @property
    def mark(self) -> str:
        """Changes whenever something that is shown does."""
        trained = self.training.mark if self.training else ()
        return digest(self.round.id, self.round.stage, self.holder and self.holder.token, *self.played, *trained)

    @classmethod
    def of(cls, store: Store) -> Progress | None:
        """That of the latest unfinished round; None if there is none."""
        running = [r for r in store.rounds(limit=_LATEST) if r.status == RoundStatus.RUNNING.value]
        if not running:
            return None
        record = running[-1]
        held = store.held_lease(lease_name(record.model))
        counts = store.stage_counts(record.id)
        wanted = planned(record.config)
        runs = store.runs(round_id=record.id)
        return cls(
            record,
            held if held is not None and not is_gone(held) else None,
            tuple(Played(*row, wanted.get(row[0])) for row in counts if not (runs and is_validation(row[0]))),
            Training.of(runs[-1], counts, wanted.get("validation/bare")) if runs else None,
        )


def planned(config: Mapping[str, Any]) -> dict[str, int]:
    """How many episodes of each kind the settings ask for, as far as they say so; the settings are foreign data."""

    def ask(section: str, name: str) -> int | None:
        part = config.get(section)
        value = part.get(name) if isinstance(part, Mapping) else None
        return value if isinstance(value, int) and value > 0 else None

    steps, batch = ask("distill", "steps"), ask("distill", "batch_size")
    tests = ask("evaluation", "test_tasks")
    found = {
        "play": ask("play", "episodes"),
        "validation/bare": ask("evaluation", "validation_tasks"),
        "train": steps * batch if steps and batch else None,
        **dict.fromkeys(("test/bare", "test/in_context", "test/distilled"), tests),
    }
    return {stage: number for stage, number in found.items() if number is not None}
