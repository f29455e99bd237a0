"""Every recipe resolves as it is, and the plan's numbers follow from the formulas that it states."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from distill.config import DistillConfig
from engrain import shapes
from engrain.cli import app
from engrain.config import ImproveConfig, WorldSpec
from engrain.plan import plan
from engrain.shapes import KNOWN, shape_of

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No hub, and no model that happens to be cached here."""
    monkeypatch.setattr(shapes, "fetch_config", lambda hub_id: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


def improve(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["improve", *map(str, arguments)])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_resolves_and_is_planned(recipe: Path, tmp_path: Path, engrain_home: Path) -> None:
    result = improve("--config", recipe, "--dry-run", "--json")

    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["estimate"] is True
    assert found["model"] in KNOWN
    assert found["memory"]["weights"] == 2 * found["parameters"]
    assert {row["devices"] for row in found["seconds"]} == {1, 8}
    assert all(row["fits"] for row in found["seconds"])
    one, eight = found["seconds"][:2]
    assert one["sampling"] / 8 <= eight["sampling"] < one["sampling"]
    assert eight["training"] == pytest.approx(one["training"] / 8)
    parts = {part["name"] for part in found["parts"]}
    assert ("extract" in parts) == (found["settings"]["knowledge"] is None)
    assert found["settings"]["distill"]["steps"] == 50
    assert found["settings"]["distill"]["batch_size"] == 128
    reads_a_file = "data" in found["settings"]["world"]["options"]
    assert any("no task was drawn" in line for line in found["unchecked"]) == reads_a_file
    assert not engrain_home.exists()  # nothing was written
    assert not list(tmp_path.glob("*.db"))


def test_every_row_of_the_tables_has_its_recipe_and_every_setting_its_origin() -> None:
    names = {path.stem for path in RECIPES}
    models = ("llama-8b", "llama-3b", "qwen2.5-7b")
    rows = {"math-unfiltered", "math-filtered", "frozenlake-unfiltered", "frozenlake-filtered", "sokoban-filtered"}
    assert names == rows | {f"{row}-{model}" for row in ("medmcqa", "safety") for model in models}
    for path in RECIPES:
        for line in path.read_text().splitlines():
            if "=" in line and not line.startswith("#"):
                assert re.search(r"#.*\b(paper|ours|unfiltered|filtered|README)", line), f"{path.name}: {line}"


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        ("Qwen/Qwen3-1.7B", 1.72),
        ("Qwen/Qwen3-4B-Instruct-2507", 4.02),
        ("Qwen/Qwen3-8B", 8.19),
        ("Qwen/Qwen2.5-7B-Instruct", 7.62),
        ("meta-llama/Llama-3.1-8B-Instruct", 8.03),
        ("meta-llama/Llama-3.2-3B-Instruct", 3.21),
    ],
)
def test_the_kept_sizes_add_up_to_the_models_published_ones(model: str, billions: float) -> None:
    assert KNOWN[model].parameters / 1e9 == pytest.approx(billions, abs=0.01)


def test_a_folders_own_configuration_counts_its_very_weights(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model()
    model.config.save_pretrained(tmp_path / "tiny")

    shape, source = shape_of(str(tmp_path / "tiny"))

    biases = sum(p.numel() for name, p in model.named_parameters() if name.endswith("bias"))
    assert shape is not None
    assert shape.parameters + biases == sum(p.numel() for p in model.parameters())
    assert source == "the model's own config"


def test_the_adapter_has_as_many_weights_as_the_one_that_is_trained(tiny_model: Any, tmp_path: Path) -> None:
    from distill.adapters import add_lora
    from distill.config import LoraSettings

    model = tiny_model()
    model.config.save_pretrained(tmp_path / "tiny")
    shape, _ = shape_of(str(tmp_path / "tiny"))
    student = add_lora(model, LoraSettings(rank=4), 0)

    assert shape is not None
    assert shape.adapter(4) == sum(p.numel() for p in student.parameters() if p.requires_grad)


def test_what_cannot_be_known_is_said_and_nothing_is_made_up() -> None:
    found = plan(ImproveConfig(model="nobody/nothing", world=WorldSpec(env="math")))

    assert found.parameters is None
    assert found.memory is None
    assert found.seconds == ()
    assert any("nobody/nothing" in line for line in found.unchecked)


def test_more_steps_cost_more_and_checkpointing_trades_memory_for_work() -> None:
    def planned(**changed: Any) -> Any:
        world = WorldSpec(env="math")
        return plan(ImproveConfig(model="qwen2.5-coder-0.5b", world=world, distill=DistillConfig(**changed)))

    short, long = planned(steps=10), planned(steps=20)
    assert {p.name: p.sampled for p in long.parts}["train"] == 2 * {p.name: p.sampled for p in short.parts}["train"]
    assert long.operations > short.operations
    spared = planned(steps=10, gradient_checkpointing=True)
    assert spared.memory.activations < short.memory.activations
    assert spared.seconds[0].training > short.seconds[0].training


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('model = "m"\nknowledge = ""\n[world]\nenv = "math"\n', "knowledge"),
        ('model = "m"\n[world]\nenv = "math"\n[distill]\nteacher = "t"\n', "engrain distill --teacher"),
        ("model = ", "is not TOML"),
        ('model = "m"\n[world]\nenv = "nonesuch"\n', "unknown env"),
        (
            'model = "Qwen/Qwen3-8B"\n[world]\nenv = "math"\n[world.options]\ndata = "x.jsonl"\nkey = 1\n',
            "unknown option",
        ),
        ('model = "no such name"\n[world]\nenv = "math"\n', "unknown model"),
        ('model = "m"\nworlds = 1\n[world]\nenv = "math"\n', "worlds"),
        ('model = "Qwen/Qwen3-8B"\n[world]\nenv = "frozenlake"\n', "boards in split"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "bad.toml").write_text(text)

    result = improve("--config", "bad.toml", "--dry-run")

    assert result.exit_code == 2
    assert said in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_people_get_tables_that_say_estimate() -> None:
    result = improve("--demo", "--dry-run")

    assert result.exit_code == 0, result.output
    assert "estimate" in result.stdout
    assert "choose a checkpoint" in result.stdout
