"""What may be removed, and what must not be."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from engrain import settings
from engrain.retention import plan, prune
from memory.records import CheckpointRecord, CheckpointStatus, RoundStatus, now
from memory.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with Store.open(str(tmp_path / "s.db")) as opened:
        yield opened


def folder(path: Path, size: int = 1000) -> Path:
    path.mkdir(parents=True)
    (path / "manifest.json").write_text("{}")
    (path / "adapter_model.safetensors").write_bytes(b"x" * (size - 2))
    return path


@pytest.fixture
def history(store: Store) -> dict[str, Path]:
    """Rounds 1 to 6; a is promoted, b comes from a and is rejected, c from b is rolled back, d from a is promoted."""
    found = {}
    plans = [("a", None, "promoted"), ("b", "a", "rejected"), ("c", "b", "rolled_back"), ("d", "c", "promoted"),
             ("e", "d", "rejected"), ("f", "d", "rejected")]  # fmt: skip
    for age, (name, parent, status) in enumerate(plans):
        record = store.create_round({}, 0, "tiny")
        run = settings.runs_dir() / f"round-{record.id}"
        found[name] = folder(run / "step-000004")
        found[f"{name}-left"] = folder(run / "step-000002")
        store.add_checkpoint(
            CheckpointRecord(
                id=name, model="tiny", path=str(found[name]), parent=parent, round_id=record.id,
                created_at=now() - timedelta(days=10 - age),
            )
        )  # fmt: skip
        store.set_checkpoint_status(name, CheckpointStatus(status))
        store.update_round(record.id, status=RoundStatus.FINISHED)
    return found


def reasons(retention: Any) -> dict[str, tuple[bool, str]]:
    return {f.checkpoint: (f.keep, f.reason) for f in retention.folders if f.checkpoint}


def test_promoted_ones_their_ancestors_and_the_newest_others_stay(store: Store, history: dict[str, Path]) -> None:
    found = reasons(plan(store, keep=1))
    assert found["a"] == (True, "promoted")
    assert found["d"] == (True, "current")
    assert found["c"] == (True, "parent of d")
    assert found["b"] == (True, "parent of c")
    assert found["f"] == (True, "one of the last 1")
    assert found["e"] == (False, "rejected, not one of the last 1")


def test_what_goes_is_gone_and_the_books_say_so(store: Store, history: dict[str, Path]) -> None:
    retention = plan(store, keep=0)
    prune(store, retention)
    gone = {name for name, path in history.items() if not path.exists()}
    assert gone == {"e", "f", "a-left", "b-left", "c-left", "d-left", "e-left", "f-left"}
    assert retention.freed_bytes == 8000
    assert retention.kept_bytes == 4000
    (event,) = store.events(subject="e", action="pruned")
    assert event.detail == {"path": str(history["e"]), "bytes": 1000}
    assert store.checkpoint("e").status is CheckpointStatus.REJECTED
    assert not any(f.checkpoint in ("e", "f") for f in plan(store, keep=0).folders)
    prune(store, plan(store, keep=0))
    assert len(store.events(action="pruned")) == 2


def test_the_budget_takes_the_oldest_of_the_others_first_and_never_what_is_needed(
    store: Store, history: dict[str, Path]
) -> None:
    found = reasons(plan(store, keep=3, budget=5500))
    assert found["f"][0]
    assert found["e"] == (False, "over the disk budget")
    tight = plan(store, keep=3, budget=100)
    assert tight.over_budget
    assert {id_ for id_, (keep, _) in reasons(tight).items() if keep} == {"a", "b", "c", "d"}


def test_an_unfinished_round_loses_nothing(store: Store, history: dict[str, Path]) -> None:
    record = store.create_round({}, 0, "tiny")
    store.update_round(record.id, state={"parent": "e", "consolidate": {"checkpoint": "f"}})
    half = folder(settings.runs_dir() / f"round-{record.id}" / "step-000002")
    stranger = folder(settings.runs_dir() / "round-of-another-store" / "step-000002")
    elsewhere = folder(settings.home() / "mine" / "step-000001")
    store.add_checkpoint(CheckpointRecord(id="saved", model="tiny", path=str(elsewhere)))
    retention = plan(store, keep=0)
    prune(store, retention)
    assert half.exists()
    assert stranger.exists()
    assert elsewhere.exists()
    assert reasons(retention)["e"] == (True, "round 7 is unfinished and began with it")
    assert reasons(retention)["f"] == (True, "round 7 is unfinished and made it")


def test_a_removal_that_was_cut_is_completed(store: Store, history: dict[str, Path]) -> None:
    cut = history["a"].with_name(".step-000002.removed")
    history["a-left"].replace(cut)
    prune(store, plan(store, keep=3))
    assert not cut.exists()


def test_the_command_shows_first_and_removes_then(store: Store, history: dict[str, Path]) -> None:
    import json

    from typer.testing import CliRunner

    import engrain.cli as shell

    words = ["checkpoints", "prune", "--keep", "1", "--store", str(store.url).removeprefix("sqlite:///"), "--json"]
    dry = CliRunner().invoke(shell.app, [*words, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    facts = json.loads(dry.stdout)
    assert (facts["freed_bytes"], facts["dry_run"]) == (7000, True)
    assert history["e"].exists()
    assert CliRunner().invoke(shell.app, words).exit_code == 0
    assert not history["e"].exists()
    listed = CliRunner().invoke(shell.app, ["checkpoints", "list", "--json", *words[4:6]])
    rows = {row["id"]: row for row in json.loads(listed.stdout)}
    assert (rows["d"]["current"], rows["d"]["on_disk"], rows["e"]["on_disk"]) == (True, True, False)
    bad = CliRunner().invoke(shell.app, [*words[:2], "--disk-budget", "much", *words[4:6]])
    assert bad.exit_code == 2
    assert "'much' is no size" in bad.stderr


def test_a_folder_that_goes_while_it_is_looked_at_is_no_fault(
    store: Store, history: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where `checkpoints prune` runs beside a loop that prunes as well."""
    stat, gone = Path.stat, history["a-left"] / "adapter_model.safetensors"

    def racing(path: Path, **options: Any) -> Any:
        if path == gone:
            path.unlink(missing_ok=True)
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", racing)
    found = plan(store, keep=0)
    monkeypatch.undo()
    assert next(f.bytes for f in found.folders if f.path == str(history["a-left"])) == 2
    shutil.rmtree(history["e"])
    prune(store, found)
    assert not history["f"].exists()
