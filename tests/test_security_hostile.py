"""Hostile text, data, models and stores, against the real thing: nothing of theirs runs, escapes or is repeated."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import engrain.cli as shell
from agent.engines.folders import check_folder
from agent.episode import Message
from agent.errors import ChatTemplateError, CheckpointError
from agent.renderer import Renderer
from engrain.redaction import redact, redacted
from engrain.settings import round_dir, runs_dir
from envs.errors import UsageError
from envs.verify import AnswerChecker
from memory.records import CheckpointRecord
from memory.store import Store

ATTACKS = [
    "__import__('os').system('touch {mark}')",
    "(lambda: open('{mark}', 'w'))()",
    "x.__class__.__base__.__subclasses__()",
    "exec('x')",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_parser_that_evaluates_never_sees_code(attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in a model's answer nor in a data set's: SymPy's parser ends in `eval`."""

    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("it reached the parser")

    monkeypatch.setattr(subprocess, "Popen", started)
    text = attack.format(mark=tmp_path / "mark")
    checker = AnswerChecker()
    assert not checker.equal(text, "1/2 + x")
    assert not checker.equal("1/2 + x", text)
    assert checker.equal(text, text)  # the same words are the same words


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({}) }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_chat_template_is_confined(template: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = template.replace("MARK", str(tmp_path / "mark"))
    with pytest.raises(ChatTemplateError, match="refuses messages"):
        Renderer(tokenizer).prompt([Message(role="user", content="a")])
    assert not (tmp_path / "mark").exists()


def test_code_and_pickles_in_a_model_folder_are_not_run(tiny_folder: Path, tmp_path: Path) -> None:
    import pickle

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "mark",))

    evil = pickle.dumps(Payload())
    own = f"import pathlib; pathlib.Path({str(tmp_path / 'mark')!r}).touch()\n"
    for name in ("own.py", "modeling_own.py", "setup.py", "__init__.py"):
        (tiny_folder / name).write_text(own)
    (tiny_folder / "pytorch_model.bin").write_bytes(evil)
    (tiny_folder / "model.safetensors").unlink()
    config = json.loads((tiny_folder / "config.json").read_text())
    for changed in ({}, {"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}):
        (tiny_folder / "config.json").write_text(json.dumps({**config, **changed}))
        result = CliRunner().invoke(shell.app, ["eval", "math", "-n", "1", "-m", str(tiny_folder)])
        assert result.exit_code == 2, result.output
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.bin").write_bytes(evil)
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        check_folder(adapter)
    assert not (tmp_path / "mark").exists()
    pickle.loads(evil)  # it would have
    assert (tmp_path / "mark").exists()


def test_what_a_world_says_cannot_steer_a_terminal_from_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from engrain.cli import doctor

    def hostile(network: bool) -> None:
        raise UsageError("bad \x1b]0;title\x07 and \x1b[2J[red]markup[/] \x9b31m")

    monkeypatch.setattr(doctor, "checks", hostile)
    result = CliRunner().invoke(shell.app, ["doctor"], color=True)
    assert result.exit_code == 2
    said = result.stderr.split("bad ", 1)[1]
    assert not {"\x1b", "\x07", "\x9b"} & set(said)
    assert "[red]markup[/]" in said


def test_a_store_cannot_name_a_folder_outside_the_runs() -> None:
    assert round_dir("24724c60db894c0da2e9").parent == runs_dir()
    for name in ("../../x", "a/b", "", "x" * 200, "..", "a\x00"):
        with pytest.raises(UsageError, match="which no round is called"):
            round_dir(name)


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "naïve", "tab\tbed"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_repeated(key: str, tiny_folder: Path) -> None:
    words = ["eval", "math", "-n", "1", "-m", str(tiny_folder), "--base-url", "http://127.0.0.1:9/v1"]
    result = CliRunner().invoke(shell.app, words, env={"ENGRAIN_API_KEY": key, "ENGRAIN_SERVER_PATIENCE": "0"})
    assert result.exit_code == 2
    assert "error: ENGRAIN_API_KEY: a key is printable ASCII" in result.stderr
    assert key not in result.output
    assert repr(key)[1:-1] not in result.output


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("postgresql://me:p4ss@host/db", "p4ss"),
        ("cannot reach http://user:p4ss@10.0.0.1:8000/v1", "p4ss"),
        ("Authorization: Bearer p4ss", "p4ss"),
        ('{"api_key": "p4ss"}', "p4ss"),
        ("https://host/v1?api_key=p4ss&x=1", "p4ss"),
        ("ENGRAIN_API_KEY=p4ss", "p4ss"),
        ("password='p4ss'", "p4ss"),
        ("the key k3y is wrong", "k3y"),
    ],
)
def test_secrets_are_hidden_in_text_and_in_settings(text: str, secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGRAIN_API_KEY", "k3y")
    assert secret not in redact(text)
    assert secret not in json.dumps(redacted({"deep": [{"text": text, "password": secret}]}))
    assert redact("max_tokens=64, token 7, at http://host:8000/v1") == "max_tokens=64, token 7, at http://host:8000/v1"


def test_a_hostile_export_is_refused_whole(tmp_path: Path) -> None:
    url = str(tmp_path / "x.db")
    evil = [
        {"engrain": {"revision": "r0001", "rows": {"events": 1}}},
        {"table": "sqlite_master", "name": "x"},
        {"table": "events", "id": "1; DROP TABLE items", "__class__": "x"},
    ]
    for row in evil[1:]:
        path = tmp_path / "x.jsonl"
        path.write_text(json.dumps(evil[0]) + "\n" + json.dumps(row) + "\n")
        result = CliRunner().invoke(shell.app, ["memory", "import", str(path), "--store", url])
        assert result.exit_code == 2, (result.output, result.exception)
    checked = CliRunner().invoke(shell.app, ["memory", "verify", "--store", url])
    assert checked.exit_code == 0, checked.output


def test_what_a_shared_store_says_of_its_checkpoints_is_shown_as_it_stands(tmp_path: Path) -> None:
    url = str(tmp_path / "x.db")
    with Store.open(url) as store:
        store.add_checkpoint(CheckpointRecord(id="c1", model="[red]m[/red]", path="/x\x1b[2J[/nope]", kind="lora"))
    words = ["checkpoints", "list", "--store", url]
    result = CliRunner().invoke(shell.app, words, env={"COLUMNS": "200"})
    assert result.exit_code == 0, repr(result.exception)
    assert "[red]m[/red]" in result.stdout
    assert "\x1b[2J" not in result.stdout
    plain = CliRunner().invoke(shell.app, [*words, "--json"])
    assert "\x1b" not in plain.stdout
