"""The store as a whole: lineage and blame, forgetting, integrity, and moving to files and back, on both databases."""

import io
import json
import re

import pytest
import sqlalchemy as sa

from memory.errors import BadStoreError, UnknownIdError
from memory.normalise import item_id
from memory.records import (
    CheckpointRecord,
    EvaluationRecord,
    EvaluationResult,
    Extraction,
    ItemEffect,
    Knowledge,
    KnowledgeItem,
    RunRecord,
    digest,
)
from memory.schema import Base
from memory.store import Store

SECRET = "the vault opens with 4711"


def extraction(id, episode, *items):
    return Extraction(
        id=id, episode_id=episode, model="tiny", checkpoint=None, mode="paper", prompt_version="1", seed=2**70,
        output="\n".join(items), items=items, malformed=(),
    )  # fmt: skip


def version(store, round_id, *texts, parent=None):
    body = "\n".join(f"- {text}" for text in texts)
    places = tuple(KnowledgeItem(id=item_id(text), text=text) for text in texts)
    found = Knowledge(id=digest(body), items=places, text=body, tokens=len(body))
    return store.add_knowledge(found, round_id, parent)


def fill(store, make_episode):
    """Two rounds: e1 taught a secret and, with e2, a rule; v2 holds both; c2 was trained on v2 from c1."""
    first, second = store.create_round({"a": [1]}, 2**70, "tiny"), store.create_round({}, 0, "tiny")
    secret = make_episode("e1", turns=[("What opens the vault? \0\ud800", SECRET)], seed=11)
    store.add_episodes([secret, make_episode("e2", seed=12)], round_id=first.id, stage="play")
    for id, episode, lines in (("x1", "e1", (SECRET, "Knock first.")), ("x2", "e2", ("Knock first.",))):
        found = extraction(id, episode, *lines)
        store.add_extraction(found, first.id)
        for line in lines:
            store.add_item(line, extraction=found, round_id=first.id)
    one = version(store, first.id, "Knock first.")
    two = version(store, second.id, "Knock first.", SECRET, parent=one.id)
    store.record_effect(
        ItemEffect(item_id=item_id(SECRET), method="leave-one-out", env="sums", split="validation", effect=0.25,
                   low=0.1, high=0.4, n=40, knowledge=two.id)
    )  # fmt: skip
    store.flag_item(item_id("Knock first."), "contradicts", other=item_id(SECRET))
    for number, (round_, text) in enumerate(((first, one), (second, two)), 1):
        run = f"run{number}"
        store.add_run(
            RunRecord(id=run, round_id=round_.id, method="opcd", model="tiny", knowledge=text.id, folder="/x", seed=1,
                      config={"steps": 3})
        )  # fmt: skip
        store.add_episodes([make_episode(f"t{number}", seed=number, success=True)], round_id=round_.id, run_id=run)
        store.add_checkpoint(
            CheckpointRecord(id=f"c{number}", model="tiny", path="/x", parent=None if number == 1 else "c1",
                             knowledge=text.id, round_id=round_.id, run_id=run)
        )  # fmt: skip
    store.add_episodes([make_episode("in-context", seed=13, knowledge=two.id)], round_id=second.id, stage="test")
    store.add_evaluation(
        EvaluationRecord(name="test/in_context", round_id=second.id, knowledge=two.id, env="sums", split="test", n=1,
                         successes=0, accuracy=0.0, low=0.0, high=0.8, mean_score=0.0,
                         results=(EvaluationResult(task_id="t", episode_id="in-context", success=False, score=0.0),))
    )  # fmt: skip
    store.add_evaluation(
        EvaluationRecord(name="test/bare", round_id=second.id, checkpoint="c2", env="sums", split="test", n=1,
                         successes=1, accuracy=1.0, low=0.2, high=1.0, mean_score=1.0,
                         results=(EvaluationResult(task_id="t", episode_id="e1", success=True, score=1.0),))
    )  # fmt: skip
    return one, two


