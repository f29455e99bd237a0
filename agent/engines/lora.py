"""Sampling from a LoRA adapter at the base model's cost: its weights go into the layers, and come out again."""

from __future__ import annotations

from collections import Counter
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
    return bool(_mergeable(model))


@contextmanager
def merged(model: Any) -> Iterator[None]:
    """Inside, the active adapters are part of the linear layers' weights: W + scale * B A, rounded once.

    Afterwards every weight is bitwise what it was: the originals are held aside, not computed back. Costs the
    memory of the touched layers once more. Does nothing where `can_merge` says no. Not for training: the adapter
    gets no gradient while it is merged.
    """
    originals: list[tuple[Any, Tensor]] = []
    try:
        with torch.no_grad():
            scratch = torch.empty(0)
            for layer in _mergeable(model):
                names = [name for name in layer.active_adapters if name in layer.lora_A]
                weight = _weight(layer)
                scratch = _scratch(weight, scratch)
                total = _sum(layer, names, scratch)
                originals.append((layer, weight.data))
                weight.data = total
                layer.merged_adapters.extend(names)
                if "forward" not in vars(layer):  # PEFT asks at every call what there is to do: nothing, now
                    layer.forward = layer.get_base_layer().__call__
        yield
    finally:
        for layer, original in originals:
            base = layer.get_base_layer()
            base.weight.data = original
            layer.merged_adapters.clear()
            if vars(layer).get("forward") == base.__call__:
                del layer.forward


def _mergeable(model: Any) -> list[Any]:
    """The layers with an active adapter, if it can be merged into every one of them; else none."""
    layers: list[Any] = []
    uses: Counter[int] = Counter()
    for module in model.modules():
        uses.update(id(parameter) for parameter in module._parameters.values())
        if isinstance(module, LoraLayer) and any(name in module.lora_A for name in module.active_adapters):
            layers.append(module)
    able = all(
        type(layer) is LoraLinear
        and not layer.merged
        and not layer.disable_adapters
        and not any(layer.lora_bias.get(name) for name in layer.active_adapters)
        and not any(name in layer.lora_variant for name in layer.active_adapters)
        and _weight(layer).is_floating_point()
        and uses[id(_weight(layer))] == 1
        for layer in layers
    )
    return layers if able else []


def _scratch(weight: Tensor, scratch: Tensor) -> Tensor:
    """Room for a block of this weight in float32, the given one if it will do: memory of its own costs page faults."""
    size = min(weight.numel(), max(_BLOCK, *weight.shape))
    wide = torch.promote_types(weight.dtype, torch.float32)
    if scratch.numel() >= size and (scratch.dtype, scratch.device) == (wide, weight.device):
        return scratch
    return torch.empty(max(size, _BLOCK), dtype=wide, device=weight.device)


def _sum(layer: Any, names: list[str], scratch: Tensor) -> Tensor:
    """W + sum of scale * B A over the named adapters, in float32 (float64 stays) and rounded once."""
    weight = _weight(layer).data
    wide = scratch.dtype
    factors = [(layer.lora_B[n].weight.to(wide), layer.lora_A[n].weight.to(wide), layer.scaling[n]) for n in names]
    total = torch.empty_like(weight)
    old, new = (weight.T, total.T) if layer.fan_in_fan_out else (weight, total)
    rows = max(1, _BLOCK // old.shape[1])
    for start in range(0, old.shape[0], rows):
        part = slice(start, start + rows)
        block = scratch[: old[part].numel()].view(old[part].shape).copy_(old[part])
        for up, down, scale in factors:
            block.addmm_(up[part], down, alpha=scale)
        new[part] = block
    return total


def _weight(layer: Any) -> Any:
    return layer.get_base_layer().weight
