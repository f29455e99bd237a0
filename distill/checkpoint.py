"""Checkpoints on disk: safetensors weights, a manifest of where they come from, and what a resume needs.

A checkpoint is a folder `step-000010/` that appears whole or not at all, and is on the disk when it does.
`manifest.json` names its base model, its parent, the knowledge it was taught, the configuration and the versions of
the libraries. The newest one also holds the optimiser's tensors, and what the teacher keeps, so that a killed
run goes on from there and ends in the same state as an unbroken one. Nothing in it depends on how many processes
trained it: they put what they share together, and the main one writes.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, set_peft_model_state_dict
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distill.adapters import STUDENT
from distill.distributed import from_main, is_main, like, whole
from distill.errors import CheckpointError
from distill.teacher import Teacher

_OPTIMIZER = "optimizer.safetensors"
_STATE = "trainer_state.json"
_TEACHER = "teacher.safetensors"
_DRAFT, _DYING = ".draft", ".dying"  # what a folder is called, behind a dot, before it is whole and while it goes
_LIBRARIES = ("engrain", "torch", "transformers", "peft", "safetensors")


class Manifest(BaseModel):
    """Where a checkpoint comes from. `id` is a digest of its weights and its lineage."""

    model_config = ConfigDict(frozen=True)

    id: str
    kind: str  # "lora" or "full"
    model: str
    parent: str | None
    knowledge: str | None
    step: int
    config: Mapping[str, Any]
    seed: int
    versions: Mapping[str, str]
    created_at: datetime


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that shape a result."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def weights_id(folder: Path, manifest: Manifest) -> str:
    """The id that the weights in a checkpoint folder have: the manifest's own, unless a file was changed since.

    Raises:
        OSError: a file cannot be read.
    """
    lineage = [manifest.model, manifest.parent, manifest.knowledge, manifest.step, manifest.seed]
    digest = hashlib.sha256(json.dumps(lineage).encode())
    for file in sorted(folder.glob("*.safetensors")):
        if file.name not in (_OPTIMIZER, _TEACHER):  # written after the id was made
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    *,
    base_model: str,
    parent: str | None,
    knowledge: str | None,
    step: int,
    config: Mapping[str, Any],
    seed: int,
    optimizer: torch.optim.Optimizer | None = None,
    state: Mapping[str, Any] | None = None,
    teacher: Mapping[str, Tensor] | None = None,
) -> Manifest:
    """Write a checkpoint folder atomically and return its manifest. An existing folder of that name is replaced.

    Every process calls it, the main one writes.
    """
    weights = _whole_weights(model)
    moments = {} if optimizer is None else _optimizer_tensors(optimizer)
    followed = {name: whole(tensor).contiguous() for name, tensor in (teacher or {}).items()}

    def write() -> Manifest:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = folder.with_name(f".{folder.name}{_DRAFT}")
        if draft.exists():  # of a process that was killed
            shutil.rmtree(draft)
        draft.mkdir()
        try:
            _write_weights(draft, model, weights)
            digest = hashlib.sha256(json.dumps([base_model, parent, knowledge, step, seed]).encode())
            for file in sorted(draft.glob("*.safetensors")):
                digest.update(file.read_bytes())
            manifest = Manifest(
                id=digest.hexdigest()[:16],
                kind="lora" if isinstance(model, PeftModel) else "full",
                model=base_model,
                parent=parent,
                knowledge=knowledge,
                step=step,
                config=config,
                seed=seed,
                versions=versions(),
                created_at=datetime.now(UTC),
            )
            (draft / "manifest.json").write_text(manifest.model_dump_json(indent=2) + "\n")
            if optimizer is not None:
                save_file(moments, draft / _OPTIMIZER)
                if followed:
                    save_file(followed, draft / _TEACHER)
                (draft / _STATE).write_text(json.dumps({"step": step, **(state or {})}))
            for file in draft.iterdir():
                on_disk(file)
            on_disk(draft)
            if folder.exists():
                remove_checkpoint(folder)
            draft.replace(folder)
            on_disk(folder.parent)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        return manifest

    return from_main(write)


def on_disk(path: Path) -> None:
    """Return when a file, or what a folder lists, would outlast a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint folder, out of sight first: a process that is killed here leaves no half of one."""
    dying = folder.with_name(f".{folder.name}{_DYING}")
    if dying.exists():
        shutil.rmtree(dying)
    folder.replace(dying)
    shutil.rmtree(dying)


def tidy(run: Path, newest: Path, stays: Callable[[int], bool]) -> None:
    """Remove from a run's folder what only the newest checkpoint needs, or a killed process left there.

    Args:
        run: the run's folder.
        newest: the checkpoint that the run goes on from; it is left as it is.
        stays: whether the checkpoint of a step outlives the next one. One that does loses its optimiser state.
    """
    for left in (*run.glob(f".step-*{_DRAFT}"), *run.glob(f".step-*{_DYING}")):
        shutil.rmtree(left)
    for folder in run.glob("step-" + 6 * "[0-9]"):
        if folder == newest:
            continue
        if stays(int(folder.name.removeprefix("step-"))):
            drop_trainer_state(folder)
        else:
            remove_checkpoint(folder)


def save_weights(folder: Path, model: nn.Module) -> None:
    """Write the student's adapter, or all weights of a plain model, as any engine loads them.

    Every process calls it, the main one writes.
    """
    weights = _whole_weights(model)
    from_main(lambda: _write_weights(folder, model, weights))


def _write_weights(folder: Path, model: nn.Module, weights: dict[str, Tensor] | None) -> None:
    options: dict[str, Any] = {"selected_adapters": [STUDENT]} if isinstance(model, PeftModel) else {}
    if weights is not None:
        options["state_dict"] = weights
    cast(Any, model).save_pretrained(folder, safe_serialization=True, **options)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's model-card template says nothing of this model


def _whole_weights(model: nn.Module) -> dict[str, Tensor] | None:
    """What a sharded model has to write, put together in the main process; None for one that lies here whole."""
    parameters = dict(model.named_parameters())
    if not any(isinstance(parameter, DTensor) for parameter in parameters.values()):
        return None
    found = {}
    for name, parameter in parameters.items():
        if isinstance(model, PeftModel) and not ("lora_" in name and f".{STUDENT}." in name):
            continue
        tensor = whole(parameter.detach())
        if is_main():
            found[name] = tensor.cpu()
    return found


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    try:
        return Manifest.model_validate_json((folder / "manifest.json").read_bytes())
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = f"{'.'.join(map(str, fault['loc']))}: " if fault["loc"] else ""
        reason = f"{where}{fault['msg']}"
        raise CheckpointError(f"{folder} is no checkpoint: its manifest.json is wrong ({reason})") from error
    except OSError as error:
        raise CheckpointError(f"{folder} is no checkpoint: its manifest.json cannot be read ({error})") from error


def latest_resumable(run: Path) -> Path | None:
    """The newest whole checkpoint of a run that holds a trainer state."""
    return max((p.parent for p in run.glob(f"step-*/{_STATE}")), default=None, key=lambda p: p.name)


def restore_weights(folder: Path, model: nn.Module, teacher: Teacher) -> dict[str, Any]:
    """Load the weights of a resumable checkpoint into `model`, and what its teacher kept; the saved state.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    with _resuming(folder):
        load_weights(folder, model)
        followed = load_file(folder / _TEACHER) if (folder / _TEACHER).exists() else {}
        state = cast(dict[str, Any], json.loads((folder / _STATE).read_text()))
    teacher.restore(followed)
    return state


