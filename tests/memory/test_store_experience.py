from datetime import UTC, datetime

import pytest

from memory.curate import admit
from memory.errors import ConflictError, UnknownIdError
from memory.normalise import item_id
from memory.records import (
    CheckpointRecord,
    CheckpointStatus,
    EvaluationRecord,
    EvaluationResult,
    Extraction,
    ItemStatus,
    KnowledgeItem,
)
from memory.render import compose


def extraction(id="x1", episode_id="e1", items=("Knock first.",), **overrides):
    output = "\n".join(["a\0b", *(f"- EXPERIENCE ITEM: {item}" for item in items)])
    fields = {
        "id": id, "episode_id": episode_id, "model": "tiny", "checkpoint": None, "mode": "examples",
        "prompt_version": "1", "seed": 2**70, "output": output,
        "items": items, "malformed": ("- EXPERIENCE ITEM:",),
    }  # fmt: skip
    return Extraction(**{**fields, **overrides})


def knowledge_of(tokenizer, *texts):
    return compose([KnowledgeItem(id=item_id(text), text=text) for text in texts], 10_000, tokenizer)


def test_extractions(store, make_episode):
    store.add_episodes([make_episode("e1"), make_episode("e2")])
    first, second = extraction(), extraction("x2", "e2")
    store.add_extraction(first)
    store.add_extraction(first)
    round_ = store.create_round({}, 0, "tiny")
    store.add_extraction(second, round_.id)
    assert store.extractions() == [first, second]
    assert store.extractions(episode_id="e1") == [first]
    assert store.extractions(round_id=round_.id) == [second]
    with pytest.raises(UnknownIdError):
        store.add_extraction(extraction("x3", "nowhere"))


def test_one_text_is_one_item_with_two_sources(store, make_episode):
    store.add_episodes([make_episode("e1"), make_episode("e2")])
    one, two = extraction(), extraction("x2", "e2", ("  KNOCK   first",))
    for found in (one, two, two):
        store.add_extraction(found)
        item = store.add_item(found.items[0], extraction=found)
    assert store.items() == [item] == [store.item(item.id)]
    assert item.text == "Knock first."
    assert item.support == len(item.sources) == 2
    assert item.sources[1].text == "  KNOCK   first"


def test_an_item_status_has_an_author_and_a_reason(store):
    item = store.add_item("Knock first.", who="ada", why="by hand")
    assert (item.status, item.support, item.sources) == (ItemStatus.ACTIVE, 0, ())
    retired = store.set_item_status(item.id, "retired", "ada", "wrong")
    assert retired.status is ItemStatus.RETIRED
    assert store.add_item("knock first").status is ItemStatus.RETIRED
    assert store.items("active") == []
    assert store.items(ItemStatus.RETIRED) == [retired]
    assert [(e.who, e.action, e.why) for e in store.events(subject=item.id)] == [
        ("ada", "added", "by hand"),
        ("ada", "retired", "wrong"),
    ]
    with pytest.raises(UnknownIdError):
        store.set_item_status("nope", "active", "ada", "")
    with pytest.raises(UnknownIdError):
        store.item("nope")


def test_recalled_items_prove_nothing(store, make_episode, tiny_tokenizer):
    knowledge = store.add_knowledge(knowledge_of(tiny_tokenizer, "Knock first."))
    store.add_episodes([make_episode("e1", knowledge=knowledge.id), make_episode("e2")])
    store.add_extraction(extraction("x1", "e1", ("knock first!", "Wipe your feet.")))
    known, new = admit(store, store.extractions())
    assert (known.id, known.support, known.sources[0].recalled) == (item_id("Knock first."), 0, True)
    assert (new.support, new.sources[0].recalled) == (1, False)
    store.add_extraction(extraction("x2", "e2", ("Knock first",)))
    assert admit(store, store.extractions())[0].support == 1


def test_admit_merges_wordings_once(store, make_episode):
    store.add_episodes([make_episode("e1"), make_episode("e2")])
    a = extraction("x1", "e1", ("Always write the answer in this form: <answer>12</answer>",))
    b = extraction("x2", "e2", ("Always write an answer in this form: <answer>12</answer>", "Never push."))
    for found in (a, b):
        store.add_extraction(found)
    first = admit(store, [a, b])
    assert [(i.text[:6], i.support) for i in first] == [("Always", 2), ("Never ", 1)]
    assert admit(store, [b, a])[0] == first[0]
    store.set_item_status(first[0].id, "retired", "ada", "absorbed")
    assert admit(store, [b])[0].status is ItemStatus.RETIRED
    assert len(store.items()) == 2


