"""The examples run as they stand, and what they register is known by name, here and through entry points."""

from __future__ import annotations

import ast
import os
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import engrain
from distill.config import DistillConfig
from distill.errors import DistillConfigError
from distill.objective import divergence_named, forward_kl
from distill.registered import OBJECTIVES, from_value, register_objective
from engrain.config import ExtractConfig
from engrain.judge import Judged, Student
from envs import registry
from envs.base import Split, World
from envs.errors import BadPluginError, UnknownEnvError, UsageError
from envs.plugins import Plugins
from memory.prompts import PROMPTS, known_mode, register_prompt

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAID = {
    "own_world": "with knowledge: ",
    "own_extraction": "short, prompt version ",
    "own_objective": "step 2: hellinger ",
    "own_gate": "stopped: no usable experience",  # a model of random weights writes none
}


@pytest.fixture
def environment(engrain_home: Path, tmp_path: Path) -> dict[str, str]:
    """A machine on which the examples' distribution is installed, and which has no network."""
    about = tmp_path / "site" / "engrain_examples-0.1.0.dist-info"
    about.mkdir(parents=True)
    project = tomllib.loads((ROOT / "examples" / "pyproject.toml").read_text())["project"]
    lines = [
        line
        for group, parts in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {target}" for name, target in parts.items()))
    ]
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: engrain-examples\nVersion: 0.1.0\n")
    path = os.pathsep.join(map(str, (ROOT, ROOT / "examples", tmp_path / "site")))
    return {**os.environ, "PYTHONPATH": path, "ENGRAIN_HOME": str(engrain_home), "HF_HUB_OFFLINE": "1"}


def run(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_runs(path: Path, tiny_folder: Path, environment: dict[str, str]) -> None:
    assert len(path.read_text().splitlines()) < 60
    done = run(environment, str(path), str(tiny_folder))
    assert done.returncode == 0, done.stderr
    assert SAID[path.stem] in done.stdout


def test_the_command_line_knows_what_entry_points_name(environment: dict[str, str], tiny_folder: Path) -> None:
    model = ("--model", str(tiny_folder))
    parts = ("--extraction", "short", "--objective", "hellinger")
    small = ("--train-tasks", "2", "--validation-tasks", "1", "--test-tasks", "1", "--max-tokens", "2")
    done = run(environment, "-m", "engrain", "improve", "shout", *parts, *small, *model)
    assert done.returncode == 0, done.stderr
    assert "no usable experience" in done.stdout  # a model of random weights writes none
    assert "training tasks of shout" in done.stderr
    assert "(short)" in done.stderr
    done = run(environment, "-m", "engrain", "improve", "shout", "--objective", "none_such", *model)
    assert done.returncode == 2
    assert "'none_such'; use" in done.stderr
    assert "hellinger" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_world_that_does_not_import_is_one_line(environment: dict[str, str], tmp_path: Path) -> None:
    about = tmp_path / "site" / "lost-0.1.0.dist-info"  # a name of its own: `pip install ./examples` leaves its there
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: lost\nVersion: 0.1.0\n")
    (about / "entry_points.txt").write_text("[engrain.envs]\nlost = nowhere_at_all:World\n")
    done = run(environment, "-m", "engrain", "eval", "lost")
    assert done.returncode == 1
    assert "env 'lost' does not load from 'nowhere_at_all:World'" in done.stderr


def test_a_part_whose_module_is_broken_is_one_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_part.py").write_text("def (:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    parts = Plugins("engrain.envs", "env", {"broken": "broken_part:World"})
    with pytest.raises(BadPluginError, match="env 'broken' does not load from 'broken_part:World': invalid syntax"):
        parts.find("broken")


def test_a_registered_world_is_played_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.WORLDS, "_here", {})

    class Here(World):
        name = "here"

        @classmethod
        def configure(cls, options):
            return cls()

        def tasks(self, split, count, seed=0):
            return [registry.Task.create(self.name, split, seed + i, {}) for i in range(count)]

        @classmethod
        def make(cls, task):
            raise NotImplementedError

    with pytest.raises(UnknownEnvError):
        registry.world("here")
    assert registry.register_world(Here) is Here
    (task,) = registry.world("here").tasks(Split.TEST, 1)
    assert "here" in registry.names()
    assert Here.isolated
    assert not registry.isolated(task)  # no worker process would know it
    monkeypatch.setattr(Here, "name", "math")
    with pytest.raises(UsageError, match="'math' is built in"):
        registry.register_world(Here)
    registry.WORLDS.register("wrong", dict)
    with pytest.raises(BadPluginError, match="not a World"):
        registry.world("wrong")


def test_registered_prompts_are_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PROMPTS, "_here", {})
    with pytest.raises(UsageError, match=r"'mine'; use contrastive, examples, paper"):
        ExtractConfig(mode="mine")
    register_prompt("mine", lambda record: [engrain.Message(role="user", content=record)])
    assert ExtractConfig(mode="mine").mode == known_mode("mine")
    with pytest.raises(UsageError, match="'paper' is built in"):
        register_prompt("paper", list)


def test_an_objective_by_value_has_the_gradient_of_the_one_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OBJECTIVES, "_here", {})
    with pytest.raises(DistillConfigError, match=r"unknown objective 'mine'; use one of cross_entropy, forward_kl"):
        DistillConfig(objective="mine")
    mine = register_objective("mine", from_value(lambda s, t: (t.exp() * (t - s)).sum(-1)))
    assert DistillConfig(objective="mine").divergence("mine") is mine
    assert divergence_named("mine") is mine
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 17).log_softmax(-1)
    with torch.no_grad():  # as training calls it
        for ours, theirs in zip(mine(student, teacher), forward_kl(student, teacher), strict=True):
            torch.testing.assert_close(ours, theirs)


def verdict(promoted: bool) -> engrain.Verdict:
    gain = engrain.paired_gain([False] * 9, [promoted] * 9)
    return engrain.Verdict(promoted=promoted, reason="a gain", gain=gain, ood=engrain.paired_gain([], []))


@pytest.mark.parametrize(("promoted", "tokens", "wanted"), [(True, 11, True), (True, 12, False), (False, 5, False)])
def test_the_gate_of_the_example_refuses_what_grew(promoted: bool, tokens: int, wanted: bool) -> None:
    brief = runpy.run_path(str(ROOT / "examples" / "own_gate.py"))["brief"]
    played = {Student.BARE: [SimpleNamespace(sampled=10)], Student.DISTILLED: [SimpleNamespace(sampled=tokens)]}
    found = brief(Judged(verdict(promoted), played, {}))
    assert found.promoted == wanted
    assert ("replies grew from 10 to 12 tokens" in found.reason) == (promoted and not wanted)


def test_the_public_names_are_there_and_cost_nothing() -> None:
    code = "import sys, engrain; assert not {'torch', 'pydantic', 'sqlalchemy'} & set(sys.modules), 'slow'"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert all(getattr(engrain, name) is not None for name in engrain.__all__)
    assert set(engrain.__all__) <= set(dir(engrain))
    with pytest.raises(AttributeError, match="no_such_name"):
        engrain.no_such_name  # noqa: B018
    tree = ast.parse((ROOT / "engrain" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        (node.module, alias.name)
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == {(module, name) for module, names in engrain._PLACES.items() for name in names}
