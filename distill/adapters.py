"""LoRA adapters by PEFT: a student's own, and its teacher's where that is not the base model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from distill.config import LoraSettings, TeacherKind
from distill.errors import CheckpointError

#: Name of the adapter that trains; PEFT's own default, so that checkpoints load anywhere.
STUDENT = "default"
#: Name of the teacher's adapter: the previous checkpoint, or the student's moving average.
TEACHER = "teacher"


def add_lora(model: nn.Module, settings: LoraSettings, seed: int) -> PeftModel:
    """Put a fresh adapter on all linear layers but the output head; `seed` fixes its start. Its effect is nil."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast(PeftModel, get_peft_model(cast(Any, model), _peft(settings)))


def continue_lora(
    model: nn.Module,
    settings: LoraSettings,
    seed: int,
    parent: Path | None,
    kind: TeacherKind = "previous_checkpoint",
) -> PeftModel:
    """A student that starts where `parent` ended, or afresh, with the teacher's adapter beside it if it needs one.

    The teacher is the parent (`previous_checkpoint`), the base model whatever the parent (`frozen`), or a copy of the
    student that `follow` moves (`ema`).

    Raises:
        CheckpointError: the parent is no adapter of this rank and scale.
    """
    student = add_lora(model, settings, seed)
    if parent is not None:
        _load_parent(student, settings, parent)
    if kind == "ema" or (kind == "previous_checkpoint" and parent is not None):
        student.add_adapter(TEACHER, _peft(settings))
        follow(student, 1.0)
        _activate(student, STUDENT)
    return student


def follow(model: nn.Module, rate: float) -> None:
    """Move the teacher's adapter towards the student's: w_T += rate (w_S - w_T), for A and B each."""
    for theirs, ours in _pairs(model):
        theirs.data.lerp_(ours.data, rate)


def teacher_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The teacher's adapter by number, for a checkpoint's trainer state; empty without one."""
    return {str(index): theirs.data for index, (theirs, _) in enumerate(_pairs(model))}


def _pairs(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    weights = dict(model.named_parameters())
    return [
        (weight, weights[name.replace(f".{TEACHER}.", f".{STUDENT}.")])
        for name, weight in weights.items()
        if "lora_" in name and f".{TEACHER}." in name
    ]


def _load_parent(student: PeftModel, settings: LoraSettings, parent: Path) -> None:
    theirs = LoraConfig.from_pretrained(str(parent))
    if (theirs.r, theirs.lora_alpha) != (settings.rank, settings.alpha):
        raise CheckpointError(
            f"checkpoint {parent} has rank {theirs.r} and alpha {theirs.lora_alpha}, this run {settings.rank} and "
            f"{settings.alpha}; use the same"
        )
    tensors = load_file(parent / "adapter_model.safetensors")
    set_peft_model_state_dict(student, tensors, adapter_name=STUDENT)


@contextmanager
def teacher_weights(model: nn.Module) -> Iterator[None]:
    """Within it the model is its teacher: the teacher's adapter if there is one, else the base. A plain model stays."""
    if not isinstance(model, PeftModel):
        yield
    elif TEACHER in model.peft_config:
        _activate(model, TEACHER)
        try:
            yield
        finally:
            _activate(model, STUDENT)
    else:
        with model.disable_adapter():
            yield


def _activate(model: PeftModel, name: str) -> None:
    """Switch adapters; only the student's ever asks for gradients."""
    cast(Any, model.base_model).set_adapter(name)
    for key, weight in model.named_parameters():
        weight.requires_grad_("lora_" in key and f".{STUDENT}." in key)


def _peft(settings: LoraSettings) -> LoraConfig:
    return LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