def restore_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimiser's tensors of a resumable checkpoint, sharded as its parameters are.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    with _resuming(folder):
        tensors = load_file(folder / _OPTIMIZER)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    blob = optimizer.state_dict()
    restored: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        restored.setdefault(int(index), {})[key] = like(tensor, parameters[int(index)])
    blob["state"] = restored
    optimizer.load_state_dict(blob)


@contextmanager
def _resuming(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{folder} cannot be resumed from: {error}; delete it to go on from an older one"
        ) from error


def load_weights(folder: Path, model: nn.Module) -> None:
    """Copy a checkpoint's weights into a model of the same shape (adapter into adapter, full into full)."""
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
        return
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(shard)
    missing = model.load_state_dict(tensors, strict=False).missing_keys
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if set(missing) - tied:
        raise CheckpointError(f"{folder} lacks the weights {', '.join(sorted(set(missing) - tied)[:3])}")


def drop_trainer_state(folder: Path) -> None:
    """Forget a checkpoint's optimiser state; its weights stay."""
    (folder / _STATE).unlink(missing_ok=True)
    (folder / _OPTIMIZER).unlink(missing_ok=True)
    (folder / _TEACHER).unlink(missing_ok=True)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{index}.{key}": whole(value).contiguous()
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
        if isinstance(value, torch.Tensor)
    }
