"""Trackers get every number of every step: real TensorBoard, read back from its file, and stand-ins for the others."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from distill.errors import DistillConfigError
from distill.monitor import StepMetrics
from distill.trackers import TRACKERS, open_trackers

SCORES = {0: 0.25, 2: 0.5, 4: 0.75}


def test_tensorboard_holds_every_number_of_every_step(make_trainer) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer()
    with open_trackers(["tensorboard"], trainer.folder, trainer.config.model_dump()) as tracker:
        result = trainer.fit(validate=SCORES.__getitem__, tracker=tracker)
    events = EventAccumulator(str(trainer.folder / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    numbers = {name for name, field in StepMetrics.model_fields.items() if field.annotation is not str} - {"step"}
    assert {f"train/{name}" for name in numbers} | {"validation/score"} == tags
    for name in numbers:
        logged = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert logged == [(m.step, pytest.approx(getattr(m, name), rel=1e-6)) for m in result.history]
    assert [(event.step, event.value) for event in events.Scalars("validation/score")] == list(SCORES.items())
    assert "train/objective/text_summary" in events.Tags()["tensors"]


class Board:
    """What wandb and trackio look like from Accelerate: a module with init and config, and a run."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.started: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}
        self.finished = False

    def module(self, name: str) -> types.ModuleType:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.init = lambda **given: self.started.update(given) or self  # type: ignore[attr-defined]
        module.config = types.SimpleNamespace(update=lambda values, **_: self.settings.update(values))  # type: ignore[attr-defined]
        return module

    def log(self, values: dict[str, Any], step: int, **_: Any) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_others_are_told_the_same(make_trainer, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    board = Board()
    monkeypatch.setitem(sys.modules, name, board.module(name))
    trainer = make_trainer(steps=2)
    with open_trackers([name], trainer.folder, trainer.config.model_dump()) as tracker:
        result = trainer.fit(validate=SCORES.__getitem__, tracker=tracker)
        assert not board.finished
    assert board.finished
    assert board.started == {"project": "engrain", "name": "run"}
    assert (board.settings["steps"], board.settings["lora.rank"], board.settings["sampling.max_tokens"]) == (2, 4, 6)
    assert [step for step, _ in board.logged] == [0, 1, 2, 2]
    assert [values for _, values in board.logged if "validation/score" in values] == [
        {"validation/score": 0.25},
        {"validation/score": 0.5},
    ]
    steps = [values for _, values in board.logged if "train/loss" in values]
    assert [{f"train/{k}": v for k, v in m.model_dump(exclude={"step"}).items()} for m in result.history] == steps


def test_a_tracker_that_is_unknown_or_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DistillConfigError, match="unknown tracker 'mlflow'; use one of tensorboard, wandb, trackio"):
        open_trackers(["mlflow"], tmp_path, {}).__enter__()
    for name in TRACKERS:
        monkeypatch.setattr("distill.trackers.find_spec", lambda name: None)
        with pytest.raises(DistillConfigError, match=rf"pip install 'engrain\[{name}\]'"):
            open_trackers([name], tmp_path, {}).__enter__()
    with open_trackers([], tmp_path, {}) as tracker:
        assert tracker is None


def test_tracking_is_no_part_of_what_a_run_is(make_trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board()
    monkeypatch.setitem(sys.modules, "trackio", board.module("trackio"))
    first = make_trainer(steps=2).fit()
    again = make_trainer(steps=2)
    with open_trackers(["trackio"], again.folder, {}) as tracker:
        assert again.fit(tracker=tracker).last == first.last  # the same run, over already
    assert not board.logged
