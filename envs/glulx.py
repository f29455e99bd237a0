"""Glulx games (`.ulx`), played by the interpreter that TextWorld brought along until 1.6: one process an episode.

TextWorld's own client of that interpreter waits for it without end and takes its Latin-1 for UTF-8; this one does not.
Import this module where a game starts, not before: it imports TextWorld.
"""

from __future__ import annotations

import contextlib
import resource
import shutil
import socket
import subprocess
import tempfile
import time
import weakref
from pathlib import Path
from typing import Any

import textworld
from textworld.core import GameNotRunningError, GameState

#: Seconds that the interpreter may take for one command; a game at work takes milliseconds.
PATIENCE = 20.0
#: No game says more than this at once.
_MOST_SAID = 1 << 24
#: What the interpreter sends in place of a length when the story has ended by itself.
_EXIT = b"\x7f\x10++"
#: The interpreter cuts characters to eight bits: what that leaves of typographic dashes, quotes and bullets.
_CUT = {c & 0xFF: c for c in (0x2013, 0x2014, 0x2018, 0x2019, 0x201C, 0x201D)}
#: Bytes of address space, bytes of a written file and seconds of computing that one interpreter gets.
_LIMITS = (("RLIMIT_AS", 1 << 30), ("RLIMIT_FSIZE", 1 << 20), ("RLIMIT_CPU", 600))


class Interpreter:
    """A running game, spoken with over a socket in a folder of its own, which is also where its files would go."""

    def __init__(self, program: Path, story: Path) -> None:
        held = contextlib.ExitStack()
        self._end = weakref.finalize(self, held.close)
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="glulx-"))
            held.callback(shutil.rmtree, self._folder, ignore_errors=True)
            with socket.socket(socket.AF_UNIX) as server, (self._folder / "said").open("wb") as said:
                server.bind(str(self._folder / "s"))
                server.listen(1)
                self.process = subprocess.Popen(  # noqa: S603  # TextWorld's own program
                    [str(program), str(story.resolve()), "-g", "s", "-q"],
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=said,
                    cwd=self._folder,
                    start_new_session=True,
                )
                held.callback(self.process.wait)
                held.callback(self.process.kill)
                _limit(self.process.pid)
                self._socket = held.enter_context(self._accept(server))
        except BaseException:
            self.close()
            raise

    def send(self, command: str) -> None:
        """Give one command.

        Raises:
            OSError: the interpreter has ended, or takes no input.
        """
        line = command.encode("latin-1", "replace") or b" "
        try:
            self._socket.sendall(len(line).to_bytes(4, "big") + line)
        except OSError as error:
            raise self._ended() from error

    def receive(self) -> str | None:
        """What the game says until it next waits for input; None once the story has ended by itself.

        Raises:
            OSError: the interpreter has ended by a fault, says nothing for too long, or says too much.
        """
        deadline = time.monotonic() + PATIENCE
        head = self._read(4, deadline)
        if head == _EXIT:
            return None
        length = int.from_bytes(head, "big")
        if length > _MOST_SAID:
            raise ConnectionError(f"the interpreter announced {length} bytes")
        return self._read(length, deadline).decode("latin-1").translate(_CUT)

    def close(self) -> None:
        """End the interpreter and remove its folder. May be called more than once."""
        self._end()

    def _accept(self, server: socket.socket) -> socket.socket:
        deadline = time.monotonic() + PATIENCE
        server.settimeout(0.05)
        while True:
            try:
                connection, _ = server.accept()
            except TimeoutError:
                if self.process.poll() is not None:
                    raise self._ended() from None
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the interpreter did not start within {PATIENCE:g} seconds") from None
            else:
                connection.settimeout(PATIENCE)
                return connection

    def _read(self, count: int, deadline: float) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            left = deadline - time.monotonic()
            try:
                self._socket.settimeout(max(left, 0.001))
                part = self._socket.recv(min(count - len(parts), 1 << 16))
            except TimeoutError as error:
                raise TimeoutError(f"the interpreter did not answer within {PATIENCE:g} seconds") from error
            except OSError as error:
                raise self._ended() from error
            if not part:
                raise self._ended()
            parts += part
        return bytes(parts)

    def _ended(self) -> ConnectionError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        said = ""
        with contextlib.suppress(OSError):
            said = (self._folder / "said").read_text("latin-1").strip()[-200:]
        return ConnectionError(f"the interpreter ended with status {self.process.poll()}: {said or 'no reason given'}")


def _limit(pid: int) -> None:
    """Put `_LIMITS` on a process, where the system can."""
    if hasattr(resource, "prlimit"):
        for name, most in _LIMITS:
            with contextlib.suppress(OSError, ValueError):
                resource.prlimit(pid, getattr(resource, name), (most, most))


class GlulxEnv(textworld.Environment):  # type: ignore[misc]  # TextWorld has no types
    """One Glulx game in TextWorld's own terms, so that its wrappers work on it."""

    def __init__(self, infos: Any, program: Path) -> None:
        super().__init__(infos)
        self._program = program
        self._story: Path | None = None
        self._interpreter: Interpreter | None = None

    def load(self, path: str) -> None:
        """Say which game `reset` starts."""
        self.close()
        self._story = Path(path)

    def reset(self) -> Any:
        """Start the game.

        Raises:
            OSError: it does not start.
        """
        self.close()
        assert self._story is not None, "load a game first"  # noqa: S101
        self._interpreter = Interpreter(self._program, self._story)
        said = self._hear()
        if said is None:
            raise ConnectionError("the story ended before it began")
        self.state = GameState(feedback=said, raw=said)
        return self.state

    def step(self, command: str) -> tuple[Any, int, bool]:
        """Play one command.

        Raises:
            GameNotRunningError: the game was closed, or is over.
            OSError: the interpreter crashed or hangs; it is closed then.
        """
        said = self._say(command.strip())
        text = said or ""
        self.state = GameState(last_command=command.strip(), raw=text, feedback=text, score=0, done=said is None)
        return self.state, 0, said is None

    def close(self) -> None:
        """End the interpreter."""
        if self._interpreter is not None:
            interpreter, self._interpreter = self._interpreter, None
            interpreter.close()

    def _send(self, command: str) -> str:
        """A command that leaves the state alone; TextWorld's wrappers ask for scores this way."""
        return self._say(command) or ""

    def _say(self, command: str) -> str | None:
        if self._interpreter is None:
            raise GameNotRunningError
        try:
            self._interpreter.send(command)
        except OSError:
            self.close()
            raise
        return self._hear()

    def _hear(self) -> str | None:
        assert self._interpreter is not None  # noqa: S101
        try:
            said = self._interpreter.receive()
        except OSError:
            self.close()
            raise
        if said is None:
            self.close()
            return None
        return said.removesuffix("\n>")


def start(story: Path, infos: Any, program: Path) -> Any:
    """The game, not yet begun; with TextWorld's metadata where they lie beside it as `.json`."""
    env: Any = GlulxEnv(infos, program)
    if textworld.envs.TWInform7.compatible(str(story)):
        env = textworld.envs.TWInform7(env)
    env.load(str(story))
    return env
