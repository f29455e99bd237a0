import json

import pytest
from typer.testing import CliRunner

from agent.episode import SamplingParams
from engrain.cli.memory import app
from envs.errors import UsageError
from memory.curate import admit
from memory.extract import Extractor
from memory.prompts import MARKER
from memory.records import (
    CheckpointRecord,
    EvaluationRecord,
    ItemEffect,
    Knowledge,
    KnowledgeItem,
    RunRecord,
    digest,
)
from memory.render import compose
from memory.store import Store
from tests.engrain.furnished import furnish


@pytest.fixture
def filled(tmp_path, make_episode, queue_engine, tiny_tokenizer):
    """A store with one of everything, and what is in it."""
    path = str(tmp_path / "filled.db")
    with Store.open(path) as store:
        round_ = store.create_round({"world": "sums"}, 7, "tiny")
        hostile = "[red]markup[/red] \x1b[2J\x07"
        episodes = [
            make_episode("abc1", turns=[("first?", hostile), ("second?", "b")]),
            make_episode("xyz9", success=True),
        ]
        store.add_episodes(episodes, round_id=round_.id, stage="play")
        extractor = Extractor(queue_engine([f"{MARKER} Knock [first]."]), sampling=SamplingParams(max_tokens=9))
        for extraction in extractor.extract(episodes[:1], 0):
            store.add_extraction(extraction, round_.id)
            items = admit(store, [extraction], round_.id)
        knowledge = store.add_knowledge(compose(items, 999, tiny_tokenizer), round_.id)
        store.add_checkpoint(CheckpointRecord(id="ckpt", model="tiny", path="/x", round_id=round_.id))
        store.add_evaluation(
            EvaluationRecord(
                name="bare",
                round_id=round_.id,
                knowledge=knowledge.id,
                env="sums",
                split="test",
                n=4,
                successes=1,
                accuracy=0.25,
                low=0.05,
                high=0.7,
                mean_score=0.25,
            )
        )
    return path, items[0], knowledge, round_