def test_knowledge_versions_run_on(store, tiny_tokenizer):
    round_ = store.create_round({}, 0, "tiny")
    one = store.add_knowledge(knowledge_of(tiny_tokenizer, "a1"), round_.id)
    two = store.add_knowledge(knowledge_of(tiny_tokenizer, "a1", "b2"), round_.id, parent=one.id)
    again = store.add_knowledge(knowledge_of(tiny_tokenizer, "a1"))
    assert again == one
    assert (one.version, two.version, two.parent, two.round_id) == (1, 2, one.id, round_.id)
    assert store.knowledge(2) == store.knowledge("2") == store.knowledge(two.id) == two
    assert store.knowledge_versions() == [one, two]
    assert [i.text for i in store.items()] == ["a1", "b2"]
    plain = knowledge_of(tiny_tokenizer, "a1", "b2")
    assert two.model_copy(update={"version": None, "round_id": None, "parent": None, "created_at": None}) == plain
    for unknown in ("nope", 3, "3", "²", "9" * 40):
        with pytest.raises(UnknownIdError):
            store.knowledge(unknown)
    with pytest.raises(UnknownIdError):
        store.add_knowledge(knowledge_of(tiny_tokenizer, "c"), parent="nope")


def test_rounds_remember_where_they_stood(store):
    first = store.create_round({"budget": 5, "deep": {"a": [1]}}, 2**64, "tiny")
    second = store.create_round({}, 0, "other")
    assert (first.number, second.number, first.status) == (1, 2, "running")
    changed = store.update_round(first.id, stage="select", state={"done": ["play"]})
    assert (changed.stage, changed.state, changed.config) == ("select", {"done": ["play"]}, first.config)
    assert store.unfinished_round("tiny") == changed == store.round(1) == store.round("1") == store.round(first.id)
    assert store.update_round(first.id, stage="judge").state == {"done": ["play"]}
    finished = store.update_round(first.id, status="finished", verdict="promoted")
    assert (finished.status, finished.verdict, finished.stage) == ("finished", "promoted", "judge")
    assert store.unfinished_round("tiny") is None
    assert [r.number for r in store.rounds()] == [1, 2]
    with pytest.raises(UnknownIdError):
        store.update_round("nope", stage="x")
    with pytest.raises(UnknownIdError):
        store.round("nope")


def test_checkpoints_and_promotion(store):
    base = {"model": "tiny", "path": "/x", "created_at": datetime(2026, 1, 1, tzinfo=UTC)}
    one = store.add_checkpoint(CheckpointRecord(id="c1", manifest={"lr": 5e-4}, **base))
    two = store.add_checkpoint(CheckpointRecord(id="c2", parent="c1", **base))
    assert store.add_checkpoint(CheckpointRecord(id="c1", **base)) == one
    with pytest.raises(ConflictError):
        store.add_checkpoint(CheckpointRecord(id="c1", parent="c9", **base))
    assert store.checkpoints() == [one, two]
    assert store.checkpoints(model="other") == []
    assert store.current_checkpoint("tiny") is None
    store.promote("c2")
    store.promote("c1", who="ada", why="better")
    assert store.current_checkpoint("tiny").id == "c1"
    store.set_checkpoint_status("c1", CheckpointStatus.ROLLED_BACK, "ada", "collapsed")
    assert store.current_checkpoint("tiny").id == "c2"
    assert store.current_checkpoint("other") is None
    assert [e.action for e in store.events(subject="c1")] == ["candidate", "promoted", "rolled_back"]
    with pytest.raises(UnknownIdError):
        store.promote("c9")


def test_evaluations(store):
    round_ = store.create_round({}, 0, "tiny")
    fields = {
        "name": "bare", "env": "sums", "split": "test", "n": 2, "successes": 1, "accuracy": 0.5, "low": 0.1,
        "high": 0.9, "mean_score": 0.5,
        "results": [EvaluationResult(task_id=f"t{i}", success=bool(i), score=i) for i in range(2)],
    }  # fmt: skip
    first = EvaluationRecord(round_id=round_.id, **fields)
    assert store.add_evaluation(first) == first
    again = EvaluationRecord(round_id=round_.id, **{**fields, "successes": 2})
    assert store.add_evaluation(again) == first
    loose = [EvaluationRecord(**fields) for _ in range(2)]
    for record in loose:
        store.add_evaluation(record)
    assert store.evaluations(round_.id) == [first]
    assert len(store.evaluations(split="test", env="sums", name="bare")) == 3
    assert store.evaluations(checkpoint="c") == []
    with pytest.raises(UnknownIdError):
        store.add_evaluation(EvaluationRecord(round_id="nope", **fields))


def test_ids_may_be_shortened(store, make_episode):
    store.add_episodes([make_episode(id) for id in ("abc1", "abc2", "ABd", "a%", "abc")])
    assert store.full_id("episode", "abc") == "abc"
    assert store.full_id("episode", "abc1") == "abc1"
    assert store.full_id("episode", "AB") == "ABd"
    assert store.full_id("episode", "a%") == "a%"
    for unclear in ("a", "ab", "x", ""):
        with pytest.raises(UnknownIdError):
            store.full_id("episode", unclear)
