"""Sampling from a LoRA adapter at the base model's cost: its weights go into the layers, and come out again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor

_BLOCK = 2**20  # weights made at a time: their float32 copy stays small, and in the processor's caches


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
    originals: list[tuple[Any, Tensor]] = []
    try:
        with torch.no_grad():
            for layer in _lora_layers(model):
                names = [name for name in layer.active_adapters if name in layer.lora_A]
                weight = _weight(layer)
                total = _sum(layer, names)
                originals.append((layer, weight.data))
                weight.data = total
                layer.merged_adapters.extend(names)
        yield
    finally:
        for layer, original in originals:
            _weight(layer).data = original
            layer.merged_adapters.clear()


def _lora_layers(model: Any) -> list[Any]:
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return [layer for layer in layers if any(name in layer.lora_A for name in layer.active_adapters)]


def _sum(layer: Any, names: list[str]) -> Tensor:
    """W + sum of scale * B A over the named adapters, in float32 (float64 stays) and rounded once."""
    weight = _weight(layer).data
    wide = torch.promote_types(weight.dtype, torch.float32)
    factors = [(layer.lora_B[n].weight.to(wide), layer.lora_A[n].weight.to(wide), layer.scaling[n]) for n in names]
    total = torch.empty_like(weight)
    old, new = (weight.T, total.T) if layer.fan_in_fan_out else (weight, total)
    rows = max(1, _BLOCK // old.shape[1])
    for start in range(0, old.shape[0], rows):
        part = slice(start, start + rows)
        block = old[part].to(wide, copy=True)
        for up, down, scale in factors:
            block.addmm_(up[part], down, alpha=scale)
        new[part] = block
    return total


def _weight(layer: Any) -> Any:
    return layer.get_base_layer().weight