@pytest.fixture
def filled(store, make_episode):
    return store, *fill(store, make_episode)


def everything(store):
    with store._read() as connection:
        return {
            name: [tuple(row) for row in connection.execute(sa.select(table).order_by(*table.primary_key.columns))]
            for name, table in Base.metadata.tables.items()
            if name != "leases"  # a lease belongs to a running process
        }


def test_lineage_goes_back_to_the_episodes(filled):
    store, *_ = filled
    found = store.lineage("c2")
    assert (found.run.id, found.training_episodes, found.training_solved) == ("run2", 1, 1)
    assert [(place.position, place.wording) for place in found.items] == [(1, "Knock first."), (2, SECRET)]
    assert [source.episode_id for source in found.items[0].sources] == ["e1", "e2"]
    assert (found.items[1].sources[0].writer, found.items[1].item.effect) == ("tiny", 0.25)
    assert [e.name for e in found.evaluations] == ["test/bare"]
    assert (found.parent.checkpoint.id, found.parent.knowledge.version, found.parent.parent) == ("c1", 1, None)
    assert [len(place.sources) for place in store.lineage("c2", sources=1).items] == [1, 1]
    assert store.lineage("c2", generations=0).parent is None
    store.add_checkpoint(CheckpointRecord(id="c3", model="tiny", path="/x", parent="gone", knowledge="gone"))
    bare = store.lineage("c3")
    assert (bare.run, bare.knowledge, bare.items, bare.parent) == (None, None, (), None)
    with pytest.raises(UnknownIdError):
        store.lineage("c9")


def test_blame_names_the_trainings_of_an_item(filled):
    store, *_ = filled
    found = store.blame("c2", item_id("Knock first."))
    assert [(level.checkpoint.id, level.items[0].position) for level in found.through] == [("c2", 1), ("c1", 1)]
    assert [source.episode_id for source in found.sources] == ["e1", "e2"]
    assert [level.checkpoint.id for level in store.blame("c2", item_id(SECRET)).through] == ["c2"]
    with pytest.raises(UnknownIdError, match="not trained on"):
        store.blame("c1", item_id(SECRET))
    with pytest.raises(UnknownIdError, match="no item"):
        store.blame("c1", "nope")


def test_forgetting_an_episode_leaves_no_trace_and_names_the_checkpoints(filled):
    store, _, two = filled
    plan = store.forget_plan("episode", "e1")
    assert (plan.episodes, plan.extractions) == (("e1", "in-context"), ("x1",))
    assert (plan.items, plan.weakened) == ((item_id(SECRET),), (item_id("Knock first."),))
    assert (plan.knowledge, plan.checkpoints, len(plan.evaluations)) == ((two.id,), ("c2",), 1)
    assert store.forget("episode", "e1", "ada", "asked to") == plan
    assert store.has_episodes(["e1", "e2", "t1", "t2", "in-context"]) == {"e2", "t1", "t2"}
    assert [(tally.episodes, tally.solved) for tally in store.tallies()] == [(3, 2)]
    assert (store.item(item_id("Knock first.")).support, store.item_rows()[0].support) == (1, 1)
    assert store.item(item_id("Knock first.")).flags == ()
    assert "4711" not in json.dumps(everything(store), default=str)
    assert [e.action for e in store.events(subject="c2")][-1] == "learned what was forgotten"
    assert store.events(action="forgotten")[0].who == "ada"
    (bare,) = store.evaluations(name="test/bare")
    assert (bare.n, bare.results[0].episode_id) == (1, None)
    assert store.episode("e2").turns[0].observation == "What is 47 + 35?"
    assert [finding for finding in store.verify() if finding.level == "error"] == []
    with pytest.raises(UnknownIdError):
        store.forget("episode", "e1", "ada", "")


