"""A folder with one of every broken thing, and what tells whether a command changed any of it."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from memory.store import Store

_NO_SYSTEM = """{%- for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
_NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="session")
def here(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    """Broken models, stores, data sets, settings and texts, beside a tiny model and an empty store that are whole."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # as the command line does it by the environment
    folder = tmp_path_factory.mktemp("here")
    _models(folder, tiny_model, tiny_tokenizer)
    _stores(folder)
    for name, text in {
        "text.txt": "Knock first.",
        "long.txt": "Knock first. " * 1000,
        "empty.txt": " \n",
        "empty.jsonl": "",
        "array.jsonl": "[1]\n",
        "prose.jsonl": "hello\n",
        "cell.jsonl": '{"question": "q", "answer": [1]}\n',
        "key.jsonl": '{"frage": "q", "answer": "1"}\n',
        "bad.parquet": "hello",
        "cut.json": '{"model": ',
        "list.json": "[1, 2]",
        "seed.json": '{"model": "m", "world": {"env": "math"}, "seed": "x"}',
        "typo.json": '{"model": "m", "world": {"env": "math"}, "sead": 1}',
        "deep.json": '{"model": "m", "world": {"env": "math"}, "distill": {"sampling": {"max_token": 5}}}',
        "guard.json": '{"model": "m", "world": {"env": "math"}, "distill": {"guard": {"warmup": 5}}}',
        "sampling.json": '{"model": "m", "world": {"env": "math"}, "distill": {"sampling": {"max_tokens": -5}}}',
        "cut-off.jsonl": '{"engrain": {"revision": "r0001", "rows": {"events": 5}}}\n',
        "table.jsonl": '{"engrain": {"revision": "r0001", "rows": {"x": 1}}}\n{"table": "nonesuch", "a": 1}\n',
        "newer.jsonl": '{"engrain": {"revision": "r9999", "rows": {}}}\n',
    }.items():
        (folder / name).write_text(text)
    (folder / "latin.txt").write_bytes(b"\xe9\xff")
    (folder / "latin.jsonl").write_bytes(b'{"question": "caf\xe9?", "answer": "1"}\n')
    (folder / "game.ulx").write_bytes(b"Glul")
    (folder / "game.z8").write_bytes(b"\x08" + b"\xff" * 99)
    (folder / "empty-folder").mkdir()
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "manifest.json").write_text("[]")
    return folder


def _models(folder: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    whole = folder / "tiny"
    tiny_model().save_pretrained(whole)
    tiny_tokenizer.save_pretrained(whole)
    weights = (whole / "model.safetensors").read_bytes()
    config = json.loads((whole / "config.json").read_text())
    own_code = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    changes: dict[str, dict[str, bytes | str | None]] = {
        "no-header": {"model.safetensors": b"\x00" * 50},
        "cut-weights": {"model.safetensors": weights[:-1000]},
        "pickled": {"model.safetensors": None, "pytorch_model.bin": b"\x80\x04."},
        "broken": {"config.json": "{"},
        "half": {"model.safetensors": None},
        "contradiction": {"config.json": json.dumps({**config, "num_hidden_layers": 3})},
        "other-sizes": {"config.json": json.dumps({**config, "num_hidden_layers": 3, "layer_types": None})},
        "unknown-kind": {"config.json": json.dumps({**config, "model_type": "nonesuch"})},
        "own-code": {
            "config.json": json.dumps(
                {
                    **config,
                    "model_type": "own",
                    "auto_map": own_code,
                }
            ),
            "own.py": "raise SystemExit('this file was run')\n",
        },
        "no-vocabulary": {"tokenizer.json": None},
        "bad-tokenizer": {"tokenizer.json": "{"},
        "odd-tokenizer": {"tokenizer.json": '{"version": "1.0", "model": {"type": "Nonesuch"}}'},
        "no-template": {"chat_template.jinja": None},
        "bad-template": {"chat_template.jinja": "{% for m in %}"},
        "no-system": {"chat_template.jinja": _NO_SYSTEM},
        "no-end": {"chat_template.jinja": _NO_END},
    }
    for name, files in changes.items():
        shutil.copytree(whole, folder / name)
        for file, content in files.items():
            if content is None:
                (folder / name / file).unlink()
            else:
                (folder / name / file).write_bytes(content.encode() if isinstance(content, str) else content)


def _stores(folder: Path) -> None:
    (folder / "prose.db").write_text("no database " * 99)
    Store.open(str(folder / "empty.db")).close()
    Store.open(str(folder / "newer.db")).close()
    for name, statement in {
        "newer.db": "UPDATE engrain_version SET version_num = 'r9999'",
        "foreign.db": "CREATE TABLE items (x)",
    }.items():
        with closing(sqlite3.connect(folder / name)) as connection, connection:
            connection.execute(statement)


def contents(folder: Path) -> dict[str, str]:
    """Every file with its size and time of writing; a database with what it holds, however its pages lie."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name.endswith(("-wal", "-shm")):
            continue
        said = f"{path.stat().st_size} {path.stat().st_mtime_ns}"
        if path.suffix == ".db" and path.name != "prose.db":
            with closing(sqlite3.connect(path)) as connection:
                said = hashlib.sha256("\n".join(connection.iterdump()).encode()).hexdigest()
        found[str(path.relative_to(folder))] = said
    return found


@pytest.fixture
def untouched(here: Path) -> Callable[[], bool]:
    """Asks whether the folder is as it was when the test began."""
    before = contents(here)
    return lambda: contents(here) == before
