"""Choosing among candidate knowledge texts by what they do on validation tasks, and measuring what each item adds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from envs.errors import UsageError
from memory.effect import MOST, Effect, inclusion, paired, randomised
from memory.records import Item, Knowledge, KnowledgeItem

#: Makes the text of some items, in their order; all of them must fit the budget.
Compose = Callable[[Sequence[KnowledgeItem]], Knowledge]


@dataclass(frozen=True)
class Score:
    """One candidate's outcomes, task by task in the order that the scorer keeps for all candidates."""

    knowledge: Knowledge
    outcomes: tuple[bool, ...]

    @property
    def successes(self) -> int:
        """Number of tasks solved."""
        return sum(self.outcomes)

    @property
    def accuracy(self) -> float:
        """Share of tasks solved in [0, 1]; 0 without tasks."""
        return self.successes / len(self.outcomes) if self.outcomes else 0.0


@dataclass(frozen=True)
class Selection:
    """The best candidate and what all of them scored, in the order in which they were given."""

    best: Score
    scores: tuple[Score, ...]


def select(
    candidates: Sequence[Knowledge],
    score: Callable[[Knowledge], Sequence[bool]],
    on_score: Callable[[Score], None] | None = None,
) -> Selection:
    """Score every candidate on the same validation tasks and take the most accurate.

    Ties go to fewer tokens, then to the earlier candidate.

    Args:
        candidates: at least one.
        score: plays the validation tasks with a candidate in context; success per task.
        on_score: told each result as it comes.

    Raises:
        UsageError: there is no candidate, or candidates were scored on different numbers of tasks.
    """
    if not candidates:
        raise UsageError("no candidate knowledge to select from: no item was extracted, or none fits the budget")
    scores: list[Score] = []
    for candidate in candidates:
        result = Score(candidate, tuple(bool(outcome) for outcome in score(candidate)))
        if scores and len(result.outcomes) != len(scores[0].outcomes):
            counts = f"{len(scores[0].outcomes)} and {len(result.outcomes)}"
            raise UsageError(f"candidates were scored on {counts} tasks; use the same tasks for all")
        scores.append(result)
        if on_score is not None:
            on_score(result)
    return Selection(best_of(scores), tuple(scores))


def best_of(scores: Sequence[Score]) -> Score:
    """The most accurate; ties go to fewer tokens, then to the earlier one."""
    return min(scores, key=lambda score: (-score.successes, score.knowledge.tokens))


def leave_one_out(
    whole: Score, bare: Sequence[bool], compose: Compose, score: Callable[[Knowledge], Sequence[bool]]
) -> tuple[dict[str, Effect], list[Score]]:
    """The effect of each item of a text among its others, by item id, and the scores of the texts without one.

    Args:
        whole: the text and its outcomes.
        bare: outcomes without any knowledge, task by task: what is left when a text's only item is left out.
        compose: makes the text without the item.
        score: plays the same tasks with a text.
    """
    items = whole.knowledge.items
    if len(items) == 1:
        return {items[0].id: paired(bare, whole.outcomes)}, []
    effects, scores = {}, []
    for item in items:
        rest = compose([other for other in items if other.id != item.id])
        scores.append(Score(rest, tuple(map(bool, score(rest)))))
        effects[item.id] = paired(scores[-1].outcomes, whole.outcomes)
    return effects, scores


def randomised_inclusion(
    items: Sequence[Item],
    tasks: int,
    seed: int,
    compose: Compose,
    score: Callable[[Knowledge | None, Sequence[int]], Sequence[bool]],
) -> dict[str, Effect]:
    """The main effect of each item, by its id, at the price of playing every task twice.

    Args:
        items: at most `MOST`, in the order in which they shall stand in a text; all together fit the budget.
        tasks: how many validation tasks there are.
        seed: draws the design.
        compose: makes the text of some items.
        score: plays the tasks at these positions with a text, or with none.

    Raises:
        UsageError: there are too few or too many items, or too few tasks.
    """
    chosen = [KnowledgeItem(id=item.id, text=item.text) for item in items]

    def side(places: Iterable[int], positions: Sequence[int]) -> list[bool]:
        held = [chosen[place] for place in places]
        return list(map(bool, score(compose(held) if held else None, positions)))

    blocks = inclusion(len(chosen), tasks, seed)
    first = [side(block.first, block.tasks) for block in blocks]
    second = [side(block.second, block.tasks) for block in blocks]
    found = randomised(len(chosen), blocks, first, second)
    return {item.id: effect for item, effect in zip(chosen, found, strict=True)}


def measurable(items: Sequence[Item], tasks: int, compose: Compose) -> list[Item]:
    """The first items that one randomised design can hold: `compose` drops none, and there are tasks enough."""
    most = min(MOST, 1 << (tasks.bit_length() - 1)) if tasks >= 4 else 0
    held: list[Item] = []
    for item in items[:most]:
        if not compose([KnowledgeItem(id=one.id, text=one.text) for one in (*held, item)]).dropped:
            held.append(item)
    return held


@dataclass(frozen=True)
class Settled:
    """Of two items that contradict each other, the one that does more, with the difference."""

    winner: str
    loser: str
    by: Effect


def settle(conflicts: Mapping[tuple[str, str], str], scores: Sequence[Score]) -> list[Settled]:
    """Which of two contradicting items does more on validation tasks: each alone in a text, on the same tasks.

    Pairs that were not both scored alone are left out. Whether a difference may be chance is the caller's to judge, who
    knows how many are tested (`memory.effect.holm`).
    """
    alone = {s.knowledge.items[0].id: s for s in scores if len(s.knowledge.items) == 1}
    found = []
    for one, other in conflicts:
        if one in alone and other in alone:
            by = paired(alone[other].outcomes, alone[one].outcomes)
            if by.effect >= 0:
                found.append(Settled(one, other, by))
            else:
                found.append(Settled(other, one, replace(by, effect=-by.effect, low=-by.high, high=-by.low)))
    return found
