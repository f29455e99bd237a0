"""LoRA adapters by PEFT: a student's own, and the frozen one it is taught by from the second round on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from distill.config import LoraSettings
from distill.errors import CheckpointError

#: Name of the adapter that trains; PEFT's own default, so that checkpoints load anywhere.
STUDENT = "default"
#: Name of the frozen adapter of the previous checkpoint.
TEACHER = "teacher"


def add_lora(model: nn.Module, settings: LoraSettings, seed: int) -> PeftModel:
    """Put a fresh adapter on all linear layers but the output head; `seed` fixes its start. Its effect is nil."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast(PeftModel, get_peft_model(cast(Any, model), _peft(settings)))


def continue_lora(model: nn.Module, settings: LoraSettings, seed: int, parent: Path | None) -> PeftModel:
    """A student that starts where `parent` ended and is taught by it, frozen; a fresh adapter without a parent.

    Raises:
        CheckpointError: the parent is no adapter of this rank and scale.
    """
    student = add_lora(model, settings, seed)
    if parent is None:
        return student
    theirs = LoraConfig.from_pretrained(str(parent))
    if (theirs.r, theirs.lora_alpha) != (settings.rank, settings.alpha):
        raise CheckpointError(
            f"checkpoint {parent} has rank {theirs.r} and alpha {theirs.lora_alpha}, this run {settings.rank} and "
            f"{settings.alpha}; use the same"
        )
    student.add_adapter(TEACHER, _peft(settings))
    tensors = load_file(parent / "adapter_model.safetensors")
    for name in (STUDENT, TEACHER):
        set_peft_model_state_dict(student, tensors, adapter_name=name)
    _activate(student, STUDENT)
    return student


@contextmanager
def teacher_weights(model: nn.Module) -> Iterator[None]:
    """Within it the model is its teacher: the frozen adapter if there is one, else the base. A plain model stays."""
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
