"""`--engine` and `--admissible` on the command line, with the model of 27 008 weights and TextWorld."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import engrain.cli as shell
from memory.store import Store


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
@pytest.mark.parametrize("command", ["play", "eval"])
def test_without_vllm_one_line_says_what_to_install(command: str, tiny_folder: Path) -> None:
    result = CliRunner().invoke(shell.app, [command, "math", "-m", str(tiny_folder), "--engine", "vllm"])
    assert result.exit_code == 2
    assert "pip install 'engrain[vllm]'" in " ".join(result.output.split())


def test_an_engine_that_does_not_exist_is_refused(tiny_folder: Path) -> None:
    result = CliRunner().invoke(shell.app, ["eval", "math", "-m", str(tiny_folder), "--engine", "vlm"])
    assert result.exit_code == 2
    assert "transformers" in result.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["improve", "math", "--sync-every", "2"], "--sync-every 2 is for samples of another engine"),
        (["improve", "math", "--engine", "vllm", "--ray", "local", "--sync-every", "2"], "leave out --sync-every"),
        (["improve", "math", "--ray", "local", "--base-url", "http://127.0.0.1:1"], "leave out --base-url"),
        (["distill", "math", "-k", "x", "--out", "y", "--sync-every", "2"], "add --engine vllm or --base-url"),
    ],
)
def test_what_cannot_sample_together_is_refused_first(words: list[str], says: str, engrain_home: Path) -> None:
    result = CliRunner().invoke(shell.app, words)
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())
    assert not engrain_home.exists()


def test_admissible_replies_are_commands_of_the_game(
    engrain_home: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    options = ("-o", "max_turns=3", "--temperature", "1.0", "--max-tokens", "120", "--json")
    result = CliRunner().invoke(
        shell.app, ["play", "textworld", "-m", str(tiny_folder), "--admissible", *options], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    (episode,) = json.loads(result.stdout)
    with Store.open(str(engrain_home / "engrain.db"), create=False) as store:
        (kept,) = store.episodes()
    assert len(kept.turns) == len(episode["turns"]) > 0
    assert kept.sampling.admissible_only
    for turn in kept.turns:
        assert turn.choices
        assert turn.action in turn.choices
