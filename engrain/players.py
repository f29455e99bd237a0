"""The players of a Ray cluster that the command line asks for."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from agent.cluster import Cluster
from agent.engines.base import Engine
from agent.models.catalog import CATALOG


def open_cluster(model: str, address: str, *, vllm: bool = False, memory_share: float = 0.9) -> Cluster:
    """Players that sample from `model`, each on its machine with transformers or vLLM.

    A short name is fetched on every machine that lacks it; a folder must be there under the same path. `memory_share`
    is what vLLM may take of a player's GPU.

    Raises:
        UsageError: Ray is not installed, or there is no cluster at `address`.
    """
    folder = Path(model).expanduser()
    source = str(folder.resolve()) if model not in CATALOG and folder.is_dir() else model
    return Cluster(partial(_make_engine, model, source, vllm, memory_share), address=address)


def _make_engine(name: str, source: str, vllm: bool, memory_share: float) -> Engine:
    """On a player's machine: its engine."""
    from agent.models.resolve import resolve

    path = resolve(source)
    if vllm:
        from agent.engines.vllm import VllmEngine

        return VllmEngine(path, name=name, memory_share=memory_share)
    from agent.engines.transformers import TransformersEngine

    return TransformersEngine(path, name=name)
