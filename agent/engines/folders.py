"""Checkpoint folders as engines see them: LoRA adapters or full weights, in safetensors."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from agent.errors import CheckpointError


def is_adapter(folder: Path) -> bool:
    """Whether a checkpoint folder holds a LoRA adapter; full weights if not."""
    return (folder / "adapter_config.json").is_file()


def identity(folder: Path) -> str:
    """The id of a checkpoint: what training wrote in its manifest, else the folder's name."""
    try:
        return str(json.loads((folder / "manifest.json").read_text())["id"])
    except (OSError, ValueError, KeyError, TypeError):
        return folder.name


def check_folder(folder: Path) -> None:
    """Refuse a folder that is not a checkpoint, before anything is unloaded.

    Raises:
        CheckpointError: it does not exist, holds no safetensors, or its configuration is not JSON.
    """
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint folder {folder} does not exist")
    for config, weights in (("adapter_config.json", "adapter_model"), ("config.json", "model")):
        if (folder / config).is_file():
            if not any(folder.glob(f"{weights}*.safetensors")):
                raise CheckpointError(f"{folder} has {config} but no {weights}.safetensors")
            try:
                json.loads((folder / config).read_text())
            except ValueError as error:
                raise CheckpointError(f"{folder / config} is not JSON: {error}") from error
            return
    raise CheckpointError(f"{folder} holds neither adapter_config.json (LoRA) nor config.json (full weights)")


def check_weights(folder: Path, base: Path) -> None:
    """Refuse whole weights that are not of the base model's architecture and sizes.

    Raises:
        CheckpointError: a tensor of the base model is missing or of another shape; the message names it.
    """
    theirs, ours = _shapes(folder), _shapes(base)
    for name, shape in ours.items():
        if name not in theirs and name != "lm_head.weight":  # an output head may be tied in one and written out in two
            raise CheckpointError(f"checkpoint {folder} does not fit {base.name}: it has no {name}")
        if theirs.get(name, shape) != shape:
            raise CheckpointError(
                f"checkpoint {folder} does not fit {base.name}: {name} is {theirs[name]} there and {shape} here"
            )


def _shapes(folder: Path) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
    return shapes
