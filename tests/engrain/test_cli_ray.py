"""`--ray`, really run: a Ray cluster started here, players with the tiny model, episodes in the store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import engrain.cli as shell
from memory.extract import parse
from memory.store import Store

TEXT = "- EXPERIENCE ITEM: Say the number alone, without a word before it."
WORLD = ("eval", "frozenlake", "-n", "3", "--max-tokens", "8", "--json")


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    found = pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    yield found
    found.shutdown()


def evaluation(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(shell.app, [*WORLD, *arguments])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)["evaluations"]["base model"]
    return found


def test_an_evaluation_on_ray_is_the_one_played_here(ray: Any, tiny_folder: Path, tmp_path: Path) -> None:
    here = evaluation("-m", str(tiny_folder), "--store", str(tmp_path / "here.db"))
    there = evaluation("-m", str(tiny_folder), "--store", str(tmp_path / "there.db"), "--ray", "local")
    assert there["n"] == here["n"] == 3
    assert there["results"] == here["results"]  # the ids too: either may go on where the other stopped
    assert not ray.is_initialized()
    with Store.open(str(tmp_path / "there.db"), create=False) as store:
        episodes = [store.episode(result["episode_id"]) for result in there["results"]]
    assert all(episode.sampled and episode.error is None for episode in episodes)


def test_a_round_on_ray_plays_what_a_round_here_plays(
    ray: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrote(self: Any, episodes: Any, seed: int) -> Any:
        return [self._extraction([e], seed, TEXT, parse(TEXT)) for e in episodes]

    monkeypatch.setattr("memory.extract.Extractor.extract", wrote)
    words = ["improve", "math", "-m", str(tiny_folder), "--train-tasks", "3", "--validation-tasks", "2"]
    words += ["--test-tasks", "2", "--max-tokens", "4", "--json"]
    books = []
    for name, more in (("here", ()), ("there", ("--ray", "local"))):
        monkeypatch.setenv("ENGRAIN_HOME", str(tmp_path / name))
        result = CliRunner().invoke(shell.app, [*words, *more])
        assert result.exit_code == 0, result.output
        assert "training cannot pay" in json.loads(result.stdout)["reason"]  # a tiny random model solves nothing
        with Store.open(str(tmp_path / name / "engrain.db"), create=False) as store:
            (record,) = store.rounds()
            stages = ("play", "validation/bare", "validation/in_context")
            played = {stage: store.episodes(round_id=record.id, stage=stage) for stage in stages}
            assert all(e.error is None and e.sampled for found in played.values() for e in found)
            books.append(
                {s: sorted((e.task.id, e.token_ids, e.knowledge) for e in found) for s, found in played.items()}
            )
    assert books[0] == books[1]
    assert [len(found) for found in books[0].values()] == [3, 2, 2]


def test_servers_and_players_exclude_each_other(tiny_folder: Path) -> None:
    arguments = [*WORLD, "-m", str(tiny_folder), "--ray", "local", "--base-url", "http://127.0.0.1:1"]
    result = CliRunner().invoke(shell.app, arguments)
    assert result.exit_code == 2
    assert "--ray plays with engines of its own" in result.output
