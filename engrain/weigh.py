"""Weighing on validation tasks: which knowledge text is best, what each item adds, and what follows for the items."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict

from engrain.config import ExtractConfig, ImproveConfig
from envs.base import Split
from memory.contradiction import contradictions
from memory.curate import candidates, ordered
from memory.effect import Effect, holm
from memory.records import CheckpointRecord, Item, ItemEffect, ItemStatus, Knowledge, RoundRecord
from memory.render import compose, count_tokens
from memory.select import Score, Settled, best_of, leave_one_out, measurable, randomised_inclusion, select, settle
from memory.store import Store

#: The most pairs of contradicting items that one round settles; each costs two more passes at most.
_PAIRS = 2


class Change(BaseModel):
    """What validation made of an item; kept in the round's notebook until it stands in the store."""

    model_config = ConfigDict(frozen=True)

    item: str
    status: ItemStatus
    why: str


@dataclass(frozen=True)
class Weighed:
    """The best text, the text that was taken apart, the effects of items by their id, and the items' new states."""

    best: Score
    whole: str
    effects: dict[str, Effect]
    changes: tuple[Change, ...]

    def records(self, round_: RoundRecord, config: ImproveConfig, parent: CheckpointRecord | None) -> list[ItemEffect]:
        """The effects as the store keeps them; one that was left out was measured within the best text."""
        method = config.extract.effects.replace("_", "-")
        return [
            ItemEffect(
                item_id=id_,
                method=method,
                env=config.world.env,
                split=Split.VALIDATION.value,
                **{name: getattr(found, name) for name in ("effect", "low", "high", "n")},
                round_id=round_.id,
                checkpoint=parent.id if parent else None,
                knowledge=self.whole if method == "leave-one-out" else None,
            )
            for id_, found in self.effects.items()
        ]


def weigh(
    items: Sequence[Item],
    bare: Sequence[bool],
    settings: ExtractConfig,
    *,
    seed: int,
    tokenizer: Any,
    score: Callable[[Knowledge], Sequence[bool]],
    play: Callable[[Knowledge | None, Sequence[int]], Sequence[bool]],
    note: Callable[[str], None],
) -> Weighed:
    """Find the text that helps most, and measure the items.

    With `randomised` effects the items are measured first, and the candidate texts are made of those that gain. With
    `leave_one_out` the best candidate is taken apart afterwards; what is better without an item wins.

    Args:
        items: this round's.
        bare: outcomes of the validation tasks without knowledge.
        settings: how many candidates, which budget, which effects.
        seed: draws candidates and designs.
        tokenizer: counts tokens.
        score: plays all validation tasks with a text.
        play: plays those at some positions with a text or none.
        note: told what is found, in a line.

    Raises:
        UsageError: no item fits the budget.
    """
    made = partial(compose, budget_tokens=settings.budget_tokens, tokenizer=tokenizer)
    texts = partial(candidates, items, settings.budget_tokens, tokenizer, settings.candidates, seed)
    ranked = ordered(items)
    effects: dict[str, Effect] = {}
    if settings.effects == "randomised":
        measured = measurable(ranked, len(bare), made)
        if len(measured) > 1:
            effects = randomised_inclusion(measured, len(bare), seed, made, play)
    pool = (texts(effects) if effects else []) or texts()
    if left_out := max((len(text.dropped) for text in pool), default=0):
        note(f"the budget of {settings.budget_tokens} tokens leaves out up to {left_out} items of a candidate")
    conflicts = contradictions(ranked)
    rivals = list(dict.fromkeys(id_ for pair in list(conflicts)[:_PAIRS] for id_ in pair))
    known = {candidate.id for candidate in pool}
    alone = [made([item]) for item in ranked if item.id in rivals]
    pool += [text for text in alone if text.items and text.id not in known]
    scores = list(select(pool, score, on_score=lambda found: note(scored(found))).scores)
    whole = best_of(scores)
    if settings.effects == "leave_one_out":
        effects, without = leave_one_out(whole, bare, made, score)
        scores += without
        rest = made([item for item in whole.knowledge.items if effects[item.id].effect > 0])
        if rest.items and rest.id not in {found.knowledge.id for found in scores}:
            scores.append(Score(rest, tuple(score(rest))))
    best = best_of(scores)
    for item in ranked:
        if item.id in effects:
            note(f"effect {effects[item.id]}: {item.text[:80]}")
    return Weighed(best, whole.knowledge.id, effects, tuple(_changes(best, effects, settle(conflicts, scores))))


def given(knowledge: Knowledge, tokenizer: Any, score: Callable[[Knowledge], Sequence[bool]]) -> Weighed:
    """A text that was written by hand or chosen before: there is nothing to choose, and no item is measured."""
    counted = knowledge.model_copy(update={"tokens": count_tokens(knowledge.text, tokenizer)})
    return Weighed(Score(counted, tuple(score(counted))), counted.id, {}, ())


def _changes(best: Score, effects: Mapping[str, Effect], pairs: Sequence[Settled]) -> Iterator[Change]:
    """What the round's tests say of items, all of them together being wrong about a harmless one 5 times of 100."""
    held = {item.id for item in best.knowledge.items}
    beyond_chance = holm([*(effect.p_value for effect in effects.values()), *(pair.by.p_value for pair in pairs)])
    for (id_, effect), sure in zip(effects.items(), beyond_chance, strict=False):
        if sure and effect.harms and id_ not in held:
            why = f"in context it costs accuracy on validation tasks: {effect}, one of {len(beyond_chance)} tests"
            yield Change(item=id_, status=ItemStatus.HARMFUL, why=why)
    for pair, sure in zip(pairs, beyond_chance[len(effects) :], strict=True):
        if sure and pair.loser not in held:
            why = f"contradicts item {pair.winner}, which does more on validation tasks: {pair.by}"
            yield Change(item=pair.loser, status=ItemStatus.RETIRED, why=why)


def usable(items: Sequence[Item], settings: ExtractConfig, tokenizer: Any) -> bool:
    """Whether any item may enter knowledge and fits the budget."""
    return any(compose([item], settings.budget_tokens, tokenizer).items for item in ordered(items))


def apply_changes(store: Store, round_: RoundRecord, changes: Sequence[Any]) -> None:
    """Give items their new status, once: what a person did to an item since then stays."""
    for change in map(Change.model_validate, changes):
        why = f"round {round_.number}: {change.why}"
        if all(event.why != why for event in store.events(subject=change.item)):
            store.set_item_status(change.item, change.status, "engrain", why)


def scored(score: Score) -> str:
    """One line about a scored text."""
    texts = [item.text for item in score.knowledge.items] or [score.knowledge.text]
    more = f" (and {len(texts) - 1} more)" if len(texts) > 1 else ""
    return f"{score.accuracy:.2f} with {score.knowledge.tokens} tokens: {texts[0][:90]}{more}"