def run(*args, path=None):
    result = CliRunner().invoke(app, [*args, *(["--store", path] if path else [])], env={"COLUMNS": "250"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def output(*args, path):
    result = run(*args, path=path)
    assert result.exit_code == 0, result.output
    return result.output


def data(*args, path):
    return json.loads(output(*args, "--json", path=path))


def test_list_is_the_default(filled):
    path, item, knowledge, round_ = filled
    for noun, expected in (
        ("episodes", {"abc1", "xyz9"}),
        ("items", {item.id}),
        ("knowledge", {knowledge.id}),
        ("rounds", {round_.id}),
    ):
        assert {row["id"] for row in data(noun, path=path)} == expected
        assert data(noun, path=path) == data(noun, "list", path=path)
        assert all(id_[:10] in output(noun, path=path) for id_ in expected)


def test_filters_and_limit(filled):
    path, *_ = filled
    assert [r["id"] for r in data("episodes", "--solved", path=path)] == ["xyz9"]
    assert [r["id"] for r in data("episodes", "list", "--failed", "--round", "1", path=path)] == ["abc1"]
    assert len(data("episodes", "--limit", "1", path=path)) == 1
    assert data("episodes", "--env", "other", path=path) == []
    assert "no episodes" in output("episodes", "--stage", "other", path=path)
    assert data("items", "--status", "retired", path=path) == []
    assert len(data("episodes", "--checkpoint", "", "--knowledge", "", path=path)) == 2


def test_an_episode_is_replayed_and_cannot_drive_the_terminal(filled):
    path, *_ = filled
    shown = output("episodes", "show", "abc", path=path)
    assert shown.index("first?") < shown.index("[red]markup[/red]") < shown.index("second?")
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "Knock [first]." in shown
    assert data("episodes", "show", "abc1", path=path)["turns"][1]["action"] == "b"


def test_the_others_are_shown(filled):
    path, item, knowledge, round_ = filled
    assert data("items", "show", item.id[:6], path=path)["sources"][0]["episode_id"] == "abc1"
    assert "abc1" in output("items", "show", item.id, path=path)
    for name in ("1", knowledge.id[:7]):
        assert data("knowledge", "show", name, path=path)["text"] == knowledge.text
    assert "- Knock [first]." in output("knowledge", "show", "1", path=path)
    shown = data("rounds", "show", "1", path=path)
    assert shown["id"] == round_.id
    assert [e["name"] for e in shown["evaluations"]] == ["bare"]
    assert [c["id"] for c in shown["checkpoints"]] == ["ckpt"]
    assert "0.250" in output("rounds", "show", round_.id, path=path)


@pytest.mark.parametrize("noun", ["episodes", "items", "knowledge", "rounds"])
def test_what_is_unknown_is_a_usage_error(filled, noun):
    with pytest.raises(UsageError, match="nope"):
        run(noun, "show", "nope", path=filled[0])
    assert run(noun, "--help").exit_code == 0
    assert run(noun, "wrong-command", path=filled[0]).exit_code == 2


def test_bad_values_are_usage_errors(filled, tmp_path):
    with pytest.raises(UsageError, match="no item status 'new'"):
        run("items", "--status", "new", path=filled[0])
    with pytest.raises(UsageError, match="no store at"):
        run("items", path=str(tmp_path / "nothing.db"))


def test_the_store_may_be_named_by_the_environment(filled, monkeypatch):
    monkeypatch.setenv("ENGRAIN_STORE", filled[0])
    assert len(json.loads(run("rounds", "--json").output)) == 1


def test_the_default_store_is_that_of_the_settings(engrain_home):
    pytest.importorskip("engrain.settings")
    with pytest.raises(UsageError, match="no store at"):
        run("rounds")


@pytest.fixture
def lived(filled, make_episode, tmp_path):
    """The filled store with a second knowledge version, a training run, test evaluations and weights on disk."""
    path, item, knowledge, round_ = filled
    with Store.open(path) as store:
        other = store.add_item("Wipe your feet.")
        store.record_effect(
            ItemEffect(
                item_id=item.id,
                method="leave-one-out",
                env="sums",
                split="validation",
                effect=0.2,
                low=0.1,
                high=0.3,
                n=9,
            )
        )
        body = f"{knowledge.text}\n- {other.text}"
        places = (*knowledge.items, KnowledgeItem(id=other.id, text=other.text))
        second = store.add_knowledge(
            Knowledge(id=digest(body), items=places, text=body, tokens=50), parent=knowledge.id
        )
        run = RunRecord(
            id="run1",
            round_id=round_.id,
            method="opcd",
            model="tiny",
            knowledge=knowledge.id,
            folder="/",
            seed=0,
            config={},
        )
        store.add_run(run)
        store.add_episodes([make_episode("train1", seed=5)], round_id=round_.id, stage="train", run_id="run1")
        store.add_checkpoint(
            CheckpointRecord(id="taught", model="tiny", path=str(tmp_path / "gone"), knowledge=knowledge.id,
                             parent="ckpt", run_id="run1", manifest={"step": 3})
        )  # fmt: skip
        store.promote("taught")
        for name, accuracy in (("bare", 0.25), ("in_context", 0.75), ("distilled", 0.5)):
            fields = {"successes": round(4 * accuracy), "accuracy": accuracy, "low": accuracy - 0.2, "mean_score": 0.5}
            store.add_evaluation(
                EvaluationRecord(name=f"test/{name}", round_id=round_.id, checkpoint="taught", env="sums", split="test",
                                 n=4, high=accuracy + 0.2, **fields)
            )  # fmt: skip
    return path, item, other, knowledge, second


def test_the_overview_is_one_screen(lived):
    path, *_ = lived
    shown = output(path=path)
    assert len(shown.splitlines()) <= 40
    for words in (
        "sums",
        "33%",
        "Knock [first].",
        "+0.20 (+0.10 to +0.30)",
        "distilled 0.50",
        "tiny with checkpoint taught",
    ):
        assert words in shown, words
    found = data(path=path)
    assert found["episodes"][0]["episodes"] == 3
    assert found["checkpoints"] == {"tiny": "taught"}
    assert found["rounds"][0]["in_context"]["accuracy"] == 0.75
    assert "Knock" in run("--store", path, "items").output


def test_items_are_searched_sorted_edited_retired_and_restored(lived):
    path, item, other, *_ = lived
    assert [i["text"] for i in data("items", "search", "FEET", path=path)] == ["Wipe your feet."]
    assert [i["id"] for i in data("items", "--by", "effect", path=path)] == [item.id, other.id]
    assert data("items", "show", "feet", path=path)["knowledge"][0]["version"] == 2
    assert "leave-one-out" in output("items", "show", item.id, path=path)
    retired = data("items", "retire", item.id[:8], "--who", "ada", "--why", "wrong", path=path)
    assert retired["status"] == "retired"
    assert data("items", "restore", item.id[:8], "--who", "ada", path=path)["status"] == "active"
    events = data("items", "show", item.id, path=path)["events"]
    assert [(e["who"], e["action"]) for e in events[-2:]] == [("ada", "retired"), ("ada", "active")]
    edited = data("items", "edit", other.id, "--text", "Wipe  both feet.", path=path)
    assert (edited["text"], edited["derived_from"]) == ("Wipe both feet.", other.id)
    with pytest.raises(UsageError, match="unchanged"):
        run("items", "edit", edited["id"], "--text", "Wipe both feet.", path=path)


def test_versions_of_the_knowledge_are_compared_printed_and_restored(lived):
    path, _, other, _, second = lived
    found = data("knowledge", "diff", "1", "2", path=path)
    assert ([i["id"] for i in found["gained"]], found["lost"]) == ([other.id], [])
    assert "+- Wipe your feet." in output("knowledge", "diff", "1", "2", path=path)
    assert output("knowledge", "show", "2", "--as-prompt", path=path) == second.text + "\n"
    assert data("knowledge", "restore", "1", "--yes", path=path)["changed"] == [other.id]
    assert run("knowledge", "restore", "2", path=path).exit_code == 1  # asked, and no answer came


def test_lineage_and_blame_reach_the_episodes(lived):
    path, item, other, *_ = lived
    shown = output("lineage", "tau", path=path)
    for words in (
        "run run1",
        "step 3, 1 episodes played",
        "knowledge version 1",
        "Knock [first].",
        "episode abc1",
        "ckpt",
    ):
        assert words in shown, words
    with Store.open(path) as store:
        store.add_checkpoint(CheckpointRecord(id="later", model="tiny", path="/x", parent="taught", run_id="run2"))
    shown = output("lineage", "later", path=path)
    assert "knowledge version 1" in shown
    assert ", 1 items" in shown  # how many, and not which: that is said of the checkpoint itself
    assert "abc1" not in shown
    assert "abc1" in output("lineage", "later", "--all", path=path)
    assert data("lineage", "later", path=path)["parent"]["items"]
    found = data("lineage", "taught", path=path)
    assert found["items"][0]["sources"][0]["episode_id"] == "abc1"
    assert found["parent"]["checkpoint"]["id"] == "ckpt"
    shown = output("blame", "taught", "knock", path=path)
    assert "line 1 of knowledge version 1" in shown
    assert "episode abc1" in shown
    assert data("blame", "taught", item.id, path=path)["through"][0]["run"]["id"] == "run1"
    with pytest.raises(UsageError, match="not trained on"):
        run("blame", "taught", other.id, path=path)


def test_the_learning_curve_is_shown_and_drawn(lived, tmp_path):
    path = lived[0]
    picture = tmp_path / "new" / "curve.png"
    shown = output("rounds", "--png", str(picture), path=path)
    assert "in_context" in shown
    assert "█" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert data("rounds", path=path)[0]["test"]["distilled"]["accuracy"] == 0.5
    assert data("rounds", "show", "1", path=path)["runs"][0]["id"] == "run1"
    with pytest.raises(UsageError, match="cannot be written"):
        run("rounds", "--png", str(tmp_path / "curve.nonsense"), path=path)


def test_stats_count_everything(lived):
    found = data("stats", path=lived[0])
    assert (found["counts"]["episode"], found["counts"]["turn"], found["counts"]["run"]) == (3, 4, 1)
    assert "bytes a turn" in output("stats", path=lived[0])


@pytest.mark.parametrize("name", ["copy.jsonl", "folder"])
def test_export_and_import(lived, tmp_path, name):
    path, out, copy = lived[0], tmp_path / name, str(tmp_path / "copy.db")
    rows = json.loads(run("export", str(out), "--json", path=path).output)["rows"]
    with pytest.raises(UsageError, match="--force"):
        run("export", str(out), path=path)
    assert json.loads(run("import", str(out), "--json", path=copy).output)["new"] == rows
    assert data("lineage", "taught", path=copy) == data("lineage", "taught", path=path)
    with pytest.raises(UsageError, match="cannot be read"):
        run("import", str(tmp_path / "nothing"), path=copy)


def test_an_export_may_go_into_the_folder_one_is_in(lived, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    rows = json.loads(run("export", ".", "--force", "--json", path=lived[0]).output)["rows"]
    assert json.loads(run("import", ".", "--json", path=str(tmp_path / "copy.db")).output)["new"] == rows


def test_an_export_that_is_broken_off_leaves_no_draft(lived, tmp_path, monkeypatch):
    def interrupted(self, file, progress=None):
        file.write("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "export_jsonl", interrupted)
    before = set(tmp_path.iterdir())
    assert run("export", str(tmp_path / "out.jsonl"), path=lived[0]).exit_code != 0
    assert set(tmp_path.iterdir()) == before


def test_forgetting_asks_and_names_the_checkpoints(lived):
    path, item, *_ = lived
    asked = run("forget", "abc1", path=path)
    assert asked.exit_code == 1
    assert "checkpoint taught (promoted) was trained on it" in asked.output
    assert data("forget", "abc1", "--dry-run", path=path)["deleted"] is False
    assert len(data("episodes", path=path)) == 3
    found = data("forget", "abc1", "--yes", path=path)
    assert (found["episodes"], found["items"], found["checkpoints"]) == (["abc1"], [item.id], ["taught"])
    assert len(data("episodes", path=path)) == 2
    with pytest.raises(UsageError, match="no episode 'abc1'"):
        run("forget", "abc1", "--yes", path=path)


def test_verify_finds_what_is_wrong_with_the_store_and_the_weights(lived):
    path = lived[0]
    result = run("verify", "--json", path=path)
    found = json.loads(result.output)
    assert result.exit_code == 1
    assert [(f["id"], f["level"]) for f in found["findings"]] == [("ckpt", "note"), ("taught", "error")]
    with Store.open(path) as store:
        store.set_checkpoint_status("taught", "rejected", "ada", "gone")
    assert run("verify", path=path).exit_code == 0


def test_the_nearest_id_is_named_and_ids_complete(lived, monkeypatch):
    path = lived[0]
    with pytest.raises(UsageError, match="the nearest is abc1"):
        run("episodes", "show", "abd1", path=path)
    with pytest.raises(UsageError, match="the nearest is taught"):
        run("lineage", "tought", path=path)
    monkeypatch.setenv("ENGRAIN_STORE", path)
    words = {"COMP_WORDS": "root lineage ta", "COMP_CWORD": "2", "_ROOT_COMPLETE": "complete_bash"}
    assert "taught" in CliRunner().invoke(app, [], env=words, prog_name="root").output
    monkeypatch.setenv("ENGRAIN_STORE", path + ".nothing")
    assert CliRunner().invoke(app, [], env=words, prog_name="root").output.strip() == ""


def test_a_long_list_goes_on_where_it_ended(lived):
    path = lived[0]
    first = data("episodes", "-n", "2", path=path)
    (last,) = data("episodes", "-n", "2", "--before", first[-1]["id"], path=path)
    assert last["id"] not in {row["id"] for row in first}
    assert f"--before {first[-1]['id']}" in output("episodes", "-n", "2", path=path)
    assert "--offset 1" in output("items", "-n", "1", path=path)


@pytest.mark.parametrize("width", [80, 100, 250])
def test_a_table_keeps_its_texts_and_ids_on_any_screen(lived, width):
    path, item, *_ = lived
    shown = CliRunner().invoke(app, ["items", "--store", path], env={"COLUMNS": str(width)}).output
    assert all(len(line) <= width for line in shown.splitlines())
    for words in (item.id[:10], "Knock", "[first].", "active", "+0.20"):
        assert words in shown, (words, shown)
    assert ("last learned" in shown) == (width > 80)


def test_marks_give_way_before_ids_and_statuses_are_cut(tmp_path):
    path = str(tmp_path / "furnished.db")
    with Store.open(path) as store:
        furnish(store)
        ids = [item.id[:10] for item in store.items()]
    for width in (80, 100):
        shown = CliRunner().invoke(app, ["items", "--store", path], env={"COLUMNS": str(width)}).output
        assert all(id_ in shown for id_ in ids)
        assert "active" in shown
        assert ("marks" in shown) == (width > 80)
