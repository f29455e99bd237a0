"""How a step is split over processes, and how the gradients of its parts become those of one process.

Every process holds the whole batch and scores a share of it. The weights of the positions are those of the whole batch
(`distill.objective.position_weights`), so the gradient of the batch is the *sum* of the shares' gradients, and it does
not matter that shares differ in size, or are empty.

- `Alone`: one process.
- `Replicated` (DDP): every process has all weights; gradients are summed once a step, after the last micro-batch. (A
  wrapped `forward`, as torch's DistributedDataParallel has it, would not help: the loss does not go through it.)
- `Sharded` (FSDP2): weights, gradients and optimiser are spread over the processes, and decoder layers are gathered
  while they are used. Processes must then make the same number of passes; those that have fewer micro-batches fill up
  with passes of weight zero.

`accelerate launch` says which, `current()` reads it. Precision bf16 is Accelerate's: what trains is kept in
float32 and scored in bf16; sampling is in the weights' own precision, when sharded in bf16 too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from types import MethodType
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from peft import PeftModel
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.nn.parallel import DistributedDataParallel

from distill.distributed import gather, rank, whole, world
from distill.errors import DistillConfigError
from distill.packing import Sample

T = TypeVar("T")

#: One process validates or plays a round while the others wait for it; torch's own limit is ten minutes.
PATIENCE = timedelta(days=7)
#: Gradients summed in one message, in numbers.
BUCKET = 2**24


class Alone:
    """One process: everything is the plain thing.

    Args:
        autocast: made anew for every pass; lower precision of its matrix products.
    """

    checkpointing = False
    device: torch.device | None = None  # where this process computes, if the weights do not tell

    def __init__(self, autocast: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self.autocast = autocast

    def adopt(self, model: nn.Module) -> None:
        """Spread a plain model over the processes, in place. Parameters may be other objects afterwards."""

    def run(self, forward: Callable[[], T]) -> T:
        """Do a pass through the model, output head included."""
        with self.autocast():
            return forward()

    @contextmanager
    def gathered(self, model: nn.Module) -> Iterator[None]:
        """Within it every process has the model whole and may use it, or not, as it likes; but not train it."""
        yield

    def share(self, samples: Sequence[Sample]) -> list[Sample]:
        """This process's part of a batch."""
        return list(samples)

    def aligned(self, parts: Sequence[list[Sample]], samples: Sequence[Sample]) -> list[tuple[list[Sample], bool]]:
        """The passes to make: micro-batches that count, and some that only fill up."""
        return [(part, True) for part in parts]

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradient to the parameters'."""
        loss.backward()  # type: ignore[no-untyped-call]

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> float:
        """Let the parameters have the gradient of the whole batch, no longer than `max_norm`; its norm before that."""
        return float(whole(nn.utils.clip_grad_norm_(parameters, max_norm)))


class _Together(Alone):
    """Several processes, each with a share of the samples."""

    def adopt(self, model: nn.Module) -> None:
        """Refuse what would train apart.

        Raises:
            DistillConfigError: the model is wrapped already, or the processes have different weights.
        """
        if isinstance(model, DistributedDataParallel | FSDPModule):
            raise DistillConfigError("give the trainer the plain model: it is spread over the processes by the trainer")
        sums = gather([float(p.detach().sum(dtype=torch.float64)) for p in model.parameters()])
        for number, other in enumerate(sums):
            if other != sums[0]:
                raise DistillConfigError(
                    f"process {number} starts from other weights than process 0; fix the seed of what is random, and "
                    "with FSDP set fsdp_cpu_ram_efficient_loading to false"
                )

    def share(self, samples: Sequence[Sample]) -> list[Sample]:
        """The longest samples go first, each to the process with the fewest tokens; then in the order of the batch."""
        loads, owners = [0] * world(), [0] * len(samples)
        for index in sorted(range(len(samples)), key=lambda i: -samples[i].tokens):
            owners[index] = loads.index(min(loads))
            loads[owners[index]] += samples[index].tokens
        return [sample for sample, owner in zip(samples, owners, strict=True) if owner == rank()]


class Replicated(_Together):
    """All weights in every process."""

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> float:
        """As in one process, after the sum over all."""
        for parameter in parameters:
            if parameter.grad is None:  # this process had no samples
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([cast(Tensor, parameter.grad) for parameter in parameters]):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            distributed.all_reduce(flat)
            start = 0
            for gradient in bucket:
                gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
                start += gradient.numel()
        return super().clip(parameters, max_norm)


