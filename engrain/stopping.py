"""Ctrl-C and SIGTERM: first asked to stop where nothing is lost, soon after made to, and gone within ten seconds.

Whatever moment a process ends at, even by SIGKILL, the next one goes on from what is stored. Stopping politely only
saves more of the work: an episode that is nearly over, the training steps since the last checkpoint.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

GRACE = 5.0  # seconds to the next step or episode
DEADLINE = 9.0  # seconds until the process is gone, whatever it is doing

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """What became of the wish to stop. `check` is called wherever stopping loses nothing."""

    def __init__(self) -> None:
        self.asked: int | None = None  # the signal
        self.leaving = False
        self.thread = threading.get_ident()
        self._before: dict[int, Any] = {}

    def check(self) -> None:
        """Leave, if asked to.

        Raises:
            KeyboardInterrupt: on Ctrl-C.
            SystemExit: on SIGTERM.
        """
        if self.asked is not None:
            self.leave(self.asked)

    def leave(self, number: int, frame: Any = None) -> NoReturn:
        """Unwind, in the way that the signal's handler of before would have done it."""
        self.leaving = True
        handler = self._before.get(number)
        if callable(handler):
            handler(number, frame)
        raise SystemExit(128 + number)

    def _arrived(self, number: int, frame: Any) -> None:
        if self.asked is None:
            self.asked = number
        elif not self.leaving:  # a second Ctrl-C, or the grace is over
            self.leave(number, frame)


@contextmanager
def stopping(
    *, grace: float = GRACE, deadline: float = DEADLINE, end: Callable[[int], Any] = os._exit
) -> Iterator[Stop]:
    """Within this block the first SIGINT or SIGTERM asks to stop; see `Stop.check`.

    Args:
        grace: seconds after which, if nobody checked, the main thread is interrupted wherever it is.
        deadline: seconds after which the process ends without cleaning up; what is stored is whole all the same.
        end: ends it.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield stop
        return
    # The interpreter notes a signal here at once, also while the main thread is inside a long native call.
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    former = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    stop._before = {number: signal.signal(number, stop._arrived) for number in _SIGNALS}
    threading.Thread(target=_watch, args=(stop, ours, grace, deadline, end), name="stopping", daemon=True).start()

    def leave_quickly() -> None:
        """The last hook: taking the interpreter and its libraries apart needs seconds and saves nothing."""
        if stop.leaving and stop.asked is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            end(128 + stop.asked)

    atexit.register(leave_quickly)
    try:
        yield stop
    finally:
        if not stop.leaving:
            atexit.unregister(leave_quickly)
        for number, handler in stop._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(former)
        theirs.close()


def _watch(stop: Stop, wakeups: socket.socket, grace: float, deadline: float, end: Callable[[int], Any]) -> None:
    with wakeups:
        while True:
            noted = wakeups.recv(1)
            if not noted:
                return
            if noted[0] in _SIGNALS:
                break
        over = threading.Event()
        over.wait(grace)
        if not stop.leaving:
            # a real signal: it also ends a wait inside the system
            signal.pthread_kill(stop.thread, noted[0])
        over.wait(deadline - grace)
        print("stopped: what was under way is given up; run the same command again to go on", file=sys.stderr)
        sys.stderr.flush()
        end(128 + noted[0])
