"""Texts and items weighed by a player whose chances are known."""

from __future__ import annotations

import numpy as np
import pytest

from engrain.config import ExtractConfig
from engrain.weigh import Change, apply_changes, usable, weigh
from memory.normalise import item_id
from memory.records import Item, ItemSource, ItemStatus, now
from memory.store import Store

TASKS = 128
GOOD, IDLE, BAD = "Write the number in tags.", "Drink water.", "Shout the answer."
GAIN = {GOOD: 0.5, IDLE: 0.0, BAD: -0.4, "Never write the number in tags.": -0.3}


class Words:
    def __call__(self, text, add_special_tokens):
        return {"input_ids": text.split()}


class Player:
    """Solves a task with a chance of 0.45 and what the items in its context add; luck is a task's own."""

    def __init__(self):
        self.luck = np.random.default_rng(1).random(TASKS)
        self.passes = 0.0

    def play(self, knowledge, positions):
        self.passes += len(positions) / TASKS
        gain = sum(GAIN[item.text] for item in knowledge.items) if knowledge else 0.0
        return [bool(self.luck[p] < 0.45 + gain) for p in positions]

    def score(self, knowledge):
        return self.play(knowledge, range(TASKS))


def items(*texts):
    def source(episode):
        return ItemSource(episode_id=episode, extraction_id=f"x{episode}", text="", recalled=False, created_at=now())

    return [
        Item(id=item_id(text), text=text, sources=tuple(source(f"e{n}{m}") for m in range(9 - n)))
        for n, text in enumerate(texts)
    ]


def weighed(effects, *texts, candidates=4):
    player, notes = Player(), []
    settings = ExtractConfig(effects=effects, candidates=candidates, budget_tokens=200)
    bare = player.play(None, range(TASKS))
    player.passes = 0.0
    found = weigh(
        items(*texts),
        bare,
        settings,
        seed=0,
        tokenizer=Words(),
        score=player.score,
        play=player.play,
        note=notes.append,
    )
    return found, player, notes


def test_randomised_effects_come_first_and_candidates_are_made_of_what_gains():
    found, player, notes = weighed("randomised", BAD, IDLE, GOOD)
    assert [i.text for i in found.best.knowledge.items] == [GOOD]
    assert found.effects[item_id(GOOD)].helps
    assert found.changes == (Change(item=item_id(BAD), status=ItemStatus.HARMFUL, why=found.changes[0].why),)
    assert "costs accuracy" in found.changes[0].why
    assert player.passes <= 2 + 4
    assert any(note.startswith("effect +") and GOOD in note for note in notes)


def test_leaving_one_out_takes_the_best_text_apart():
    found, player, _ = weighed("leave_one_out", GOOD, IDLE, BAD, candidates=1)
    assert [i.text for i in found.best.knowledge.items] == [GOOD]
    assert found.effects.keys() == {item_id(GOOD)}
    assert found.effects[item_id(GOOD)].helps
    assert player.passes == 1  # bare was known


def test_a_text_is_better_without_what_harms(monkeypatch):
    from engrain import weigh as module
    from memory.render import compose

    everything = [compose(items(BAD, IDLE, GOOD), 200, Words())]
    monkeypatch.setattr(module, "candidates", lambda *args: list(everything))
    found, player, _ = weighed("leave_one_out", BAD, IDLE, GOOD)
    assert [i.text for i in found.best.knowledge.items] == [GOOD]
    assert found.whole == everything[0].id
    assert [(c.item, c.status) for c in found.changes] == [(item_id(BAD), ItemStatus.HARMFUL)]
    assert player.passes == 1 + 3 + 1  # whole, each one out, and what gained


def test_without_effects_the_best_candidate_is_taken_as_it_is():
    found, player, _ = weighed("none", GOOD, IDLE, BAD)
    assert (found.effects, found.changes) == ({}, ())
    assert [i.text for i in found.best.knowledge.items] == [GOOD]
    assert player.passes == 4


def test_validation_decides_between_items_that_contradict_each_other():
    other = "Never write the number in tags."
    found, _, _ = weighed("none", other, GOOD, candidates=1)
    assert [i.text for i in found.best.knowledge.items] == [GOOD]
    assert [(c.item, c.status) for c in found.changes] == [(item_id(other), ItemStatus.RETIRED)]
    assert f"contradicts item {item_id(GOOD)}" in found.changes[0].why


def test_changes_are_made_once_and_a_persons_word_stays(tmp_path):
    with Store.open(str(tmp_path / "s.db")) as store:
        round_ = store.create_round({}, 0, "tiny")
        item = store.add_item(BAD)
        changes = [Change(item=item.id, status=ItemStatus.HARMFUL, why="it costs").model_dump(mode="json")]
        apply_changes(store, round_, changes)
        assert store.item(item.id).status is ItemStatus.HARMFUL
        assert store.events(subject=item.id)[-1].why == "round 1: it costs"
        store.set_item_status(item.id, ItemStatus.ACTIVE, "ada", "I like it")
        apply_changes(store, round_, changes)
        assert store.item(item.id).status is ItemStatus.ACTIVE


def test_no_item_that_fits_is_an_error():
    from envs.errors import UsageError

    with pytest.raises(UsageError, match="no candidate"):
        weigh(
            items(GOOD), [True] * 8, ExtractConfig(budget_tokens=1), seed=0, tokenizer=Words(),
            score=lambda k: [], play=lambda k, p: [], note=print,
        )  # fmt: skip


def test_whether_anything_may_enter_knowledge():
    settings = ExtractConfig(budget_tokens=20)
    assert usable(items(GOOD), settings, Words())
    assert not usable(items(GOOD), ExtractConfig(budget_tokens=3), Words())
    assert not usable([], settings, Words())
    waiting = [item.model_copy(update={"status": ItemStatus.QUARANTINED}) for item in items(GOOD)]
    assert not usable(waiting, settings, Words())


def test_of_many_harmless_items_one_is_hardly_ever_retired_and_what_harms_is_found():
    """Eight items a round, measured with independent luck, through all of it; see test_effect for many more rounds."""
    texts = [f"Harmless thing number {word}." for word in ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta")]
    harmful = "Shout."
    rounds, wrong, found = 40, 0, 0
    draw = np.random.default_rng(0)

    def play(knowledge, positions):
        gain = sum(-0.4 for item in knowledge.items if item.text == harmful) if knowledge else 0.0
        return [bool(u < 0.5 + gain) for u in draw.random(len(positions))]

    for seed in range(rounds):
        weighed = weigh(
            items(*texts, harmful),
            play(None, range(TASKS)),
            ExtractConfig(effects="randomised", candidates=1, budget_tokens=200),
            seed=seed,
            tokenizer=Words(),
            score=lambda k: play(k, range(TASKS)),
            play=play,
            note=lambda text: None,
        )
        assert len(weighed.effects) == len(texts) + 1
        gone = {change.item for change in weighed.changes}
        found += item_id(harmful) in gone
        wrong += bool(gone - {item_id(harmful)})
    assert found > 0.9 * rounds
    assert wrong <= 3  # one is to be expected: only one side of a two-sided 5% counts as harm
