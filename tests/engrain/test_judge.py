"""The judge stage: batches until it is clear, no more than that; and no training where there is no gap."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import engrain.cli as shell
from engrain import settings
from engrain.config import EvaluationConfig
from engrain.gate import Finding
from engrain.judge import Judged, Student, judge
from engrain.rounds import RoundTasks
from envs.base import Split, Task
from memory.extract import Extractor, Parsed
from memory.store import Store


class Outcome:
    """All of an episode that the stage reads."""

    def __init__(self, success: bool) -> None:
        self.success = success


class Script:
    """Solves the first so many tasks of every ten, by student and kind; notes which tasks it was asked for."""

    def __init__(self, test: dict[Student, int], ood: dict[Student, int]) -> None:
        self.of = {"test": test, "ood": ood}
        self.asked: dict[str, int] = {}
        self.notes: list[str] = []

    def __call__(self, student: Student, name: str, tasks: Sequence[Task]) -> Any:
        self.asked[name] = len(tasks)
        return [Outcome(task.seed % 10 < self.of[name.split("/")[0]].get(student, 0)) for task in tasks]


def tasks(split: Split, count: int) -> list[Task]:
    return [Task.create("fake", split, number, {"kind": split.value}) for number in range(count)]


def judged(test: dict[Student, int], ood: dict[Student, int], **changed: Any) -> tuple[Judged, Script]:
    script = Script(test, ood)
    drawn = RoundTasks([], [], [], tasks(Split.TEST, 80), {"a": tasks(Split.OOD, 40), "b": tasks(Split.TRAIN, 20)})
    config = EvaluationConfig(ood_margin=0.1, **changed)
    return judge(drawn, config, script, script.notes.append), script


HALF = {Student.BARE: 5, Student.DISTILLED: 5}


def test_a_clear_gain_stops_the_test_tasks_while_other_worlds_are_played_on() -> None:
    found, script = judged({Student.DISTILLED: 9}, HALF)
    assert found.verdict.promoted
    assert [(look.gained, look.kept) for look in found.verdict.looks[:2]] == [
        (Finding.YES, Finding.OPEN),
        (Finding.YES, Finding.YES),
    ]
    assert script.asked["test/bare"] == script.asked["test/in_context"] == script.asked["test/distilled"] == 20
    assert (script.asked["ood/before/a"], script.asked["ood/after/b"]) == (20, 10)
    assert len(found.test[Student.DISTILLED]) == found.verdict.gain.n == 20
    assert len(found.ood["a"][Student.IN_CONTEXT]) == 20
    assert "look 1 of 4" in script.notes[0]


def test_no_gain_at_all_is_given_up_before_the_end() -> None:
    found, script = judged(HALF, HALF)
    assert not found.verdict.promoted
    assert found.verdict.looks[-1].gained is Finding.NO
    assert 20 <= script.asked["test/bare"] < 80
    assert "no clear gain" in found.verdict.reason


def test_a_clear_loss_elsewhere_ends_it_at_the_first_look() -> None:
    found, script = judged({Student.DISTILLED: 9}, {Student.BARE: 10, Student.DISTILLED: 0})
    assert not found.verdict.promoted
    assert "out-of-distribution accuracy fell by more than 0.1" in found.verdict.reason
    assert set(script.asked.values()) == {20, 10, 5}


def test_one_look_plays_everything() -> None:
    found, script = judged({Student.DISTILLED: 9}, HALF, looks=1)
    assert found.verdict.promoted
    assert found.verdict.gain.confidence == 0.95
    assert {name: count for name, count in script.asked.items() if name.startswith("test")} == {
        "test/bare": 80,
        "test/in_context": 80,
        "test/distilled": 80,
    }
    assert not script.notes


@pytest.mark.parametrize("wrong", [{"looks": 0}, {"looks": 11}, {"alpha": 0}, {"alpha": 0.5}])
def test_settings_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EvaluationConfig(**wrong)


def test_a_round_without_a_gap_trains_nothing_and_says_so(tiny_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def wrote(self: Extractor, episodes: Any, seed: int) -> Any:
        text = "Always write the answer at the end."
        line = f"- EXPERIENCE ITEM: {text}"
        return [self._extraction([episode], seed, line, Parsed((text,), ())) for episode in episodes]

    monkeypatch.setattr(Extractor, "extract", wrote)
    url = str(tmp_path / "s.db")
    words = ["improve", "math", "-o", "convention=json", "--model", str(tiny_folder), "--max-tokens", "2"]
    words += ["--train-tasks", "4", "--validation-tasks", "4", "--test-tasks", "8", "--store", url, "--json"]
    result = CliRunner().invoke(shell.app, words)
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert (facts["status"], facts["promoted"], facts["checkpoint"]) == ("stopped", False, None)
    assert "training cannot pay" in facts["reason"]
    assert facts["validation_gap"]["low"] <= 0
    assert not list(settings.runs_dir().glob("*/step-*"))
    with Store.open(url) as store:
        assert not store.runs()
        assert not store.episode_rows(split="test")
