import pytest

from envs.errors import UsageError
from memory.errors import UnknownIdError
from memory.normalise import item_id
from memory.records import Extraction, ItemEffect, ItemStatus


def extraction(id="x1", episode_id="e1", items=("Knock first.",), **overrides):
    fields = {
        "id": id, "episode_id": episode_id, "model": "tiny", "checkpoint": None, "mode": "examples",
        "prompt_version": "1", "seed": 1, "output": "", "items": items, "malformed": (),
    }  # fmt: skip
    return Extraction(**{**fields, **overrides})


def effect(item, value, **overrides):
    fields = {
        "item_id": item, "method": "leave-one-out", "env": "sums", "split": "validation", "effect": value,
        "low": value - 0.1, "high": value + 0.1, "n": 40,
    }  # fmt: skip
    return ItemEffect(**{**fields, **overrides})


def test_an_extraction_over_several_episodes_is_a_source_from_each(store, make_episode):
    store.add_episodes([make_episode(f"e{i}") for i in range(4)])
    found = extraction("x1", "e0", others=("e2", "e1"))
    store.add_extraction(found)
    store.add_extraction(found)
    assert store.extractions() == [found] == store.extractions(episode_id="e1") == store.extractions(episode_id="e0")
    assert store.extractions(episode_id="e3") == []
    for _ in range(2):
        item = store.add_item("Knock first.", extraction=found)
    assert sorted(source.episode_id for source in item.sources) == ["e0", "e1", "e2"]
    assert item.support == store.item_rows()[0].support == 3


def test_the_latest_effect_counts_and_the_others_stay(store):
    round_ = store.create_round({}, 0, "tiny")
    help_, harm, unknown = (store.add_item(text) for text in ("helps", "harms", "unknown"))
    store.record_effect(effect(help_.id, 0.1))
    latest = store.record_effect(effect(help_.id, 0.3, round_id=round_.id))
    store.record_effect(effect(help_.id, 0.9, round_id=round_.id))  # the same measurement, played again
    store.record_effect(effect(harm.id, -0.2))
    item = store.item(help_.id)
    assert (item.effect, item.effect_low, item.effect_high, item.effect_n) == (0.3, latest.low, latest.high, 40)
    assert [found.effect for found in store.effects(item_id=help_.id)] == [0.1, 0.3]
    assert store.effects(round_id=round_.id) == [latest]
    assert [row.id for row in store.item_rows(by="effect")] == [help_.id, harm.id, unknown.id]
    with pytest.raises(UnknownIdError):
        store.record_effect(effect("nope", 0.1))


def test_flags_are_events_and_filter(store):
    one, two = store.add_item("Go left."), store.add_item("Go right.")
    for _ in range(2):
        store.flag_item(one.id, "contradicts", other=two.id, note="opposite")
    store.flag_item(one.id, "instance-bound", who="ada")
    assert [(f.flag, f.other, f.who) for f in store.item(one.id).flags] == [
        ("contradicts", two.id, "engrain"),
        ("instance-bound", "", "ada"),
    ]
    assert [row.id for row in store.item_rows(flag="contradicts")] == [one.id]
    assert store.item_rows(search="LEFT")[0].flags == ("contradicts", "instance-bound")
    assert store.unflag_item(one.id, "contradicts", other=two.id).flags[0].flag == "instance-bound"
    store.unflag_item(one.id, "contradicts", other=two.id)
    events = store.events(subject=one.id)
    assert [e.action for e in events] == ["added", "flagged", "flagged", "unflagged"]
    assert events[1].detail == {"flag": "contradicts", "other": two.id, "note": "opposite"}
    with pytest.raises(UnknownIdError):
        store.flag_item("nope", "x")


def test_listing_items_orders_filters_and_pages(store, make_episode):
    store.add_episodes([make_episode(f"e{i}") for i in range(3)])
    for number, text in enumerate(["100% sure", "a_b", "Äpfel"]):
        for i in range(number):
            found = extraction(f"x{number}{i}", f"e{i}", (text,))
            store.add_extraction(found)
            store.add_item(text, extraction=found)
        store.add_item(text)
    rows = store.item_rows()
    assert [(row.text, row.support) for row in rows] == [("Äpfel", 2), ("a_b", 1), ("100% sure", 0)]
    assert store.item_rows(limit=1, offset=1) == rows[1:2]
    assert store.item_rows(offset=2) == rows[2:]
    assert [row.text for row in store.item_rows(by="latest")] == ["Äpfel", "a_b", "100% sure"]
    assert [row.text for row in store.item_rows(search="0%")] == ["100% sure"]
    assert [row.text for row in store.item_rows(search="_")] == ["a_b"]
    store.set_item_status(rows[0].id, ItemStatus.HARMFUL, "engrain", "costs 0.2")
    assert [row.text for row in store.item_rows(status="harmful")] == ["Äpfel"]
    assert store.events(subject=rows[0].id)[-1].detail == {"before": "active"}