def test_forgetting_an_item_keeps_the_episode_that_taught_it(filled):
    store, one, two = filled
    plan = store.forget("item", item_id("Knock first."), "ada", "wrong")
    assert (plan.items, plan.knowledge) == ((item_id("Knock first."),), tuple(sorted((one.id, two.id))))
    assert (plan.episodes, plan.checkpoints) == (("in-context",), ("c1", "c2"))
    assert store.has_episodes(["e1", "e2"]) == {"e1", "e2"}
    assert store.item(item_id(SECRET)).support == 1
    assert [finding for finding in store.verify() if finding.level == "error"] == []


def test_forgotten_bytes_leave_the_file(tmp_path, make_episode):
    path = tmp_path / "s.db"
    with Store.open(str(path)) as store:
        fill(store, make_episode)
        assert any(SECRET.encode() in file.read_bytes() for file in tmp_path.glob("s.db*"))
        store.forget("episode", "e1", "ada", "")
        assert not any(SECRET.encode() in file.read_bytes() for file in tmp_path.glob("s.db*"))


def test_a_whole_store_has_no_fault(filled):
    assert list(filled[0].verify()) == []


@pytest.mark.parametrize(
    ("statement", "kind", "problem"),
    [
        ("UPDATE texts SET body = 'forged' WHERE body LIKE 'What is 47%'", "text", "digest"),
        ("DELETE FROM texts WHERE body = '47 + 35 = 82'", "episode", "lost"),
        ("DELETE FROM turns WHERE episode_id = 'e2'", "episode", "0 of 1 turns"),
        ("UPDATE episodes SET tokens = 99 WHERE id = 'e2'", "episode", "disagree"),
        ("UPDATE episodes SET token_ids = loss_mask WHERE id = 'e2'", "episode", "tokens"),
        ("UPDATE episodes SET run_id = 'gone' WHERE id = 'e2'", "episode", "run gone is not"),
        ("UPDATE tallies SET episodes = episodes + 2", "tally", "off by +2 episodes"),
        ("UPDATE tallies SET tokens = 0", "tally", "turns, tokens or solved"),
        ("DELETE FROM tallies", "tally", "off by -5 episodes"),
        ("INSERT INTO tallies VALUES ('never', 'played', 1, 0, 1, 1, 1)", "tally", "off by +1 episodes"),
        ("UPDATE items SET text = 'forged' WHERE text LIKE 'Knock%'", "item", "its id does not match"),
        ("UPDATE items SET support = 7 WHERE text LIKE 'Knock%'", "item", "7 episodes"),
        ("UPDATE knowledge SET text = 'forged' WHERE version = 1", "knowledge", "its id does not match"),
        ("UPDATE evaluations SET successes = 1 WHERE name = 'test/in_context'", "evaluation", "says 1 of 1"),
    ],
)
def test_what_is_broken_is_found(filled, statement, kind, problem):
    store = filled[0]
    with store._write() as connection:
        connection.exec_driver_sql(statement.replace("%", "%%") if "postgres" in store.url else statement)
    errors = [finding for finding in store.verify() if finding.level == "error"]
    assert any(finding.kind == kind and problem in finding.problem for finding in errors), errors


def test_weights_played_from_elsewhere_are_only_noted(filled, make_episode):
    store = filled[0]
    store.add_episodes([make_episode("e9", seed=9, checkpoint="elsewhere")])
    (finding,) = store.verify()
    assert (finding.level, finding.id) == ("note", "e9")


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_store_goes_to_files_and_comes_back_exactly(filled, form, tmp_path, make_episode):
    store = filled[0]
    hostile = make_episode("e\ud800\0", seed=99, logprobs=[0.0, 0.0, 0.0, float("-inf"), -(2.0**-40)], error="\x1a0000")
    store.add_episodes([hostile.model_copy(update={"id": "hostile"})])
    store.note("item", "i", "seen", "ada", "a\0b", {"deep": ["\ud800"]})
    before = everything(store)
    file = io.StringIO()
    rows = store.export_parquet(tmp_path / "out") if form == "parquet" else store.export_jsonl(file)
    assert rows == {name: len(found) for name, found in before.items() if name != "tallies"}  # which follow

    def read_into(copy):
        return copy.import_parquet(tmp_path / "out") if form == "parquet" else copy.import_jsonl(io.StringIO(text))

    text = file.getvalue()
    with Store.open(str(tmp_path / "copy.db")) as copy:
        assert read_into(copy) == rows
        assert everything(copy) == before
        assert set(read_into(copy).values()) == {0}
        assert everything(copy) == before
        assert copy.create_round({}, 0, "tiny").number == 3
        assert list(copy.verify()) == list(store.verify())
    assert set(read_into(store).values()) == {0}
    assert everything(store) == before


