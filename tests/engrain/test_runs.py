"""A training outside any round stands in the store as one of a round does: lineage and blame walk it back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engrain.cli import app
from engrain.retention import plan, prune
from memory.normalise import item_id
from memory.records import KnowledgeItem, RoundStatus
from memory.render import compose
from memory.store import Store

TEXT = "Answer briefly."
SIZES = ("--steps", "2", "--batch-size", "2", "--max-tokens", "4", "--validation", "0", "-n", "4", "--rank", "2")


def run(*words: str):
    return CliRunner().invoke(app, words)


def facts(*words: str):
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def distil(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.txt").write_text(TEXT)

    def go(out: str, *words: str, knowledge: str = "rules.txt"):
        return facts("distill", "math", "-k", knowledge, "--out", out, "-m", str(tiny_folder), *SIZES, *words)

    return go


def test_the_default_store_knows_run_text_episodes_and_checkpoint(distil, engrain_home: Path, tmp_path: Path) -> None:
    done = distil("here/run")
    lineage = facts("memory", "lineage", done["id"])
    assert lineage["checkpoint"]["path"] == str((tmp_path / "here/run/step-000002").resolve())
    assert lineage["knowledge"]["text"] == TEXT
    assert lineage["knowledge"]["tokens"] == len(TEXT)  # the tiny tokenizer has one token a byte
    assert (lineage["run"]["id"], lineage["run"]["status"]) == (done["run"], RoundStatus.FINISHED.value)
    assert [step["step"] for step in lineage["run"]["metrics"]] == [1, 2]
    assert lineage["run"]["config"]["given"]["env"] == "math"
    assert lineage["training_episodes"] == 4
    assert f"run {done['run'][:10]} opcd" in run("memory", "lineage", done["id"]).stdout

    with Store.open(str(engrain_home / "engrain.db")) as store:
        before, events = store.counts(), len(store.events())
    distil("here/run")  # done is done
    refused = run(
        "distill", "math", "-k", "rules.txt", "--out", "here/run", "-m", lineage["run"]["model"], *SIZES, "--seed", "5"
    )
    assert refused.exit_code == 2
    distil("there/run")  # the same name in another place, the same episodes: a run of its own
    with Store.open(str(engrain_home / "engrain.db")) as store:
        assert len(store.runs()) == 2
        after = store.counts()
        assert after["episode"] == 2 * before["episode"]
        assert after["checkpoint"] == before["checkpoint"]  # the same weights from the same text
        assert [found for found in store.verify() if found.level == "error"] == []
        assert store.arrivals("math") == 0  # nothing that a loop waits for
        assert len(store.events()) == events + 2  # the second run began and ended


def test_a_child_of_a_stored_text_is_blamed_on_its_items(distil, tmp_path: Path) -> None:
    class Bytes:
        def __call__(self, text, add_special_tokens):
            return {"input_ids": list(text.encode())}

    items = [KnowledgeItem(id=item_id(text), text=text) for text in ("Answer in one word.", "Count twice.")]
    with Store.open(str(tmp_path / "own.db")) as store:
        version = store.add_knowledge(compose(items, 1000, Bytes())).version
    own = ("--store", str(tmp_path / "own.db"))
    parent = distil("parent", *own)
    child = distil("child", *own, "--parent", parent["id"], knowledge=str(version))
    lineage = facts("memory", "lineage", child["id"], *own)
    assert [place["wording"] for place in lineage["items"]] == [item.text for item in items]
    assert lineage["parent"]["checkpoint"]["id"] == parent["id"]
    assert lineage["parent"]["knowledge"]["text"] == TEXT
    blame = facts("memory", "blame", child["id"], items[0].id, *own)
    assert [level["checkpoint"]["id"] for level in blame["through"]] == [child["id"]]
    assert run("memory", "blame", parent["id"], items[0].id, *own).exit_code == 2


def test_weights_made_twice_are_found_where_they_still_are(distil, engrain_home: Path, tmp_path: Path) -> None:
    first, second = (distil(str(tmp_path / name)) for name in ("first", "second"))
    assert second["id"] == first["id"]
    with Store.open(str(engrain_home / "engrain.db")) as store:
        assert store.checkpoint(first["id"]).path == first["checkpoint"]  # they are there
        shutil.rmtree(first["checkpoint"])
        third = distil(str(tmp_path / "third"))
        assert third["id"] == first["id"]
        assert store.checkpoint(first["id"]).path == third["checkpoint"]
        (event,) = store.events(subject=first["id"], action="moved")
        assert event.detail == {"before": first["checkpoint"], "path": third["checkpoint"]}
        assert [found for found in store.verify() if found.level == "error"] == []


def test_a_run_on_stored_episodes_adds_none(distil, engrain_home: Path) -> None:
    distil("first")
    with Store.open(str(engrain_home / "engrain.db")) as store:
        before = store.counts()["episode"]
    words = ("--from-episodes", "--method", "mixed")
    second = distil("second", *words)
    assert distil("second", *words)["id"] == second["id"]
    with Store.open(str(engrain_home / "engrain.db")) as store:
        assert store.counts()["episode"] == before
    lineage = facts("memory", "lineage", second["id"])
    assert lineage["run"]["config"]["given"]["episodes"]
    assert lineage["training_episodes"] == 0


def test_what_somebody_trained_by_hand_is_not_cleared_away(distil, engrain_home: Path) -> None:
    done = distil(str(engrain_home / "runs" / "mine"))
    with Store.open(str(engrain_home / "engrain.db")) as store:
        (kept,) = plan(store, keep=0).folders
        prune(store, plan(store, keep=0))
    assert (kept.checkpoint, kept.keep) == (done["id"], True)
    assert Path(done["checkpoint"]).is_dir()
