"""What went wrong, as one line and an exit code: 2 for what the user wrote, 1 for what the world did."""

from __future__ import annotations

import errno
import sys
from typing import Any

from engrain.terminal import printable as printable
from envs.errors import EngrainError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_ELSEWHERE = "name another place: ENGRAIN_HOME, --store, --out"


def explain(error: BaseException) -> tuple[str, int] | None:
    """One line that names what is wrong and what to do, and the exit code; None for a fault of ours.

    Libraries are looked up among those that are loaded, so that no command imports one to be told of its errors.
    """
    if isinstance(error, EngrainError):
        return str(error), error.exit_code
    if isinstance(error, BrokenPipeError):  # `engrain ... | head` is no fault
        return None
    if isinstance(error, OSError):
        return _of_the_system(error), 1
    if _is(error, "pydantic", "ValidationError"):
        return first_fault(error), 2
    if _is(error, "safetensors", "SafetensorError"):
        if "No space left" in str(error) or "File too large" in str(error):
            return f"weights cannot be written: {error}; free some disk, or {_ELSEWHERE}", 1
        return f"a safetensors file is damaged: {error}; fetch or make it anew", 2
    if isinstance(error, MemoryError) or _is(error, "torch", "OutOfMemoryError"):
        return f"out of memory: {error}; use smaller batches, fewer tokens or a smaller model".replace(": ;", ";"), 1
    return None


def first_fault(error: Any) -> str:
    """The first thing that a pydantic model refuses: where, why, and what was given.

    A setting from the environment goes by the name of its variable; a secret is not repeated.
    """
    from engrain.redaction import HIDDEN, is_secret

    fault = error.errors(include_url=False)[0]
    where = ".".join(map(str, fault["loc"]))
    if error.title == "Settings":
        where = f"ENGRAIN_{where.upper()}"
    reason = str(fault["msg"]).removeprefix("Value error, ")
    given = HIDDEN if is_secret(where) else repr(fault["input"])
    return f"{where or error.title}: {reason} (given: {given if len(given) <= 200 else given[:200] + ' …'})"


def _of_the_system(error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    where = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    line = f"{where}: {reason}" if where else reason
    if error.errno in FULL:
        return f"{line}; free some disk, or {_ELSEWHERE}"
    if error.errno in _FORBIDDEN:
        return f"{line}; {_ELSEWHERE}"
    return f"{line} (ENGRAIN_DEBUG=1 shows where)"


def _is(error: BaseException, library: str, name: str) -> bool:
    kind = getattr(sys.modules.get(library), name, None)
    return isinstance(kind, type) and isinstance(error, kind)
