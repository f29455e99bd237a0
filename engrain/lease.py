"""One loop at a time on one store and model: a lease with a heartbeat, given back at the end."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from types import TracebackType
from uuid import uuid4

from engrain.errors import LoopAtWorkError, LoopReplacedError
from memory.errors import StoreError
from memory.leases import Lease
from memory.records import digest
from memory.store import Store

SECONDS = 60.0  # how long a holder that says nothing is believed to be alive
_BEATS = 4  # heartbeats in that time
_DEAD = ("Z", "X")  # what Linux calls the state of a process that has ended

_HELD: set[str] = set()  # tokens of this process


def machine() -> str:
    """Where a process id means something: the host, since when it runs, and the container's own numbering."""
    parts = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(str(Path(path).readlink()) if "ns" in path.split("/") else Path(path).read_text().strip())
        except OSError:
            continue
    return "/".join(parts)


def is_gone(lease: Lease) -> bool:
    """Whether the holder is known to be dead: it ran here, and its process id is free, or is this very process.

    A killed process that nobody has waited for yet, as under a supervisor that is slow to, is dead as well.
    """
    if os.name != "posix" or lease.machine != machine() or lease.token in _HELD:
        return False
    if lease.pid == os.getpid():  # ours by chance, as after a container's restart
        return True
    try:
        os.kill(lease.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    try:
        return Path(f"/proc/{lease.pid}/stat").read_text().rpartition(")")[2].split()[0] in _DEAD
    except (OSError, IndexError):  # no Linux; or it went this very moment, and the next try finds that out
        return False


def lease_name(model: str) -> str:
    """What the lease of the loop that improves `model` is called."""
    return digest("improve", model)


class LoopLease:
    """Holds the lease of the loop that improves `model` in `store`; a context manager.

    Args:
        store: where the lease is written.
        model: what is improved.
        seconds: how long it lasts without a heartbeat; one is sent four times as often.

    Raises (on entry):
        LoopAtWorkError: another process holds it; the message says which.
    """

    def __init__(self, store: Store, model: str, *, seconds: float = SECONDS) -> None:
        self.store, self.model, self.seconds = store, model, seconds
        self.name, self.token = lease_name(model), uuid4().hex
        self.lost = False
        self._over = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> LoopLease:
        held = self.store.take_lease(
            self.name,
            self.token,
            host=socket.gethostname(),
            machine=machine(),
            pid=os.getpid(),
            seconds=self.seconds,
            is_gone=is_gone,
        )
        if held.token != self.token:
            raise LoopAtWorkError(
                f"another loop improves {self.model} in {self.store.url}: {held}; wait for it, stop it, "
                "or name another store"
            )
        _HELD.add(self.token)
        if ":memory:" not in self.store.url:  # nobody else can see that one
            self._beating.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._beating.is_alive():
            self._beating.join(timeout=2.0)
        _HELD.discard(self.token)
        try:
            self.store.drop_lease(self.name, self.token)
        except StoreError:
            if error is None:  # it expires by itself, and what went wrong first is what to tell
                raise

    def check(self) -> None:
        """Call this between two pieces of work.

        Raises:
            LoopReplacedError: this process said nothing for too long, and another took its place.
        """
        if self.lost:
            raise LoopReplacedError(
                f"this process did not reach {self.store.url} for {self.seconds:.0f} s and another loop took over"
            )

    def _beat(self) -> None:
        while not self._over.wait(self.seconds / _BEATS):
            try:
                self.lost = not self.store.renew_lease(self.name, self.token, self.seconds)
            except StoreError:
                continue  # a server that starts anew; if another loop takes over meanwhile, the next beat says so
            if self.lost:
                return
