"""How all benchmarks measure: each case in a process of its own, medians over repeats, one JSON line at the end."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def in_process_of_its_own(script: str, **case: Any) -> dict[str, Any]:
    """Run `script --case JSON` and return what its last line says. Peak memory is then that case's alone."""
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    command = [sys.executable, script, "--case", json.dumps(case)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{case} failed, see above")
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{case} -> {found}", file=sys.stderr, flush=True)
    return found


def timed(step: Callable[[], Any], repeats: int, warm_up: int = 1) -> dict[str, Any]:
    """Median seconds of `step` after warm-up, and how far memory in use rose above where it stood before the first.

    What was needed to make the inputs does not count: the peak is forgotten first (on a GPU and on Linux; elsewhere the
    rise is that above the peak so far).
    """
    import torch

    gpu = torch.cuda.is_available()
    before = _forget_peak(gpu)
    seconds = []
    for number in range(warm_up + repeats):
        if gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        if gpu:
            torch.cuda.synchronize()
        if number >= warm_up:
            seconds.append(time.perf_counter() - started)
    return {
        "seconds": round(statistics.median(seconds), 4),
        "spread": round(max(seconds) - min(seconds), 4),
        "repeats": repeats,
        "peak_bytes": _peak(gpu),
        "rise_bytes": _peak(gpu) - before,
    }


def _peak(gpu: bool) -> int:
    import torch

    if gpu:
        return int(torch.cuda.max_memory_allocated())
    if sys.platform == "linux":
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _forget_peak(gpu: bool) -> int:
    """Let the peak be what is in use now, and return that; the old peak where the system keeps it."""
    import torch

    gc.collect()
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    if sys.platform != "linux":
        return _peak(gpu)
    ctypes.CDLL(None).malloc_trim(0)  # else what is free in the heap would be used again without counting
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak(gpu)
    return _status("VmRSS")


def _status(field: str) -> int:
    """Bytes that the kernel says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def where() -> dict[str, Any]:
    """The machine and the libraries of a measurement; `dtype` is what an engine computes in here by itself."""
    import torch

    from agent.engines.transformers import pick_device, pick_dtype
    from distill.checkpoint import versions
    from engrain.report import machine

    return {
        **machine(),
        "dtype": str(pick_dtype("auto", pick_device())).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "versions": versions(),
    }
