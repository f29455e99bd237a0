"""vLLM brought into this process, without what it does to the process around it."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from agent.errors import MissingPackageError, vllm_missing


def import_vllm() -> Any:
    """The vLLM package, imported without what it does to this process.

    Raises:
        MissingPackageError: it is not installed, or does not import.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        with undisturbed():
            import vllm
            import vllm.lora.request
            import vllm.platforms
            import vllm.sampling_params
            import vllm.v1.engine.llm_engine
    except ImportError as error:
        if error.name == "vllm":
            raise vllm_missing() from None
        raise MissingPackageError(f"vLLM does not import: {one_line(error)}") from error
    except RuntimeError as error:  # torchvision of another build, for one
        raise MissingPackageError(f"vLLM does not import: {one_line(error)}") from error
    return vllm


def start(arguments: Any) -> Any:
    """An engine whose core runs in this process."""
    from vllm.v1.engine.llm_engine import LLMEngine

    before = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        return LLMEngine.from_engine_args(arguments)
    finally:
        del os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]
        if before is not None:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = before


@contextmanager
def undisturbed() -> Iterator[None]:
    """Take back what vLLM does to the process around it.

    It seeds all random numbers, replaces `torch.set_num_threads`, and wants libraries loaded into every process that is
    started later.
    """
    preload, set_num_threads = os.environ.get("LD_PRELOAD"), torch.set_num_threads
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        os.environ.pop("LD_PRELOAD", None)
        if preload is not None:
            os.environ["LD_PRELOAD"] = preload


def one_line(error: BaseException) -> str:
    """What an error says, on one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
