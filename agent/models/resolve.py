"""From what a user writes after `--model` to a folder that transformers can load."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from agent.models.catalog import CATALOG
from agent.models.errors import FetchError, ModelNotCachedError, UnknownModelError
from agent.models.fetch import HUB_PATTERNS, Progress
from agent.models.fetch import fetch as fetch_model
from agent.models.paths import models_dir

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(model: str, *, fetch: bool = True, weights: bool = True, progress: Progress | None = None) -> Path:
    """The folder of `model`: a short name of the catalogue, a local folder, or a Hugging Face id.

    A short name is fetched when it is not cached yet; two processes that ask at once fetch once. `progress` is
    called as (stage, bytes done, bytes in all or 0). Without `weights` a hub id's configuration and tokenizer will do.

    Raises:
        UnknownModelError: `model` is none of the three.
        ModelNotCachedError: it would have to be fetched, and `fetch` is False.
        FetchError: it cannot be had from here; also WrongHashError, DiskFullError and ConversionError.
    """
    report = progress or _silent
    if model in CATALOG:
        return _resolve_short(model, fetch, report)
    local = _folder(model)
    if local is not None:
        if not (local / "config.json").is_file():
            raise UnknownModelError(f"{model!r} is a folder without config.json, not a model")
        return local.absolute()
    if _HUB_ID.fullmatch(model):
        return _resolve_hub(model, fetch, weights, report)
    near = get_close_matches(model, CATALOG, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known names: {', '.join(CATALOG)};"
    raise UnknownModelError(f"unknown model {model!r}: {hint} a model folder or a hub id (owner/name) works too")


def _folder(model: str) -> Path | None:
    """The folder of that name, None also where the name cannot be one (too long, or of an unknown user's home)."""
    if not model:  # a path's empty name would be the current folder
        return None
    try:
        local = Path(model).expanduser()
        return local if local.is_dir() else None
    except (OSError, RuntimeError):
        return None


def cached(name: str) -> Path | None:
    """The folder of a catalogue model if it is complete on this machine."""
    folder = models_dir() / name
    return folder if (folder / "manifest.json").is_file() else None


def manifest(name: str) -> dict[str, Any] | None:
    """What was written down when the catalogue model was fetched; None if it is not cached."""
    folder = cached(name)
    return json.loads((folder / "manifest.json").read_text()) if folder else None


def remove(name: str) -> int:
    """Delete a cached catalogue model and return the bytes freed.

    Raises:
        UnknownModelError: no such short name.
        ModelNotCachedError: there is nothing to delete.
    """
    if name not in CATALOG:
        raise UnknownModelError(f"unknown model {name!r}: known names: {', '.join(CATALOG)}")
    with _lock(name, _silent):
        folder = cached(name)
        if folder is None:
            raise ModelNotCachedError(f"{name!r} is not cached: there is nothing to remove")
        size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        # The manifest goes first: a removal that is cut off leaves a folder that counts as absent.
        (folder / "manifest.json").unlink()
        shutil.rmtree(folder)
    return size


def _resolve_short(name: str, fetch: bool, report: Progress) -> Path:
    folder = cached(name)
    if folder:
        return folder
    if not fetch:
        raise ModelNotCachedError(f"{name!r} is not on this machine; run `engrain model fetch {name}`")
    with _lock(name, report):
        # Another process may have fetched it while this one waited.
        folder = cached(name)
        if folder is None:
            folder = models_dir() / name
            fetch_model(CATALOG[name], folder, report)
    return folder


def _resolve_hub(repo: str, fetch: bool, weights: bool, report: Progress) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [pattern for pattern in HUB_PATTERNS if weights or "safetensors" not in pattern]
    try:
        if not fetch:
            return Path(snapshot_download(repo, allow_patterns=patterns, local_files_only=True))
        report(f"downloading {repo}", 0, 0)
        folder = Path(snapshot_download(repo, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        if not fetch:
            raise ModelNotCachedError(f"{repo!r} is not on this machine; run `engrain model fetch {repo}`") from error
        raise _hub_unreachable(repo) from error
    except HfHubHTTPError as error:
        raise FetchError(f"the Hugging Face hub has no readable model {repo!r}; check the id") from error
    except OSError as error:
        raise _hub_unreachable(repo) from error
    except Exception as error:  # the hub client raises its HTTP library's own errors
        raise _hub_unreachable(repo) from error
    if weights and not list(folder.glob("*.safetensors")):
        raise FetchError(f"{repo!r} holds no safetensors: Engrain loads nothing else")
    return folder


def _hub_unreachable(repo: str) -> FetchError:
    return FetchError(
        f"{repo!r} is neither a folder nor cached, and the Hugging Face hub cannot be reached; "
        f"these come through the package index: {', '.join(CATALOG)}"
    )


@contextmanager
def _lock(name: str, report: Progress) -> Iterator[None]:
    """Hold the model's lock; it is freed by the system when its holder dies."""
    from filelock import FileLock, Timeout

    path = models_dir() / f".{name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            report("waiting for another process that fetches it", 0, 0)
            lock.acquire()
    except OSError as error:
        raise FetchError(f"cannot write to {path.parent}: {error.strerror}; set ENGRAIN_HOME") from error
    try:
        yield
    finally:
        lock.release()


def _silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""