def test_two_stores_become_one(store, tmp_path, make_episode):
    fill(store, make_episode)
    with Store.open(str(tmp_path / "other.db")) as other:
        other.create_round({}, 5, "tiny")
        other.add_episodes([make_episode("only-here", seed=77)], round_id=other.rounds()[0].id)
        version(other, other.rounds()[0].id, "Wipe your feet.")
        file = io.StringIO()
        other.export_jsonl(file)
    events = len(store.events())
    file.seek(0)
    new = store.import_jsonl(file)
    assert (new["rounds"], new["knowledge"], new["episodes"], new["items"]) == (1, 1, 1, 1)
    assert [r.number for r in store.rounds()] == [1, 2, 3]
    assert [k.version for k in store.knowledge_versions()] == [1, 2, 3]
    assert len(store.events()) == events + new["events"]
    store.note("item", "i", "seen", "ada", "")
    assert list(store.verify()) == []


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_version_below_its_parent_goes_out_and_comes_back(store, tmp_path, form):
    """Numbers with gaps: the parent's number is taken and it gets the next one, the child's is free and it keeps it."""

    def move(giver, taker, name):
        if form == "parquet":
            giver.export_parquet(tmp_path / name)
            return taker.import_parquet(tmp_path / name)
        file = io.StringIO()
        giver.export_jsonl(file)
        file.seek(0)
        return taker.import_jsonl(file)

    with Store.open(str(tmp_path / "other.db")) as other, Store.open(str(tmp_path / "third.db")) as third:
        parent = version(other, None, "Knock first.")
        between = version(other, None, "Ring the bell.")
        child = version(other, None, "Knock twice.", parent=parent.id)
        other.forget("item", between.items[0].id, "ada", "")
        taken = [version(store, None, f"Rule {number}.") for number in range(1, 5)]
        for middle in taken[1:3]:
            store.forget("item", middle.items[0].id, "ada", "")
        assert [k.version for k in store.knowledge_versions()] == [1, 4]
        move(other, store, "first")
        assert (store.knowledge(parent.id).version, store.knowledge(child.id).version) == (5, 3)
        assert store.knowledge(child.id).parent == parent.id
        assert move(store, third, "second")["knowledge"] == 4
        assert everything(third)["knowledge"] == everything(store)["knowledge"]
        assert list(third.verify()) == []


