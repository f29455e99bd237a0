"""Fetching models through pip, with wheels made here: pins, faults, interruptions, two processes at once."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from agent.models import catalog, fetch
from agent.models import resolve as resolving
from agent.models.catalog import CATALOG, CatalogModel, Wheel
from agent.models.errors import (
    ConversionError,
    DiskFullError,
    FetchError,
    ModelNotCachedError,
    UnknownModelError,
    WrongHashError,
)
from agent.models.resolve import resolve

PARTS = {2: b"second", 10: b"tenth", 1: b"first"}
WHOLE = b"firstsecondtenth"


def make_wheel(folder: Path, name: str, entries: dict[str, bytes]) -> Wheel:
    """A wheel that pip will download; its code would fail loudly if it ever ran."""
    module = name.replace("-", "_")
    path = folder / f"{module}-1.0-py3-none-any.whl"
    info = f"{module}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{module}/__init__.py", "raise SystemExit('a wheel ran its code')\n")
        for entry, data in entries.items():
            archive.writestr(f"{module}/{entry}", data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return Wheel(name, "1.0", hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the only index there is; no hub either."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setattr(fetch, "download_from_hub", no_hub)
    return folder


def no_hub(repo: str, folder: Path, progress: fetch.Progress) -> str:
    raise FetchError(f"no hub for {repo} here")


def fake_convert(model: CatalogModel, gguf: Path, ready: Path, progress: fetch.Progress) -> None:
    ready.mkdir()
    (ready / "config.json").write_text("{}")
    (ready / "model.safetensors").write_bytes(gguf.read_bytes())


@pytest.fixture
def fake(index: Path, monkeypatch: pytest.MonkeyPatch) -> CatalogModel:
    """A catalogue model in three wheels, whose conversion is a copy."""
    wheels = [make_wheel(index, f"fake-part{n}", {f"data/part{n:02}.bin": data}) for n, data in PARTS.items()]
    model = CatalogModel(
        name="fake",
        title="Fake",
        wheels=tuple(wheels),
        gguf_sha256=hashlib.sha256(WHOLE).hexdigest(),
        gguf_size=len(WHOLE),
        converted_size=len(WHOLE),
        eos_ids=(2,),
        hub_id="nobody/fake",
        licence="Apache-2.0",
        provenance="made by this test",
        purpose="tests",
    )
    monkeypatch.setitem(CATALOG, "fake", model)
    monkeypatch.setattr(fetch, "_convert", fake_convert)
    return model


def leftovers(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "models").iterdir() if path.suffix != ".lock")


def test_parts_are_joined_in_number_order_and_the_manifest_names_their_pins(
    fake: CatalogModel, engrain_home: Path
) -> None:
    seen: list[tuple[str, int, int]] = []
    folder = resolve("fake", progress=lambda *report: seen.append(report))
    assert folder == engrain_home / "models" / "fake"
    assert (folder / "model.safetensors").read_bytes() == WHOLE
    written = json.loads((folder / "manifest.json").read_text())
    assert written["source"] == "wheels"
    assert [wheel["sha256"] for wheel in written["wheels"]] == [wheel.sha256 for wheel in fake.wheels]
    assert written["licence"] == "Apache-2.0"
    assert written["gguf"] == {"sha256": fake.gguf_sha256, "bytes": len(WHOLE)}
    assert leftovers(engrain_home) == ["fake"]
    assert {stage for stage, _, _ in seen} == {"downloading", "checking", "joining"}
    assert all(done <= total for _, done, total in seen)


def test_a_cached_model_is_not_fetched_again(fake: CatalogModel, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve("fake")
    monkeypatch.setattr(resolving, "fetch_model", lambda *_: pytest.fail("fetched twice"))
    assert resolve("fake", fetch=False) == first


@pytest.mark.parametrize("what", ["wheel", "gguf", "size"])
def test_a_wrong_hash_is_refused_and_leaves_nothing(
    fake: CatalogModel, engrain_home: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    first, *rest = fake.wheels
    bad = {
        "wheel": replace(fake, wheels=(replace(first, sha256="0" * 64), *rest)),
        "gguf": replace(fake, gguf_sha256="0" * 64),
        "size": replace(fake, gguf_size=3),
    }[what]
    monkeypatch.setitem(CATALOG, "fake", bad)
    with pytest.raises(WrongHashError, match="not what was pinned") as caught:
        resolve("fake")
    assert "\n" not in str(caught.value)
    assert leftovers(engrain_home) == []


def test_missing_wheels_send_us_to_the_hub(
    fake: CatalogModel, index: Path, engrain_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    next(index.glob("fake_part10*")).unlink()
    asked: list[str] = []

    def hub(repo: str, folder: Path, progress: fetch.Progress) -> str:
        asked.append(repo)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        return "c0ffee"

    monkeypatch.setattr(fetch, "download_from_hub", hub)
    folder = resolve("fake")
    assert asked == ["nobody/fake"]
    written = json.loads((folder / "manifest.json").read_text())
    assert (written["source"], written["revision"]) == ("hub", "c0ffee")
    assert leftovers(engrain_home) == ["fake"]


def test_neither_index_nor_hub_is_one_line_that_names_both(fake: CatalogModel, index: Path, engrain_home: Path) -> None:
    for wheel in index.iterdir():
        wheel.unlink()
    with pytest.raises(FetchError) as caught:
        resolve("fake")
    message = str(caught.value)
    assert "\n" not in message
    assert "fake-part" in message
    assert "no hub for nobody/fake" in message
    assert leftovers(engrain_home) == []


def test_a_full_disk_is_seen_before_the_download(
    fake: CatalogModel, engrain_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 99, 1))
    monkeypatch.setattr(fetch, "_download", lambda *_: pytest.fail("downloaded in spite of it"))
    with pytest.raises(DiskFullError, match="ENGRAIN_HOME"):
        resolve("fake")
    assert leftovers(engrain_home) == []


@pytest.mark.parametrize("stage", ["_join", "_convert"])
def test_a_disk_that_fills_up_on_the_way_leaves_nothing(
    fake: CatalogModel, engrain_home: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fetch, stage, full)
    with pytest.raises(DiskFullError, match="not enough disk for fake"):
        resolve("fake")
    assert leftovers(engrain_home) == []


def test_a_conversion_that_fails_says_why_and_leaves_nothing(
    fake: CatalogModel, engrain_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the real conversion, which cannot read this "GGUF"
    monkeypatch.setenv("ENGRAIN_HOME", str(engrain_home))
    gguf = engrain_home / "scratch" / "model.gguf"
    gguf.parent.mkdir(parents=True)
    gguf.write_bytes(WHOLE)
    with pytest.raises(ConversionError, match="cannot convert fake: ") as caught:
        fetch._convert(fake, gguf, gguf.parent / "ready", lambda *_: None)
    assert "\n" not in str(caught.value)


def test_ctrl_c_removes_what_was_begun(fake: CatalogModel, engrain_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "_check_wheels", interrupt)
    with pytest.raises(KeyboardInterrupt):
        resolve("fake")
    assert leftovers(engrain_home) == []


def test_after_a_kill_nothing_counts_as_fetched_and_the_next_fetch_tidies_up(
    fake: CatalogModel, engrain_home: Path
) -> None:
    """A real process, killed while it holds the lock in the middle of a fetch."""
    script = textwrap.dedent("""
        import sys, time
        from dataclasses import replace
        from agent.models import fetch
        from agent.models.catalog import CATALOG
        from agent.models.resolve import resolve
        CATALOG["fake"] = replace(CATALOG["smollm2-135m"], name="fake")
        def half_way(model, scratch, progress):
            (scratch / "wheels").mkdir()
            (scratch / "wheels" / "half.whl").write_bytes(b"half")
            print("begun", flush=True)
            time.sleep(60)
        fetch._download = half_way
        resolve("fake")
    """)
    root = Path(fetch.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (stale,) = leftovers(engrain_home)
    assert stale.startswith(".fake.tmp-")
    assert resolving.cached("fake") is None

    folder = resolve("fake")
    assert (folder / "model.safetensors").read_bytes() == WHOLE
    assert leftovers(engrain_home) == ["fake"]


def fetch_in_child(model: CatalogModel, results: object) -> None:
    CATALOG["fake"] = model
    downloads = []
    download = fetch._download

    def slow(*arguments: object) -> list[Path]:
        downloads.append(1)
        time.sleep(1)
        return download(*arguments)  # type: ignore[arg-type]

    fetch._download = slow  # type: ignore[assignment]
    fetch._convert = fake_convert
    resolve("fake")
    results.put(len(downloads))  # type: ignore[attr-defined]


def test_two_processes_at_once_download_once(fake: CatalogModel, engrain_home: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [context.Process(target=fetch_in_child, args=(fake, results)) for _ in range(2)]
    for child in children:
        child.start()
    counts = [results.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert sorted(counts) == [0, 1]
    assert leftovers(engrain_home) == ["fake"]


def test_remove_frees_the_model_and_says_when_there_is_none(fake: CatalogModel, engrain_home: Path) -> None:
    resolve("fake")
    assert resolving.remove("fake") > len(WHOLE)
    assert leftovers(engrain_home) == []
    with pytest.raises(ModelNotCachedError, match="nothing to remove"):
        resolving.remove("fake")
    with pytest.raises(UnknownModelError):
        resolving.remove("no-such")


@pytest.mark.parametrize("name", ["x" * 300, "~no-such-user-at-all/model"])
def test_what_cannot_be_a_path_is_an_unknown_model(name: str) -> None:
    with pytest.raises(UnknownModelError):
        resolve(name)


def test_names_folders_and_hub_ids(tmp_path: Path, engrain_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "mine").mkdir()
    with pytest.raises(UnknownModelError, match=r"without config\.json"):
        resolve(str(tmp_path / "mine"))
    (tmp_path / "mine" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert resolve("mine") == tmp_path / "mine"
    with pytest.raises(UnknownModelError, match=r"did you mean 'smollm2-135m'"):
        resolve("smolm2-135m")
    with pytest.raises(ModelNotCachedError, match="engrain model fetch smollm2-135m"):
        resolve("smollm2-135m", fetch=False)
    with pytest.raises(ModelNotCachedError, match="engrain model fetch nobody/at-all"):
        resolve("nobody/at-all", fetch=False)
    for odd in ("", "/no/such/folder", "a/b/c", "../x/y", "https://example.com/model"):
        with pytest.raises(UnknownModelError):
            resolve(odd)


def test_a_tokenizer_can_be_had_without_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def download(repo: str, *, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve("nobody/big", weights=False) == tmp_path
    assert "tokenizer*.json" in asked[0]
    assert not [pattern for pattern in asked[0] if "safetensors" in pattern]
    with pytest.raises(FetchError, match="no safetensors"):
        resolve("nobody/big")
    assert "*.safetensors" in asked[1]


def test_an_unwritable_home_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ENGRAIN_HOME", str(tmp_path / "file"))
    with pytest.raises(FetchError, match="set ENGRAIN_HOME"):
        resolve("smollm2-135m")


def test_the_catalogue_is_pinned_throughout() -> None:
    for name, model in catalog.CATALOG.items():
        assert name == model.name
        pins = [model.gguf_sha256, *(wheel.sha256 for wheel in model.wheels)]
        assert all(len(pin) == 64 and int(pin, 16) for pin in pins)
        assert len(set(pins)) == len(pins)
        assert model.licence == "Apache-2.0"
        assert model.gguf_size < fetch.space_needed(model)


@pytest.mark.model
def test_the_real_model_loads_from_its_folder_alone(smollm2: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, report = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not hasattr(model.config, "quantization_config")
    assert model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [1, 2]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    reply = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0][prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(reply)
