"""Stage 6: play test tasks and other worlds batch by batch, until the gate has seen enough.

Nothing but episodes is kept between batches. A stage that was killed finds those it had played in the store, comes by
the same looks to where it stood, and plays on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from agent.episode import Episode
from engrain.config import EvaluationConfig
from engrain.gate import Finding, Gate, Look, Verdict, sizes
from engrain.rounds import RoundTasks
from envs.base import Task


class Student(StrEnum):
    """Who plays: the round's parent without and with the knowledge, and the checkpoint that was trained."""

    BARE = "bare"
    IN_CONTEXT = "in_context"
    DISTILLED = "distilled"


#: What a world's evaluations are called, by who played.
MOMENTS = {Student.BARE: "before", Student.IN_CONTEXT: "in_context", Student.DISTILLED: "after"}


class Play(Protocol):
    """Plays tasks as one of the students, or finds the episodes in the store; in the tasks' order."""

    def __call__(self, student: Student, name: str, tasks: Sequence[Task]) -> list[Episode]:
        """The episodes; `name` says what they are played for."""


@dataclass(frozen=True)
class Judged:
    """The verdict, and all episodes that were played for it: of test tasks by student, of other worlds by world too."""

    verdict: Verdict
    test: Mapping[Student, list[Episode]]
    ood: Mapping[str, Mapping[Student, list[Episode]]]


def judge(tasks: RoundTasks, settings: EvaluationConfig, play: Play, note: Callable[[str], None]) -> Judged:
    """Play until promotion is settled, either way.

    Every look adds a batch of test tasks, unless the gain is settled already, and the same share of each other world's
    tasks, unless the loss is.

    Args:
        tasks: the round's; tasks come in an order that the seed alone fixes.
        settings: how many looks, and how sure to be.
        play: plays, or finds what was played.
        note: told what each look came to.
    """
    gate = Gate(len(tasks.test), settings.looks, settings.alpha, settings.ood_margin)
    test: dict[Student, list[Episode]] = {student: [] for student in Student}
    ood: dict[str, dict[Student, list[Episode]]] = {w: {student: [] for student in Student} for w in tasks.ood}
    steps = sizes(len(tasks.test), gate.looks)
    other_steps = {world: sizes(len(found), gate.looks) for world, found in tasks.ood.items()}
    looks: list[Look] = []
    while not looks or not looks[-1].last:
        number, earlier = len(looks), looks[-1] if looks else None
        for student in Student:  # the two that share weights follow each other
            if earlier is None or earlier.gained is Finding.OPEN:
                test[student] = play(student, f"test/{student.value}", tasks.test[: steps[number]])
            if earlier is None or earlier.kept is Finding.OPEN:
                for world, found in tasks.ood.items():
                    batch = found[: other_steps[world][number]]
                    ood[world][student] = play(student, f"ood/{MOMENTS[student]}/{world}", batch)
        look = gate.look(
            solved(test[Student.BARE]),
            solved(test[Student.DISTILLED]),
            {world: (solved(played[Student.BARE]), solved(played[Student.DISTILLED])) for world, played in ood.items()},
            earlier,
        )
        looks.append(look)
        if gate.looks > 1:
            note(said(look))
    return Judged(gate.verdict(looks), test, ood)


def solved(episodes: Sequence[Episode]) -> list[bool]:
    """Success, episode by episode."""
    return [episode.success for episode in episodes]


def said(look: Look) -> str:
    """One line about a look."""
    gain = {
        Finding.YES: "a gain",
        Finding.NO: "no gain",
        Finding.OPEN: "open" if look.chance is None else f"open, promotion {look.chance:.0%} likely",
    }[look.gained]
    kept = {Finding.YES: "within the margin", Finding.NO: "beyond the margin", Finding.OPEN: "open"}[look.kept]
    return f"look {look.number} of {look.of}: gain {look.gain}: {gain}; other worlds {look.ood}: {kept}"
