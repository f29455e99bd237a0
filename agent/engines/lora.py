"""Sampling from a LoRA adapter at the base model's cost: its weights go into the layers, and come out again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer


def can_merge(model: Any) -> bool:
    """Whether every active LoRA layer is a plain linear one whose weight no other module uses.

    False without LoRA layers, for quantised layers, DoRA and other variants, adapters with a bias, layers that
    are merged or switched off already, and tied weights.
    """
    layers = _lora_layers(model)
    if not layers:
        return False
    counts: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return all(
        type(layer) is LoraLinear
        and not layer.merged
        and not layer.disable_adapters
        and not any(layer.lora_bias.get(name) for name in layer.active_adapters)
        and not any(name in layer.lora_variant for name in layer.active_adapters)
        and _weight(layer).is_floating_point()
        and counts[id(_weight(layer))] == 1
        for layer in layers
    )


@contextmanager
def merged(model: Any) -> Iterator[None]:
    """Inside, the active adapters are part of the linear layers' weights: W + scale * B A, rounded once.

    Afterwards every weight is bitwise what it was: the originals are held aside, not computed back. Costs the
    memory of the touched layers once more. Does nothing where `can_merge` says no. Not for training: the adapter
    gets no gradient while it is merged.
    """
    if not can_merge(model):
        yield
        return
    originals: list[tuple[Any, torch.Tensor]] = []
    try:
        with torch.no_grad():
            for layer in _lora_layers(model):
                names = [name for name in layer.active_adapters if name in layer.lora_A]
                weight = _weight(layer)
                original = weight.data
                total = layer.get_delta_weight(names[0]).float()  # a fresh tensor: added to in place
                for name in names[1:]:
                    total += layer.get_delta_weight(name).float()
                total += original
                originals.append((layer, original))
                weight.data = total.to(original.dtype)
                layer.merged_adapters.extend(names)
        yield
    finally:
        for layer, original in originals:
            _weight(layer).data = original
            layer.merged_adapters.clear()


def _lora_layers(model: Any) -> list[Any]:
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return [layer for layer in layers if any(name in layer.lora_A for name in layer.active_adapters)]


def _weight(layer: Any) -> Any:
    return layer.get_base_layer().weight
