"""One game in the foreground, from its beginning until it is kept: who chooses the replies, and who is shown them.

Whoever chooses, an `Episode` comes of it that the next round can learn from. A game that is left in the middle is an
episode too, with what was played until then.
"""

from __future__ import annotations

import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from agent.engines.base import Completion, Engine
from agent.episode import Episode, StopReason, Turn
from agent.scheduler import describe
from engrain.match import Match, NoRoomError, WorldError
from envs import registry
from envs.base import Split, Step, Task
from envs.errors import EngrainError, UsageError
from memory.records import CheckpointRecord

if TYPE_CHECKING:  # it imports torch
    from agent.cluster import Cluster


class LeftError(Exception):
    """The person who plays leaves the game."""


class Watcher(Protocol):
    """Is shown a game as it goes."""

    def begun(self, match: Match) -> None:
        """The world has spoken first."""

    def waiting(self, what: str) -> AbstractContextManager[Any]:
        """A time in which `what` is done and nobody can do anything else."""

    def moved(self, match: Match, turn: Turn, step: Step, seconds: float, human: bool) -> None:
        """A reply was given and answered; `seconds` is what choosing it took."""


#: Chooses the next reply: the engine's own as it was sampled, or a person's words. May raise `LeftError`.
Choose = Callable[[Match], str | Completion]


def play_match(match: Match, choose: Choose, watcher: Watcher, keep: Callable[[Episode], None]) -> Episode | None:
    """Play a match to its end and keep its episode; None where it was left before anything was said.

    A game that is left (Ctrl-C, end of input, `LeftError`) is kept as interrupted. What else ends the process (a
    signal, a broken engine) goes on after the episode was kept.

    Raises:
        EngrainError: the engine failed.
    """
    error: str | None = None
    cause: BaseException | None = None
    try:
        reason = _turns(match, choose, watcher)
    except (LeftError, KeyboardInterrupt, EOFError):
        reason = StopReason.INTERRUPTED
    except NoRoomError as limit:
        reason, error = StopReason.LENGTH, str(limit)
    except WorldError as broken:
        reason, error = StopReason.ERROR, str(broken)
    except EngrainError as failed:
        reason, error, cause = StopReason.ERROR, describe(failed), failed
    except BaseException as ending:  # a signal's SystemExit, a terminal that is gone: kept first
        reason, cause = StopReason.INTERRUPTED, ending
    episode: Episode | None = None
    with uninterrupted():
        try:
            if match.begun or reason in (StopReason.ERROR, StopReason.LENGTH):
                episode = match.episode(reason, error)
                keep(episode)
        finally:
            match.close()
    if cause is not None:
        raise cause
    return episode


def _turns(match: Match, choose: Choose, watcher: Watcher) -> StopReason:
    with watcher.waiting("starting the world"):
        match.begin()
    watcher.begun(match)
    while match.ended is None:
        before = time.perf_counter()
        reply = choose(match)
        seconds = time.perf_counter() - before
        step = match.play(reply)
        watcher.moved(match, match.turns[-1], step, seconds, isinstance(reply, str))
    return match.ended


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A short time in which Ctrl-C waits, so that what was played is stored; it comes after."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if waiting:
        raise KeyboardInterrupt


def any_seed() -> int:
    """A seed that nobody chose, small enough for every built-in world (TextWorld's end at 999)."""
    return secrets.randbelow(1000)


def draw_tasks(env: str, options: Mapping[str, Any], split: Split | None, count: int, seed: int) -> list[Task]:
    """The tasks of a split; by default training tasks, or test tasks where the world has no others.

    Raises:
        UsageError: there is no such world, an option is wrong, or the split holds fewer tasks.
    """
    world = registry.world(env, options)
    if split is not None:
        return world.tasks(split, count, seed)
    try:
        return world.tasks(Split.TRAIN, count, seed)
    except UsageError:
        with suppress(UsageError):
            return world.tasks(Split.TEST, count, seed)
        raise


def load(engine: Engine | Cluster, checkpoint: CheckpointRecord | None) -> None:
    """Let an engine sample from a checkpoint, None being the base model, if it does not do so already."""
    wanted = checkpoint.id if checkpoint else None
    if engine.checkpoint != wanted:
        engine.load(Path(checkpoint.path) if checkpoint else None)
        engine.checkpoint = wanted


def solved(episodes: Sequence[Episode]) -> int:
    """How many count as solved."""
    return sum(episode.success for episode in episodes)
