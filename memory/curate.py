"""From lines to knowledge: admit, merge, order, and lay out candidates that fit a token budget."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol

from envs.errors import UsageError
from memory.normalise import NEAR, item_id, nearest
from memory.records import Extraction, Item, ItemStatus, Knowledge
from memory.render import compose


class ItemBook(Protocol):
    """What `admit` needs of a store."""

    def items(self) -> list[Item]:
        """All items, retired ones included."""
        ...

    def add_item(self, text: str, *, extraction: Extraction, item: str | None, round_id: str | None, why: str) -> Item:
        """Store an item, or one more source of the item with the id `item`."""
        ...


def admit(
    book: ItemBook, extractions: Sequence[Extraction], round_id: str | None = None, threshold: float = NEAR
) -> list[Item]:
    """Enter the items of stored extractions, another wording of a known item becoming one more source of it.

    Doing it twice changes nothing. A retired item stays retired however it is worded.

    Returns:
        The items that these extractions touched, each once, as they stand afterwards.
    """
    known = {item.id: item for item in book.items()}
    touched: dict[str, None] = {}
    for extraction in extractions:
        for text in extraction.items:
            twin = nearest(text, known.values(), threshold)
            merged = twin.id if twin is not None and twin.id != item_id(text) else None
            why = f"extraction {extraction.id}"
            item = book.add_item(text, extraction=extraction, item=merged, round_id=round_id, why=why)
            known[item.id] = item
            touched[item.id] = None
    return [known[id_] for id_ in touched]


def ordered(items: Sequence[Item]) -> list[Item]:
    """Active items that something supports: most source episodes first, then the latest learned, then by id.

    Items that were only ever recalled are left out; items without any source (given by hand) come last.
    """
    usable = [item for item in items if item.status is ItemStatus.ACTIVE and (item.support or not item.sources)]
    return sorted(usable, key=lambda item: (-item.support, -item.last_seen.timestamp(), item.id))


def candidates(items: Sequence[Item], budget_tokens: int, tokenizer: Any, count: int, seed: int) -> list[Knowledge]:
    """Up to `count` different knowledge texts of at most `budget_tokens` tokens each, for selection to choose from.

    First the best items alone (at most half of them all), then the best 2, 4, 8, ... together and all of them, then
    random subsets fixed by `seed`. Fewer come back if the items allow no more; none if no item fits.

    Raises:
        UsageError: count or budget_tokens is less than 1.
    """
    if count < 1 or budget_tokens < 1:
        raise UsageError(f"count and budget_tokens must be at least 1, not {count} and {budget_tokens}")
    ranked = ordered(items)
    found: dict[str, Knowledge] = {}
    for subset in _subsets(ranked, count, random.Random(seed)):  # noqa: S311 - repeatable on purpose
        if len(found) == count:
            break
        knowledge = compose(subset, budget_tokens, tokenizer)
        if knowledge.items:
            found.setdefault(knowledge.id, knowledge)
    return list(found.values())


def _subsets(ranked: Sequence[Item], count: int, generator: random.Random) -> list[list[Item]]:
    alone = [[item] for item in ranked]
    sizes = [2**power for power in range(1, len(ranked).bit_length()) if 2**power < len(ranked)]
    together = [list(ranked[:size]) for size in (*sizes, len(ranked)) if size > 1]
    first = max(count - count // 2, count - len(together) - 1)
    drawn = []
    if len(ranked) > 2:
        for _ in range(8 * count):
            picked = set(generator.sample(range(len(ranked)), generator.randint(2, len(ranked) - 1)))
            drawn.append([item for position, item in enumerate(ranked) if position in picked])
    return [*alone[:first], *together, *drawn, *alone[first:]]
