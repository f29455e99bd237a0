"""Bad input of the commands that read and correct the store: one line, exit code 2, and the store is as it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import engrain.cli as shell

STORE = ("--store", "{here}/empty.db")

UNKNOWN = [
    (("memory", "episodes", "show", "x", *STORE), "no episode 'x'"),
    (("memory", "episodes", "show", "a%_\x00", *STORE), "no episode 'a%_\\x00'"),
    (("memory", "episodes", "--round", "7", *STORE), "no round '7'"),
    (("memory", "episodes", "--checkpoint", "nope", *STORE), "no checkpoint 'nope'"),
    (("memory", "episodes", "--knowledge", "nope", *STORE), "no knowledge 'nope'"),
    (("memory", "episodes", "--before", "nope", *STORE), "no episode 'nope'"),
    (("memory", "items", "show", "", *STORE), "no item ''"),
    (("memory", "items", "--status", "new", *STORE), "no item status 'new'; use active"),
    (("memory", "items", "edit", "nope", "--text", "x", *STORE), "no item 'nope'"),
    (("memory", "items", "retire", "nope", *STORE), "no item 'nope'"),
    (("memory", "items", "restore", "nope", *STORE), "no item 'nope'"),
    (("memory", "knowledge", "show", "²", *STORE), "no knowledge '²'"),
    (("memory", "knowledge", "diff", "1", "2", *STORE), "no knowledge '1'"),
    (("memory", "knowledge", "restore", "1", "-y", *STORE), "no knowledge '1'"),
    (("memory", "rounds", "show", "9" * 30, *STORE), "no round"),
    (("memory", "rounds", "--png", "{new}/x.png", *STORE), "no round has measured test tasks yet"),
    (("memory", "lineage", "nope", *STORE), "no checkpoint 'nope'"),
    (("memory", "blame", "nope", "nope", *STORE), "no checkpoint 'nope'"),
    (("memory", "forget", "nope", "-y", *STORE), "no item 'nope'"),
    (("memory", "forget", "", "-y", *STORE), "no item ''"),
    (("rollback", "nope", *STORE), "no checkpoint 'nope'"),
    (("checkpoints", "prune", "--disk-budget", "lots", *STORE), "'lots' is no size; write for instance 50GB"),
    (("checkpoints", "prune", "--disk-budget", "-5GB", *STORE), "'-5GB' is no size"),
]
STORES = [
    (("memory", "rounds"), "there is no store at"),
    (("memory", "stats", "--store", "{new}/nope.db"), "play or improve first, or name one with --store"),
    (("memory", "verify", "--store", "{new}/nope.db"), "there is no store at"),
    (("memory", "export", "{new}/x.jsonl", "--store", "{new}/nope.db"), "there is no store at"),
    (("checkpoints", "list", "--store", "{new}/nope.db"), "there is no store at"),
    (("checkpoints", "prune", "--store", "{new}/nope.db"), "there is no store at"),
    (("rollback", "--store", "{new}/nope.db"), "there is no store at"),
    (("memory", "items", "--store", "{here}/newer.db"), "newer version of Engrain"),
    (("memory", "items", "--store", "{here}/prose.db"), "not a database"),
    (("memory", "items", "--store", "{here}/foreign.db"), "that is not Engrain's"),
    (("memory", "items", "--store", "{here}"), "cannot open the store"),
    (("memory", "--store", "mysql://x/y", "items"), "'mysql' is no database"),
]
FILES = [
    (("memory", "export", "{here}/text.txt", *STORE), "text.txt exists already; pass --force to replace it"),
    (("memory", "export", "{here}", *STORE), "exists already; pass --force"),
    (("memory", "export", "{here}/text.txt/x.jsonl", *STORE), "x.jsonl cannot be written"),
    (("memory", "export", "{here}/empty-folder", "--format", "jsonl", *STORE), "is a folder; name a file"),
    (("memory", "export", "-", "--format", "parquet", *STORE), "Parquet needs a folder"),
    (("memory", "export", "{here}/text.txt", "--format", "parquet", "--force", *STORE), "Parquet needs a folder"),
    (("memory", "import", "{here}/nope", *STORE), "nope cannot be read"),
    (("memory", "import", "{here}/text.txt", *STORE), "no exported store; `engrain memory export` writes one"),
    (("memory", "import", "{here}/empty.txt", *STORE), "no exported store"),
    (("memory", "import", "{here}/latin.txt", *STORE), "latin.txt cannot be read"),
    (("memory", "import", "{here}/empty.db", *STORE), "cannot be read"),
    (("memory", "import", "{here}/empty-folder", *STORE), "holds no exported store"),
    (("memory", "import", "{here}/cut-off.jsonl", *STORE), "is cut off: it should hold 5 rows of events and holds 0"),
    (("memory", "import", "{here}/table.jsonl", *STORE), "line 2 is no row of a store"),
    (("memory", "import", "{here}/newer.jsonl", *STORE), "newer version of Engrain (r9999); upgrade Engrain"),
]


@pytest.mark.parametrize(("arguments", "words"), [*UNKNOWN, *STORES, *FILES])
def test_bad_input_is_one_line_and_changes_nothing(
    here: Path, tmp_path: Path, untouched: Callable[[], bool], arguments: tuple[str, ...], words: str
) -> None:
    filled = [word.replace("{here}", str(here)).replace("{new}", str(tmp_path)) for word in arguments]
    result = CliRunner().invoke(shell.app, filled)
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 2, result.output
    line = re.sub(r"\x1b\[[0-9;]*m", "", result.stderr)
    assert line.startswith("error: "), line
    assert line.count("\n") == 1
    assert words in line
    assert untouched()
    assert not list(tmp_path.glob("*.*"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("memory", "nothing"),
        ("memory", "stats", "x"),
        ("memory", "episodes", "show"),
        ("memory", "episodes", "--limit", "0"),
        ("memory", "episodes", "--limit", "9" * 23),
        ("memory", "episodes", "--split", "dev"),
        ("memory", "items", "--offset", "-1"),
        ("memory", "items", "--offset", "9" * 23),
        ("memory", "items", "--by", "age"),
        ("memory", "lineage", "x", "--sources", "-1"),
        ("memory", "export", "x", "--format", "csv"),
        ("checkpoints", "nothing"),
        ("checkpoints", "prune", "--keep", "-1"),
        ("rollback", "a", "b"),
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


@pytest.mark.parametrize("words", ["\x00", "a\ud800b", "%_", "'; DROP TABLE items; --"])
def test_odd_words_are_searched_for_like_any_others(here: Path, words: str) -> None:
    result = CliRunner().invoke(shell.app, ["memory", "items", "search", words, "--store", str(here / "empty.db")])
    assert (result.exit_code, result.stdout) == (0, "no items\n")