class Sharded(_Together):
    """FSDP2: each decoder layer is a unit, everything else another.

    Args:
        plugin: offload and resharding, from Accelerate's configuration.
        device: where this process computes.
        dtype: of the passes; None is the weights' own. Sums of gradients are float32 then.
    """

    def __init__(
        self, plugin: FullyShardedDataParallelPlugin, device: torch.device, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.device = device
        self.reshard = bool(plugin.reshard_after_forward)
        self.checkpointing = bool(plugin.activation_checkpointing)
        self.dtype = dtype
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
        offload = plugin.cpu_offload
        if isinstance(offload, CPUOffloadPolicy) and device.type == "cpu":
            offload = CPUOffloadPolicy(pin_memory=False)  # there is no other device to pin it for
        self.options = {
            "mesh": init_device_mesh(device.type, (world(),)),
            "reshard_after_forward": self.reshard,
            "offload_policy": offload,
            "mp_policy": precision,
        }
        self.root: Any = None

    def adopt(self, model: nn.Module) -> None:
        """Shard the model's layers, then what is left; as for all, see above.

        Raises:
            DistillConfigError: as for all.
        """
        super().adopt(model)
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        layers = set(getattr(base, "_no_split_modules", None) or ())
        if self.dtype is not None:  # what trains is kept in full precision
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        for module in list(model.modules()):
            if type(module).__name__ in layers:
                fully_shard(module, **self.options)
        fully_shard(model, **self.options)
        self.root = model
        # a pass is not the model's own forward: the output head's weight is used by itself
        self.root.within = MethodType(lambda self, forward: forward(), model)
        register_fsdp_forward_method(model, "within")
        self.run(lambda: None)  # tells torch that this is the root, whatever is gathered first

    def run(self, forward: Callable[[], T]) -> T:
        """Do a pass; within it the embedding and the head are whole, and each layer is when its turn comes."""
        return cast(T, self.root.within(forward))

    @contextmanager
    def gathered(self, model: nn.Module) -> Iterator[None]:
        """All layers whole, for sampling: processes then take different numbers of passes."""
        units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for unit in units:
                unit.set_reshard_after_forward(self.reshard, recurse=False)
                unit.reshard()

    def aligned(self, parts: Sequence[list[Sample]], samples: Sequence[Sample]) -> list[tuple[list[Sample], bool]]:
        """As many passes as the process with the most micro-batches makes."""
        missing = max(gather(len(parts))) - len(parts)
        shortest = min(samples, key=lambda sample: sample.tokens)
        return super().aligned(parts, samples) + [([shortest], False)] * missing

    def backward(self, loss: Tensor) -> None:
        """FSDP2 averages over the processes, and a sum is wanted."""
        super().backward(loss * world())


def current() -> Alone:
    """What `accelerate launch` asked for; `Alone` without it. Opens the process group.

    Raises:
        DistillConfigError: it asked for something else, such as DeepSpeed, FSDP of version 1, or fp16.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return Alone()
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if sharded and os.environ.get("FSDP_VERSION", "1") != "2":
        raise DistillConfigError("FSDP 1 is not supported; launch with --fsdp_version 2")
    # transformers would leave the weights of all processes but the first empty
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise DistillConfigError(f"mixed precision {accelerator.mixed_precision} is not supported; use bf16 or no")
    state = accelerator.state
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is None and sharded:
        plugin = FullyShardedDataParallelPlugin()  # Accelerate itself knows FSDP on GPUs only
    plain = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)
    if plugin is None and state.distributed_type not in plain:
        raise DistillConfigError(f"{state.distributed_type.value} is not supported; launch with DDP or FSDP 2")
    lower = accelerator.mixed_precision == "bf16"
    if plugin is not None and distributed.is_initialized():
        return Sharded(plugin, accelerator.device, torch.bfloat16 if lower else None)
    autocast = accelerator.autocast if lower else nullcontext
    return Replicated(autocast) if world() > 1 else Alone(autocast)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype in groups that are not too large."""
    bucket: list[Tensor] = []
    for tensor in sorted(tensors, key=lambda t: str(t.dtype)):
        if bucket and (bucket[0].dtype != tensor.dtype or sum(t.numel() for t in bucket) + tensor.numel() > BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
