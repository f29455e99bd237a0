"""From lines to knowledge: admit, merge, mark, order, and lay out candidates that fit a token budget."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from agent.episode import Episode
from envs.base import Split
from envs.errors import UsageError
from memory.admission import planted, suspicion, unverified
from memory.contradiction import conflicting, contradictions
from memory.effect import Effect
from memory.errors import UnknownIdError
from memory.generality import instance_terms, quoted_terms
from memory.normalise import NEAR, item_id, nearest, similarity
from memory.prompts import EXAMPLES, MARKER
from memory.records import MERGED, Extraction, Item, ItemStatus, Knowledge
from memory.render import compose
from memory.store import Store

WHO = "engrain"
INSTANCE_BOUND = "instance-bound"
CONTRADICTS = "contradicts"
#: Likeness from which an item counts as recalled, where its episode had the like in its own knowledge.
_RECALLED = 0.5
#: Episodes of other tasks that an item's own task is compared with, out of so many that are looked at.
_COMPARED, _SEARCHED = 64, 2000

_EXAMPLES = tuple(Item(id=item_id(text), text=text) for text in EXAMPLES)


def admit(
    store: Store,
    extractions: Sequence[Extraction],
    round_id: str | None = None,
    *,
    most: int | None = None,
    likeness: Callable[[str, str], float] = similarity,
) -> list[Item]:
    """Enter the items of stored extractions, another wording of a known item becoming one more source of it.

    - A line that admission refuses (see `memory.admission`), that does not stand in its extraction's output, or that
      repeats an example of the prompt becomes no item; an event on the extraction says why. The output itself stays as
      it was written.
    - What an unverified episode teaches is quarantined until a sound one teaches it too, or a person releases it.
    - An item that quotes its task's own numbers or names is marked `instance-bound`, until another task teaches it.
    - Items that contradict each other are marked so, both ways.
    - An absorbed item that is taught anew was not absorbed, and is active again. Retired and harmful items stay so
      however they are worded; what was merged into another item, or reworded, is evidence for that one.

    Doing it twice changes nothing.

    Args:
        store: holds the extractions and their episodes.
        extractions: what to read.
        round_id: the round in which new items are first seen.
        most: most new items of the round; those that most episodes teach come first. None is no limit.
        likeness: how alike two lines are, in [0, 1]; from `memory.normalise.NEAR` on they are one.

    Returns:
        The items that these extractions touched, each once, as they stand afterwards.
    """
    episodes = _episodes(store, extractions)
    known = {item.id: item for item in store.items()}
    accepted = _resolve(store, extractions, episodes, known, likeness)
    accepted = _cap(store, accepted, known, round_id, most)
    doubts = {id_: why for id_, episode in episodes.items() if (why := unverified(episode))}
    own_terms = _own_terms(store, episodes.values())
    for extraction, text, id_ in accepted:
        read = (extraction.episode_id, *extraction.others)
        doubt = next((f"episode {e} is unverified: {doubts[e]}" for e in read if e in doubts), None)
        item = known.get(id_)
        if item is not None and not _is_source(item, extraction) and doubt is None:
            _release(store, item, extraction)
        known[id_] = store.add_item(
            text,
            extraction=extraction,
            item=id_ if item is not None else None,
            round_id=round_id,
            status=ItemStatus.QUARANTINED if doubt else ItemStatus.ACTIVE,
            who=WHO,
            why=f"extraction {extraction.id}" + (f"; {doubt}" if doubt else ""),
        )
        quoted = quoted_terms(known[id_].text, frozenset().union(*(own_terms[e] for e in read)))
        if quoted and len(known[id_].sources) == len(read):
            note = f"quotes {', '.join(quoted[:5])} of its own task"
            known[id_] = store.flag_item(id_, INSTANCE_BOUND, note=note, who=WHO)
        elif not quoted and is_instance_bound(known[id_]):
            known[id_] = store.unflag_item(id_, INSTANCE_BOUND, who=WHO, why="another task teaches it too")
    touched = list(dict.fromkeys(id_ for _, _, id_ in accepted))
    active = [item for item in store.items(ItemStatus.ACTIVE) if item.support or not item.sources]
    new = [known[id_] for id_ in touched if known[id_].status is ItemStatus.ACTIVE]
    for one, other, why in conflicting(new, active):
        store.flag_item(one.id, CONTRADICTS, other=other.id, note=why, who=WHO)
        store.flag_item(other.id, CONTRADICTS, other=one.id, note=why, who=WHO)
    return [store.item(id_) for id_ in touched]


def is_instance_bound(item: Item) -> bool:
    """Whether an item is marked as one that quotes its own task."""
    return any(flag.flag == INSTANCE_BOUND for flag in item.flags)


def ordered(items: Sequence[Item], effects: Mapping[str, Effect] | None = None) -> list[Item]:
    """Active items that something supports: general ones first, then by source episodes, the latest learned, by id.

    Items that were only ever recalled are left out; items without any source (given by hand) come last. With `effects`,
    measured items come in the order of their effect, and those that gain nothing are left out.
    """
    usable = [item for item in items if item.status is ItemStatus.ACTIVE and (item.support or not item.sources)]
    if effects is not None:
        usable = [item for item in usable if item.id not in effects or effects[item.id].effect > 0]
    gain = {id_: found.effect for id_, found in (effects or {}).items()}
    return sorted(
        usable,
        key=lambda i: (
            -gain.get(i.id, 0.0),
            not i.support,
            is_instance_bound(i),
            -i.support,
            -i.last_seen.timestamp(),
            i.id,
        ),
    )


def candidates(
    items: Sequence[Item],
    budget_tokens: int,
    tokenizer: Any,
    count: int,
    seed: int,
    effects: Mapping[str, Effect] | None = None,
) -> list[Knowledge]:
    """Up to `count` different knowledge texts of at most `budget_tokens` tokens each, for selection to choose from.

    First the best items alone (at most half of them all), then the best 2, 4, 8, ... together and all of them, then
    random subsets fixed by `seed`. Of items that contradict each other a text holds the first only. Fewer come back if
    the items allow no more; none if no item fits. `effects`: see `ordered`.

    Raises:
        UsageError: count or budget_tokens is less than 1.
    """
    if count < 1 or budget_tokens < 1:
        raise UsageError(f"count and budget_tokens must be at least 1, not {count} and {budget_tokens}")
    ranked = ordered(items, effects)
    conflicts = contradictions(ranked)
    found: dict[str, Knowledge] = {}
    for subset in _subsets(ranked, count, random.Random(seed)):  # noqa: S311 - repeatable on purpose
        if len(found) == count:
            break
        knowledge = compose(compatible(subset, conflicts), budget_tokens, tokenizer)
        if knowledge.items:
            found.setdefault(knowledge.id, knowledge)
    return list(found.values())


def compatible(items: Iterable[Item], conflicts: Mapping[tuple[str, str], str]) -> list[Item]:
    """The items in order, without those that contradict one before them; `conflicts` is by (smaller id, larger id)."""
    rivals: dict[str, set[str]] = {}
    for one, other in conflicts:
        rivals.setdefault(one, set()).add(other)
        rivals.setdefault(other, set()).add(one)
    kept: dict[str, Item] = {}
    for item in items:
        if kept.keys().isdisjoint(rivals.get(item.id, ())):
            kept[item.id] = item
    return list(kept.values())


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


_Said = tuple[Extraction, str, str]  # who said it, the wording, the id of the item that it is


def _episodes(store: Store, extractions: Sequence[Extraction]) -> dict[str, Episode]:
    ids = dict.fromkeys(id_ for e in extractions for id_ in (e.episode_id, *e.others))
    return {id_: store.episode(id_) for id_ in ids}


def _resolve(
    store: Store,
    extractions: Sequence[Extraction],
    episodes: Mapping[str, Episode],
    known: Mapping[str, Item],
    likeness: Callable[[str, str], float],
) -> list[_Said]:
    """Which item each line is: one that is known, or one that an earlier line of these extractions brought."""
    pool = dict(known)
    entered = {(s.extraction_id, s.text): item.id for item in known.values() for s in item.sources}
    accepted: list[_Said] = []
    for extraction in extractions:
        read = [episodes[id_] for id_ in (extraction.episode_id, *extraction.others)]
        recalled = _recalled(store, read, known)
        for position, text in enumerate(extraction.items):
            if why := _refusal(text, extraction, read):
                _note_refusal(store, extraction, position, why)
                continue
            id_ = entered.get((extraction.id, text))
            if id_ is None:
                id_ = item_id(text)
                if id_ not in pool:
                    twin = nearest(text, recalled, _RECALLED) or nearest(text, pool.values(), NEAR, likeness)
                    id_ = twin.id if twin is not None else id_
            id_ = _standing(id_, pool)
            pool.setdefault(id_, Item(id=id_, text=text))
            accepted.append((extraction, text, id_))
    return accepted


def _standing(id_: str, pool: Mapping[str, Item]) -> str:
    """The item itself, or the one that took its place when it was merged or reworded, however often."""
    seen = {id_}
    while id_ in pool and pool[id_].status is ItemStatus.RETIRED:
        into = next((f.other for f in pool[id_].flags if f.flag == MERGED and f.other in pool), id_)
        if into in seen:
            break
        seen.add(into)
        id_ = into
    return id_


def _refusal(text: str, extraction: Extraction, read: Sequence[Episode]) -> str | None:
    if f"{MARKER} {text}" not in (line.rstrip(" \r") for line in extraction.output.split("\n")):
        return "it does not stand in what the model wrote"
    if why := suspicion(text):
        return f"it holds {why}"
    if nearest(text, _EXAMPLES) is not None:
        return "it is an example of the prompt"
    if any(planted(text, episode) for episode in read):
        return "the world itself called it an experience item"
    return None


def _cap(
    store: Store, accepted: Sequence[_Said], known: Mapping[str, Item], round_id: str | None, most: int | None
) -> list[_Said]:
    """Without the new items beyond the `most` that most episodes teach; ties go to the one said first."""
    if most is None:
        return list(accepted)
    taught: dict[str, set[str]] = {}
    for extraction, _, id_ in accepted:
        if id_ not in known or (round_id is not None and known[id_].round_id == round_id):
            taught.setdefault(id_, set()).update((extraction.episode_id, *extraction.others))
    kept = sorted(taught, key=lambda id_: -len(taught[id_]))[:most]  # sorting is stable: said first, first
    over = taught.keys() - set(kept)
    for extraction, text, id_ in accepted:
        if id_ in over:
            _note_refusal(
                store, extraction, extraction.items.index(text), f"the round already has its {most} new items"
            )
    return [said for said in accepted if said[2] not in over]


def _note_refusal(store: Store, extraction: Extraction, position: int, why: str) -> None:
    """An event that points to the line; the line itself is not repeated, lest a secret spread."""
    detail = {"item": position}
    if not any(e.detail == detail for e in store.events(subject=extraction.id, action="refused")):
        store.note("extraction", extraction.id, "refused", WHO, f"item {position + 1}: {why}", detail)


def _recalled(store: Store, read: Sequence[Episode], known: Mapping[str, Item]) -> list[Item]:
    """The items that these episodes had in their own knowledge."""
    found: list[Item] = []
    for id_ in dict.fromkeys(episode.knowledge for episode in read if episode.knowledge):
        try:
            found += [known[item.id] for item in store.knowledge(id_).items if item.id in known]
        except UnknownIdError:  # a text given by hand is in no store
            continue
    return found


def _own_terms(store: Store, episodes: Iterable[Episode]) -> dict[str, frozenset[str]]:
    worlds: dict[str, list[Episode]] = {}
    for episode in episodes:
        worlds.setdefault(episode.task.env, []).append(episode)
    return {
        id_: terms
        for env, family in worlds.items()
        for id_, terms in instance_terms(family, _compared(store, env, family)).items()
    }


def _compared(store: Store, env: str, family: Sequence[Episode]) -> list[Episode]:
    """The latest stored training episodes of other tasks, one a task, that began no later than those of `family`: what
    is played in the meantime changes nothing for an extraction that is read again."""
    latest, seen = max(e.started_at for e in family), {e.task.id for e in family}
    found: list[Episode] = []
    for row in store.episode_rows(env=env, split=Split.TRAIN.value, newest_first=True, limit=_SEARCHED):
        if row.task_id not in seen and row.started_at <= latest:
            seen.add(row.task_id)
            found.append(store.episode(row.id))
        if len(found) == _COMPARED:
            break
    return found


def _is_source(item: Item, extraction: Extraction) -> bool:
    return any(source.extraction_id == extraction.id for source in item.sources)


def _release(store: Store, item: Item, extraction: Extraction) -> None:
    """A sound episode teaches an item that waited in quarantine, or that was thought to be absorbed."""
    if item.status not in (ItemStatus.QUARANTINED, ItemStatus.ABSORBED):
        return
    changes = store.events(subject=item.id, kind="item")
    by_hand = any(event.who != WHO and event.action == item.status.value for event in changes)
    if not by_hand:
        before = "in quarantine" if item.status is ItemStatus.QUARANTINED else "absorbed"
        why = f"a sound episode teaches it, and it was {before}: extraction {extraction.id}"
        store.set_item_status(item.id, ItemStatus.ACTIVE, WHO, why)
