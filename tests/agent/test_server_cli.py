"""`--base-url` on the command line: what is played on a server, and what is said when that cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import engrain.cli as shell
from engrain.servers import connect
from envs.errors import UsageError
from memory.store import Store
from tests.agent.fake_server import FakeServer

WORLD = ("math", "-o", "convention=answer_tag", "-n", "3", "--max-tokens", "16")


@pytest.fixture
def server(tiny_tokenizer: Any, tiny_folder: Path) -> Iterator[FakeServer]:
    server = FakeServer(tiny_tokenizer, model=tiny_folder.name)
    yield server
    server.stop()


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(shell.app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_server_plays_into_the_store(
    server: FakeServer, tiny_folder: Path, engrain_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "s3cr3t-k3y"
    monkeypatch.setenv("ENGRAIN_API_KEY", server.key)
    command = ("eval", *WORLD, "--model", str(tiny_folder), "--base-url", server.url)
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert "0.00" in result.stdout
    assert len(server.completions) == 3
    assert run(*command).exit_code == 0
    assert len(server.completions) == 3  # the store had them
    with Store.open(str(engrain_home / "engrain.db"), create=False) as store:
        episodes = store.episodes()
    assert len(episodes) == 3
    assert all(episode.exact and episode.sampled == 9 for episode in episodes)
    everything = b"".join(path.read_bytes() for path in engrain_home.rglob("*") if path.is_file())
    assert b"k3y" not in everything + result.output.encode()


def test_text_from_a_server_is_marked_in_the_store(
    server: FakeServer, tiny_folder: Path, engrain_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.text_only = True
    result = run("play", *WORLD[:-2], "--model", str(tiny_folder), "--base-url", server.url, "--base-url", server.url)
    assert result.exit_code == 0, result.output
    assert "does not return token ids" in caplog.text
    with Store.open(str(engrain_home / "engrain.db"), create=False) as store:
        episode, *others = store.episodes()
    assert len(others) == 2
    assert not episode.exact
    assert episode.sampled == 0
    assert "some replies came as text" in run("memory", "episodes", "show", episode.id).stdout
    with pytest.raises(UsageError, match="training needs them"):
        connect(str(tiny_folder), [server.url], trainable=True)


def test_what_is_wrong_is_one_line(server: FakeServer, tiny_folder: Path, tmp_path: Path) -> None:
    def fails(*options: str, code: int, model: Path = tiny_folder) -> str:
        result = run("eval", *WORLD, "--model", str(model), *options)
        assert result.exit_code == code, result.output
        assert len(result.stderr.strip().splitlines()) == 1
        return str(result.stderr)

    assert "is no server URL" in fails("--base-url", "localhost:8000", code=2)
    assert "usually ends in /v1" in fails("--base-url", server.url.removesuffix("/v1"), code=2)
    assert "leave out --engine vllm" in fails("--base-url", server.url, "--engine", "vllm", code=2)
    server.model = "another"
    assert "serves another, not" in fails("--base-url", server.url, code=2)
    server.key = "key"
    assert "ENGRAIN_API_KEY" in fails("--base-url", server.url, code=2)
    server.stop()
    assert f"no server answers at {server.url}" in fails("--base-url", server.url, code=1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    said = fails("--base-url", server.url, code=2, model=tmp_path / "empty")
    assert "the tokenizer of" in said
