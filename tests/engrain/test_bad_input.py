"""Bad input of every kind: one line on standard error that names it, exit code 2 (1 for faults of the world)."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import engrain.cli as shell
from memory.store import Store

LONG = "x" * 300
EVAL = ("eval", "math", "-n", "1", "-m", "{here}/tiny")
DISTILL = ("distill", "math", "-k", "{here}/text.txt", "--out", "{here}/run", "-m", "{here}/tiny")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    """A folder with one of every broken thing, and a tiny model that is whole."""
    tmp_path = tmp_path_factory.mktemp("here")
    tiny_model().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer.save_pretrained(tmp_path / "tiny")
    (tmp_path / "empty-folder").mkdir()
    (tmp_path / "broken-model").mkdir()
    (tmp_path / "broken-model" / "config.json").write_text("{")
    (tmp_path / "half-model").mkdir()
    (tmp_path / "half-model" / "config.json").write_bytes((tmp_path / "tiny" / "config.json").read_bytes())
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "caf\xe9?", "answer": "1"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "array.jsonl").write_text("[1]\n")
    (tmp_path / "prose.jsonl").write_text("hello\n")
    (tmp_path / "bad.parquet").write_text("hello")
    (tmp_path / "game.ulx").write_bytes(b"Glul")
    (tmp_path / "game.z8").write_bytes(b"\x08" + b"\xff" * 99)
    (tmp_path / "text.txt").write_text("Knock first.")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"\xe9\xff")
    (tmp_path / "cut.json").write_text('{"model": ')
    (tmp_path / "typo.json").write_text('{"model": "m", "world": {"env": "math"}, "sead": 1}')
    sampling = '{"model": "m", "world": {"env": "math"}, "distill": {"sampling": {"max_tokens": -5}}}'
    (tmp_path / "sampling.json").write_text(sampling)
    (tmp_path / "prose.db").write_text("no database " * 99)
    Store.open(str(tmp_path / "empty.db")).close()
    Store.open(str(tmp_path / "newer.db")).close()
    with sqlite3.connect(tmp_path / "newer.db") as connection:
        connection.execute("UPDATE engrain_version SET version_num = '9999'")
    connection.close()
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("eval", "chess"), 2, "unknown env 'chess'"),
        (("improve", "chess"), 2, "unknown env 'chess'"),
        (("improve",), 2, "say what to learn"),
        (("improve", "math", "--demo"), 2, "say what to learn"),
        (("improve", "--demo", "-o", "convention=json"), 2, "world of its own"),
        (("improve", "--config", "{here}/typo.json", "--seed", "3"), 2, "--config holds"),
        (("improve", "frozenlake"), 2, "12 "),
        (("improve", "math", "--objective", "sideways"), 2, "objective"),
        (("play", "chess"), 2, "unknown env 'chess'"),
        (("eval", "math", "-m", "nope"), 2, "unknown model 'nope'"),
        (("eval", "math", "-m", LONG), 2, "unknown model"),
        (("eval", "math", "-m", "{here}/empty-folder"), 2, "without config.json"),
        (("eval", "math", "-m", "{here}/broken-model"), 2, "broken-model cannot be loaded"),
        (("eval", "math", "-m", "{here}/half-model"), 2, "half-model cannot be loaded"),
        (("play", "math", "-m", "nope"), 2, "unknown model 'nope'"),
        (("eval", "math", "-o", "convention"), 2, "-o 'convention' is not key=value"),
        (("play", "math", "-o", "convention"), 2, "-o 'convention' is not key=value"),
        (("eval", "math", "-o", "convention=xml"), 2, "convention='xml'"),
        (("eval", "math", "-o", "colour=red"), 2, "unknown option 'colour'"),
        (("eval", "math", "-o", "sums.min_digits=-1"), 2, "min_digits must be positive"),
        (("eval", "math", "-o", f"data={LONG}"), 2, "no such file"),
        (("eval", "math", "-o", "data={here}/latin.jsonl"), 2, "line 1 is not UTF-8"),
        (("eval", "math", "-o", "data={here}/empty.jsonl"), 2, "has 0 tasks"),
        (("eval", "math", "-o", "data={here}/array.jsonl"), 2, "row 1 is no object"),
        (("eval", "math", "-o", "data={here}/prose.jsonl"), 2, "line 1 is not JSON"),
        (("eval", "math", "-o", "data={here}/bad.parquet"), 2, "not a readable Parquet file"),
        (("eval", "textworld", "-o", "path={here}/game.ulx"), 2, "Glulx"),
        (("eval", "textworld", "-o", "path={here}/game.z8"), 2, "cut short"),
        (("eval", "textworld", "--seed", "1000"), 2, "seed=1000"),
        (("eval", "frozenlake", "-o", "holes=-1"), 2, "holes='-1'"),
        (("eval", "frozenlake"), 2, "boards in split 'test', 64 were asked for"),
        ((*EVAL, "--temperature", "inf"), 2, "temperature: Input should be a finite number"),
        ((*EVAL, "--knowledge", "nope"), 2, "no knowledge 'nope'"),
        ((*EVAL, "--knowledge", LONG), 2, "no knowledge"),
        ((*EVAL, "--knowledge", "~no-such-user-at-all/x"), 2, "no knowledge"),
        ((*EVAL, "--knowledge", "{here}/empty.txt"), 2, "is empty"),
        ((*EVAL, "--knowledge", "{here}/latin.txt"), 2, "cannot be read"),
        ((*EVAL, "--checkpoint", "nope"), 2, "no checkpoint 'nope'"),
        ((*EVAL, "--checkpoint", LONG), 2, "no checkpoint"),
        ((*EVAL, "--checkpoint", "{here}/empty-folder"), 2, "manifest.json cannot be read"),
        ((*EVAL, "--store", "{here}/newer.db"), 2, "newer version of Engrain"),
        ((*EVAL, "--store", "{here}/prose.db"), 2, "not a database"),
        ((*EVAL, "--store", "{here}"), 2, "cannot open the store"),
        ((*EVAL, "--store", "mysql://x/y"), 2, "'mysql' is no database"),
        ((*EVAL, "--store", "postgresql://127.0.0.1:1/x"), 1, "cannot open the store"),
        (("play", "math", "--human", "--json"), 2, "exclude each other"),
        (("play", "math", "--human", "--knowledge", "x"), 2, "without a model"),
        (("play", "math", "-m", "{here}/tiny", "--knowledge", "77"), 2, "no knowledge '77'"),
        (("play", "math", "-m", "{here}/tiny", "--checkpoint", "nope"), 2, "no checkpoint 'nope'"),
        ((*DISTILL, "--objective", "magic"), 2, "objective"),
        ((*DISTILL, "--learning-rate", "0"), 2, "learning_rate"),
        ((*DISTILL, "--parent", "nope"), 2, "no checkpoint 'nope'"),
        ((*DISTILL, "--out", "{here}/text.txt"), 2, "text.txt cannot be used"),
        (("improve", "--config", "{here}/missing.json"), 2, "cannot be read"),
        (("improve", "--config", "{here}/cut.json"), 2, "Invalid JSON"),
        (("improve", "--config", "{here}/typo.json"), 2, "sead"),
        (("improve", "--config", "{here}/sampling.json"), 2, "distill.sampling.max_tokens"),
        (("memory", "rounds"), 2, "there is no store"),
        (("memory", "items", "--store", "{here}/newer.db"), 2, "newer version of Engrain"),
        (("memory", "items", "--store", "{here}/prose.db"), 2, "not a database"),
        (("memory", "items", "--store", "{here}/empty.db", "--status", "new"), 2, "no item status 'new'"),
        (("memory", "episodes", "--store", "{here}/empty.db", "--round", "7"), 2, "no round '7'"),
        (("memory", "episodes", "show", "x", "--store", "{here}/empty.db"), 2, "no episode 'x'"),
        (("memory", "items", "show", "", "--store", "{here}/empty.db"), 2, "no item ''"),
        (("memory", "knowledge", "show", "²", "--store", "{here}/empty.db"), 2, "no knowledge '²'"),
        (("memory", "rounds", "show", "9" * 30, "--store", "{here}/empty.db"), 2, "no round"),
        (("model", "show", "nope"), 2, "unknown model 'nope'"),
        (("model", "fetch", "{here}/empty-folder"), 2, "without config.json"),
    ],
)
def test_bad_input_is_one_line(here: Path, arguments: tuple[str, ...], code: int, words: str) -> None:
    filled = [word.replace("{here}", str(here)) for word in arguments]
    result = CliRunner().invoke(shell.app, filled)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    line = re.sub(r"\x1b\[[0-9;]*m", "", result.stderr)
    assert line.startswith("error: "), line
    assert line.count("\n") == 1
    assert words in line


@pytest.mark.parametrize(
    "arguments",
    [
        ("eval", "math", "--split", "dev"),
        ("eval", "math", "-n", "0"),
        ("eval", "math", "--temperature", "-1"),
        ("eval", "math", "--temperature", "nan"),
        ("eval", "math", "--seed", "-1"),
        ("eval", "math", "--seed", "9" * 30),
        ("eval", "math", "--colour", "red"),
        ("play", "math", "--episodes", "-3"),
        ("distill", "math"),
        ("memory", "episodes", "--limit", "0"),
        ("memory", "episodes", "--split", "dev"),
        ("memory", "nothing"),
        ("model", "fetch"),
    ],
)
def test_options_out_of_range_are_usage_errors(arguments: tuple[str, ...]) -> None:
    result = CliRunner().invoke(shell.app, list(arguments))
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert "Usage: " in re.sub(r"\x1b\[[0-9;]*m", "", result.stderr)


@pytest.mark.parametrize("noun", ["episodes", "items", "knowledge", "rounds"])
def test_an_empty_store_says_so(here: Path, noun: str) -> None:
    result = CliRunner().invoke(shell.app, ["memory", noun, "--store", str(here / "empty.db")])
    assert result.exit_code == 0
    assert result.stdout == f"no {noun}\n"
    listed = CliRunner().invoke(shell.app, ["memory", noun, "--json", "--store", str(here / "empty.db")])
    assert listed.stdout == "[]\n"


def test_a_round_that_cannot_be_drawn_leaves_no_round_behind(tmp_path: Path) -> None:
    url = str(tmp_path / "rounds.db")
    assert CliRunner().invoke(shell.app, ["improve", "frozenlake", "--store", url]).exit_code == 2
    with Store.open(url) as store:
        assert store.rounds() == []
