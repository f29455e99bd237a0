"""Going back to an earlier checkpoint: which one, what else follows, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import engrain.cli as shell
from engrain import settings
from engrain.config import ImproveConfig, WorldSpec
from engrain.lease import LoopLease
from engrain.loop import Round
from engrain.retention import plan
from engrain.rounds import open_round
from engrain.weigh import Change
from memory.records import CheckpointRecord, CheckpointStatus, ItemStatus, RoundStatus
from memory.store import Store


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Rounds 1 to 4 promoted `one`, rejected `two`, promoted `three` and `four`; `three` absorbed an item."""
    url = str(tmp_path / "s.db")
    with Store.open(url) as store:
        for name, status in (("one", "promoted"), ("two", "rejected"), ("three", "promoted"), ("four", "promoted")):
            record = store.create_round({}, 0, "tiny")
            folder = settings.runs_dir() / f"round-{record.id}" / "step-000004"
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text("{}")
            store.add_checkpoint(CheckpointRecord(id=name, model="tiny", path=str(folder), round_id=record.id))
            store.set_checkpoint_status(name, CheckpointStatus(status))
            absorbed = []
            if name == "three":
                item = store.add_item("Look both ways.", status=ItemStatus.ABSORBED, who="engrain", why="test")
                change = Change(item=item.id, status=ItemStatus.ABSORBED, why="known")
                absorbed = [change.model_dump(mode="json")]
            store.update_round(record.id, status=RoundStatus.FINISHED, state={"absorb": absorbed})
    return url


def rollback(url: str, *words: str) -> Any:
    return CliRunner().invoke(shell.app, ["rollback", "--store", url, *words])


def current(url: str) -> str | None:
    with Store.open(url) as store:
        found = store.current_checkpoint("tiny")
        return found.id if found else None


def test_step_by_step_back_to_the_base_model(url: str) -> None:
    assert current(url) == "four"
    for expected in ("three", "one", None):
        done = rollback(url, "--json", "--reason", "it rambles", "--who", "Ada")
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["now"] == expected
        assert current(url) == expected
    again = rollback(url)
    assert again.exit_code == 2
    assert "is promoted: there is nothing to go back from" in " ".join(again.output.split())
    with Store.open(url) as store:
        event = store.events(subject="four", action="rolled_back")[-1]
        assert (event.who, event.why) == ("Ada", "back to checkpoint three: it rambles")


def test_to_a_named_one_past_those_promoted_later_and_forward_again(url: str) -> None:
    done = json.loads(rollback(url, "on", "--json").stdout)  # the beginning of an id is enough
    assert (done["before"], done["now"], done["rolled_back"]) == ("four", "one", ["four", "three"])
    with Store.open(url) as store:
        (item,) = store.items()
        assert done["items"] == [item.id]
        assert item.status is ItemStatus.ACTIVE  # the weights that play now do not know it
        needed = {f.checkpoint: f.reason for f in plan(store, keep=0).folders if f.keep}
        assert needed == {"one": "current"}
    assert rollback(url, "three").exit_code == 0
    assert current(url) == "three"
    assert rollback(url).exit_code == 0
    assert current(url) == "one"


def test_the_next_round_begins_with_it_and_an_unfinished_one_is_given_up(url: str, tmp_path: Path) -> None:
    config = ImproveConfig(model="tiny", world=WorldSpec(env="math"))
    with Store.open(url) as store:
        begun = open_round(store, config)
        assert Round(store, Any, config, begun, tmp_path, Any).parent.id == "four"  # type: ignore[arg-type]
    done = rollback(url)
    assert done.exit_code == 0
    assert "round 5, which was unfinished, is given up" in done.output
    with Store.open(url) as store:
        assert store.round(begun.id).status == RoundStatus.STOPPED
        following = open_round(store, config)
        assert following.id != begun.id
        parent = Round(store, Any, config, following, tmp_path, Any).parent  # type: ignore[arg-type]
        assert parent is not None
        assert parent.id == "three"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nine"], "no checkpoint 'nine'"),
        (["two"], "checkpoint two was never promoted (rejected); pass --force"),
        (["four"], "checkpoint four is current already"),
        (["three", "--model", "other"], "checkpoint three is of tiny, not other"),
        (["--model", "other"], "other plays without a checkpoint"),
    ],
)
def test_what_cannot_be_is_one_line_and_changes_nothing(url: str, words: list[str], line: str) -> None:
    done = rollback(url, *words)
    assert done.exit_code == 2
    assert line in " ".join(done.output.split())
    assert "Traceback" not in done.output
    assert current(url) == "four"


def test_weights_that_are_gone_are_named(url: str) -> None:
    with Store.open(url) as store:
        folder = Path(store.checkpoint("three").path)
    (folder / "manifest.json").unlink()
    done = rollback(url)
    assert done.exit_code == 2
    assert f"the weights of checkpoint three are gone from {folder}" in " ".join(done.output.split())
    assert current(url) == "four"


def test_force_takes_what_the_gate_refused(url: str) -> None:
    assert rollback(url, "two", "--force").exit_code == 0
    assert current(url) == "two"
    with Store.open(url) as store:
        assert store.checkpoint("four").status is CheckpointStatus.ROLLED_BACK
        assert store.checkpoint("three").status is CheckpointStatus.PROMOTED


def test_it_waits_for_no_loop_but_refuses(url: str) -> None:
    with Store.open(url) as store, LoopLease(store, "tiny"):
        done = rollback(url)
        assert done.exit_code == 2
        assert f"another loop improves tiny in {url}" not in done.output  # the store's full URL is named
        assert f"process {os.getpid()}" in done.output
    assert current(url) == "four"


def test_several_models_must_be_told_apart(url: str) -> None:
    with Store.open(url) as store:
        store.add_checkpoint(CheckpointRecord(id="else", model="another", path="."))
        store.promote("else")
    done = rollback(url)
    assert done.exit_code == 2
    assert "pass --model another or tiny" in " ".join(done.output.split())
