"""Two processes under `accelerate launch`, on CPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WAYS = {"ddp": ["--multi_gpu"], "fsdp2": ["--use_fsdp", "--fsdp_version", "2"]}


def begin(way: str, *command: str, environment: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
    """Start a script, or a module after -m, in two processes.

    `accelerate launch --cpu` starts several processes only through MPI. What it starts for GPUs it starts through
    torch's launcher, and with ACCELERATE_USE_CPU in the environment they compute on the CPU.
    """
    environment = {"PYTHONPATH": str(ROOT), **(environment or {})}
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", *WAYS[way]]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([*launcher, *command], env=environment, text=True, **pipes)


def launch(way: str, *command: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """As `begin`, to its end."""
    with begin(way, *command, environment=environment) as process:
        try:
            out, err = process.communicate(timeout=500)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