def test_a_parquet_export_that_fails_leaves_nothing_or_what_was_there(filled, tmp_path):
    store = filled[0]

    def full(name, count):
        if name == "knowledge":
            raise OSError(28, "No space left on device")

    before = set(tmp_path.iterdir())
    with pytest.raises(OSError, match="No space left"):
        store.export_parquet(tmp_path / "out", full)
    assert set(tmp_path.iterdir()) == before
    rows = store.export_parquet(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    there = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with pytest.raises(OSError, match="No space left"):
        store.export_parquet(tmp_path / "out", full)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == there
    store.note("item", "i", "seen", "ada", "")
    assert store.export_parquet(tmp_path / "out") == {**rows, "events": rows["events"] + 1}
    assert {file.name for file in (tmp_path / "out").iterdir()} == set(there)
    with Store.open(str(tmp_path / "copy.db")) as copy:
        assert copy.import_parquet(tmp_path / "out")["events"] == rows["events"] + 1


def test_what_is_no_export_is_refused_whole(filled, tmp_path):
    store = filled[0]
    file = io.StringIO()
    store.export_jsonl(file)
    lines = file.getvalue().splitlines(keepends=True)
    newer = re.sub(r"r\d{4}", "r9999", lines[0], count=1)
    with Store.open(str(tmp_path / "copy.db")) as copy:
        for bad, said in (
            ("", "no exported store"),
            ('{"a": 1}\n', "no exported store"),
            ("".join([newer, *lines[1:]]), "newer version"),
            ("".join(lines[:-1]), "cut off"),
            ("".join([*lines[:5], "not json\n"]), "line 6"),
            ("".join([*lines[:5], '{"table": "users", "id": 1}\n']), "line 6"),
            ("".join([*lines[:5], '{"table": "tallies", "env": "x"}\n']), "line 6"),
        ):
            with pytest.raises(BadStoreError, match=said):
                copy.import_jsonl(io.StringIO(bad))
            assert set(copy.all_counts().values()) == {0}
        with pytest.raises(BadStoreError, match="no exported store"):
            copy.import_parquet(tmp_path)


def test_the_nearest_id_is_suggested(store, make_episode):
    store.add_episodes([make_episode(id) for id in ("4f3a9c1122", "4f3b9c1122", "99aa00bb11")])
    for given, near in (("4f3a9d", "4f3a9c1122"), ("99ab", "99aa00bb11"), ("9f3b9c1122", "4f3b9c1122")):
        with pytest.raises(UnknownIdError, match=f"the nearest is {near}"):
            store.full_id("episode", given)
    with pytest.raises(UnknownIdError, match="engrain memory stats"):
        store.full_id("item", "4f")
    assert store.ids("episode", "4f") == ["4f3a9c1122", "4f3b9c1122"]
    assert store.ids("episode", limit=1) == ["4f3a9c1122"]


def test_tallies_and_pages(store, make_episode):
    store.add_episodes(make_episode(f"e{i}", seed=i, success=i < 2) for i in range(5))
    (tally,) = store.tallies()
    assert (tally.env, tally.split, tally.episodes, tally.solved, tally.turns) == ("sums", "train", 5, 2, 5)
    assert store.add_episodes([make_episode("e1", seed=1, success=True), make_episode("e9", seed=9)]) == 1
    assert store.tallies()[0] == tally.model_copy(
        update={"episodes": 6, "turns": 6, "tokens": tally.tokens // 5 * 6, "sampled": tally.sampled // 5 * 6}
    )
    store.forget("episode", "e9", "ada", "")
    assert store.tallies() == [tally]
    assert (store.counts()["episode"], store.all_counts()["turn"]) == (5, 5)
    assert store.size() > 10_000
    first = store.episode_rows(newest_first=True, limit=2)
    second = store.episode_rows(newest_first=True, limit=2, before=first[-1].id)
    assert [row.id for row in (*first, *second)] == ["e4", "e3", "e2", "e1"]
    assert store.episode_rows(newest_first=True, before="e0") == []
    for row in store.episode_rows():
        store.forget("episode", row.id, "ada", "")
    assert store.tallies() == []


def test_a_version_of_the_knowledge_can_be_restored(filled):
    store, one, two = filled
    assert store.restore_knowledge(one.id, "ada", "the secret must go") == [item_id(SECRET)]
    assert {row.text: row.status for row in store.item_rows()} == {"Knock first.": "active", SECRET: "retired"}
    assert store.restore_knowledge(two.id, "ada", "back") == [item_id(SECRET)]
    assert store.events(subject=item_id(SECRET))[-1].detail == {"before": "retired"}
    assert store.knowledge_holding(item_id(SECRET)) == [(two.id, 2)]