def test_a_merged_item_can_be_restored(store, make_episode):
    store.add_episodes([make_episode("e1"), make_episode("e2")])
    for id, episode, text in (("x1", "e1", "Knock first."), ("x2", "e2", "Please knock.")):
        store.add_extraction(extraction(id, episode, (text,)))
        store.add_item(text, extraction=store.extractions(episode_id=episode)[0])
    one, two = item_id("Knock first."), item_id("Please knock.")
    merged = store.merge_items(two, one, "ada", "same thing")
    assert (merged.support, [s.text for s in merged.sources]) == (2, ["Knock first.", "Please knock."])
    gone = store.item(two)
    assert (gone.status, gone.flags[0].flag, gone.flags[0].other) == (ItemStatus.RETIRED, "merged", one)
    assert store.merge_items(two, one, "ada", "again").support == 2
    assert store.set_item_status(two, "active", "ada", "not the same").support == 1
    with pytest.raises(UnknownIdError):
        store.merge_items("nope", one, "ada", "")
    with pytest.raises(UnknownIdError):
        store.merge_items(one, "nope", "ada", "")
    assert store.item(one).status is ItemStatus.ACTIVE


def test_an_edit_that_fails_half_way_is_none(store, monkeypatch):
    item = store.add_item("Knock first.")
    monkeypatch.setattr("memory.items.count_support", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.reword_item(item.id, "Always knock first.", "ada", "clearer")
    assert store.items() == [item]


def test_an_item_is_not_merged_into_itself(store):
    item = store.add_item("Knock first.")
    with pytest.raises(UsageError, match=f"{item.id} cannot be merged into itself"):
        store.merge_items(item.id, item.id, "ada", "the same, is it not")
    assert store.item(item.id) == item


def test_an_edited_item_takes_the_place_of_the_old_one(store, make_episode):
    store.add_episodes([make_episode("e1")])
    store.add_extraction(extraction())
    old = store.add_item("Knock first.", extraction=extraction())
    new = store.reword_item(old.id, "Always knock first.", "ada", "clearer")
    assert (new.support, new.derived_from, new.status) == (1, old.id, ItemStatus.ACTIVE)
    assert store.item(old.id).status is ItemStatus.RETIRED
    same = store.reword_item(new.id, "always knock first", "ada", "")
    assert (same.id, same.text) == (new.id, "always knock first")
    back = store.reword_item(new.id, "Knock first.", "ada", "was better")
    assert (back.id, back.status) == (old.id, ItemStatus.ACTIVE)
    assert store.item(new.id).status is ItemStatus.RETIRED


def test_training_runs(store, make_episode):
    from memory.records import CheckpointRecord, RunRecord

    round_ = store.create_round({}, 0, "tiny")
    run = RunRecord(
        id="run1", round_id=round_.id, method="opcd", model="tiny", folder="/x", seed=2**70, config={"steps": 3}
    )
    assert store.add_run(run) == run == store.add_run(run.model_copy(update={"seed": 1}))
    store.add_episodes([make_episode("e1")], round_id=round_.id, stage="train", run_id="run1")
    store.add_episodes([make_episode("e2")])
    assert [row.id for row in store.episode_rows(run_id="run1")] == ["e1"]
    store.add_checkpoint(CheckpointRecord(id="c", model="tiny", path="/x/step", run_id="run1"))
    assert store.checkpoint("c").run_id == "run1"
    done = store.finish_run("run1", "finished", reason="collapsed", metrics=[{"step": 1, "divergence": 0.5}])
    assert (done.status, done.reason, done.metrics) == ("finished", "collapsed", ({"step": 1, "divergence": 0.5},))
    assert done.finished_at is not None
    assert store.runs(round_id=round_.id) == [done]
    assert store.runs(knowledge="k") == []
    with pytest.raises(UnknownIdError):
        store.finish_run("nope", "finished")
    with pytest.raises(UnknownIdError):
        store.add_run(run.model_copy(update={"id": "run2", "round_id": "nope"}))


def test_notes_are_events(store):
    store.note("extraction", "x1", "rejected", "engrain", "reads like an instruction", {"line": "a\0b"})
    store.note("item", "i", "seen", "ada", "")
    (event,) = store.events(kind="extraction")
    assert (event.subject, event.action, event.detail) == ("x1", "rejected", {"line": "a\0b"})
    assert store.events(action="seen")[0].who == "ada"
