"""Several processes, one run: what one of them does for all, and what all of them do a share of.

Nothing here needs an object: the process group that `accelerate launch` opens is the process's own. With one process
every function is the plain thing. All of them are collective: every process must call them, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from agent import rollout
from agent.engines.base import Completion, Engine
from agent.episode import Episode, SamplingParams
from distill.errors import ProcessFailedError
from envs.base import Task
from envs.errors import EngrainError

T = TypeVar("T")


def world() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return distributed.get_rank() if world() > 1 else 0


def is_main() -> bool:
    """Whether this process is the one that writes, prints and validates."""
    return rank() == 0


def gather(value: T) -> list[T]:
    """What every process has, in the order of their numbers."""
    if world() == 1:
        return [value]
    found: list[T | None] = [None] * world()
    distributed.all_gather_object(found, value)
    return cast(list[T], found)


def from_main(make: Callable[[], T]) -> T:
    """Let the main process do it while the others wait; everyone gets the result.

    Raises:
        ProcessFailedError: in the others, when it failed there.
    """
    if world() == 1:
        return make()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[1] = make()
        except Exception as error:
            distributed.broadcast_object_list([f"the main process failed: {error}", None])
            raise
    distributed.broadcast_object_list(outcome)
    if outcome[0] is not None:
        raise ProcessFailedError(outcome[0])
    return cast(T, outcome[1])


def everyone(do: Callable[[], T]) -> list[T]:
    """Do it in every process, and give everyone what came of it, in the order of their numbers.

    Raises:
        EngrainError: it was raised in one of them; all raise it.
        ProcessFailedError: anything else was; the process itself raises that.
    """
    if world() == 1:
        return [do()]
    failure: Exception | None = None
    result: T | None = None
    try:
        result = do()
    except Exception as error:
        failure = error
    told = failure
    if failure is not None and not isinstance(failure, EngrainError):
        told = ProcessFailedError(f"process {rank()} failed: {str(failure) or type(failure).__name__}")
    parts = gather((told, result))
    if failure is not None:
        raise failure
    for other, _ in parts:
        if other is not None:
            raise other
    return [cast(T, part) for _, part in parts]


def in_shares(items: Sequence[T], do: Callable[[list[int]], list[Any]]) -> list[Any]:
    """Let each process do every n-th of the items, and give everyone all results, in the order of the items.

    Args:
        items: the same in every process.
        do: given the indices of a share, returns their results in that order.

    Raises:
        EngrainError: as `everyone`; the others do not wait for a process that failed.
    """
    parts = everyone(lambda: do(list(range(rank(), len(items), world()))))
    return [parts[index % world()][index // world()] for index in range(len(items))]


def play(
    tasks: Sequence[Task],
    engine: Engine,
    *,
    namespace: str,
    on_episode: Callable[[Episode], None] | None = None,
    **settings: Any,
) -> list[Episode]:
    """`agent.rollout.play` with the tasks dealt out; every process gets all episodes.

    Ids and seeds follow from task and sample, so that the episodes are those of one process, up to the rounding of
    the model's matrix products in batches of another size. `on_episode` is told in the main process, after the play.
    """
    if world() == 1:
        return rollout.play(tasks, engine, namespace=namespace, on_episode=on_episode, **settings)
    ids = [id_ for id_, _, _ in rollout.identified(tasks, namespace)]

    def share(mine: list[int]) -> list[Episode]:
        others = set(ids) - {ids[index] for index in mine}
        return rollout.play(tasks, engine, namespace=namespace, skip=others, **settings)

    episodes: list[Episode] = in_shares(ids, share)
    if on_episode is not None and is_main():
        for episode in episodes:
            on_episode(episode)
    return episodes


def generate(
    engine: Engine, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]
) -> Sequence[Completion]:
    """`engine.generate` with the prompts dealt out; every process gets all completions."""
    return in_shares(
        prompts, lambda mine: list(engine.generate([prompts[i] for i in mine], [sampling[i] for i in mine]))
    )


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded over the processes, put together; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, sharded as this parameter of the same shape is."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    mesh = parameter.device_mesh
    # each process has read the whole tensor and keeps its part: nothing is sent
    part = torch.distributed.tensor.distribute_tensor(tensor, mesh, parameter.placements, src_data_rank=None)
    return part.to(parameter.device)
