"""Round after round, each on new tasks: when the next one is due, and which settings it has.

Nothing is kept in the process: what is due follows from the rounds in the store, so a loop that was stopped for a day,
or moved to another machine, goes on as if it had not been.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, Protocol

from engrain.config import ImproveConfig
from engrain.errors import LoopReplacedError
from engrain.rounds import same_settings
from envs.errors import EngrainError, UsageError
from memory.records import RoundRecord, RoundStatus, now
from memory.store import Store

POLL = 5.0  # seconds between two looks at the store
PATIENCE, MOST_PATIENCE = 60, 3600  # seconds after a failure; doubled after every further one
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_SIZES = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}


class Told(Protocol):
    """Is told what a loop without end does between its rounds."""

    def waiting(self, arrived: int, left: float) -> None:
        """So many new episodes came, and so many seconds are left at least."""

    def failed(self, error: EngrainError | OSError, pause: float) -> None:
        """A round was broken off; after so many seconds it goes on."""


def seconds(text: str) -> float:
    """`90s`, `15m`, `6h`, `1.5d` in seconds; a bare number is seconds.

    Raises:
        UsageError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd]?)\s*", text.lower())
    if not match:
        raise UsageError(f"{text!r} is no length of time; write for instance 90s, 15m, 6h or 1d")
    return float(match[1]) * _UNITS[match[2] or "s"]


def size(text: str) -> int:
    """`50GB`, `512MiB` in bytes; a bare number is bytes.

    Raises:
        UsageError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?b|)\s*", text.lower())
    if not match or match[2] not in _SIZES:
        raise UsageError(f"{text!r} is no size; write for instance 50GB or 512MiB")
    return int(float(match[1]) * _SIZES[match[2]])


def advanced(config: ImproveConfig, number: int) -> ImproveConfig:
    """The settings of round `number` (from 0) of a series: other tasks, other sampling, all else the same."""
    distill = config.distill.model_copy(update={"seed": config.distill.seed + number})
    return config.model_copy(update={"seed": config.seed + number, "distill": distill})


@dataclass(frozen=True)
class Series:
    """The rounds that the store holds of one series, and what comes next."""

    config: ImproveConfig
    rounds: tuple[RoundRecord, ...]

    @classmethod
    def of(cls, store: Store, config: ImproveConfig) -> Series:
        """The rounds of these settings with this or a later seed, by number."""
        found = []
        for record in store.rounds():
            number = record.seed - config.seed
            known = number >= 0 and record.model == config.model
            if known and same_settings(record.config, advanced(config, number)):
                found.append(record)
        return cls(config, tuple(found))

    @property
    def next(self) -> ImproveConfig:
        """The unfinished round's settings, or those of a new one."""
        numbers = {record.seed - self.config.seed: record for record in self.rounds}
        unfinished = [number for number, record in numbers.items() if record.status == RoundStatus.RUNNING]
        return advanced(self.config, max(unfinished) if unfinished else max(numbers, default=-1) + 1)

    @property
    def unfinished(self) -> bool:
        """Whether the latest round has still to be ended."""
        return any(record.status == RoundStatus.RUNNING for record in self.rounds)


@dataclass(frozen=True)
class Schedule:
    """When a round is due after the one before.

    `every` seconds lie between the beginnings of two rounds, and `min_episodes` new training episodes of the world,
    from `engrain play` or other processes, came in since the last one began. The round reads them besides its own.
    """

    every: float = 0.0
    min_episodes: int = 0

    def wait(
        self,
        store: Store,
        config: ImproveConfig,
        *,
        check: Callable[[], None] = lambda: None,
        tell: Callable[[int, float], None] = lambda arrived, left: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> ImproveConfig:
        """Wait until a round is due, and return its settings. The first, and an unfinished one, is due at once.

        Args:
            store: what has happened so far.
            config: the first round's settings.
            check: called every second; ends the wait by raising.
            tell: told at every look how many episodes arrived and how many seconds are left at least.
            sleep: waits.
        """
        series = Series.of(store, config)
        if not series.rounds or series.unfinished:
            return series.next
        last = series.rounds[-1]
        while True:
            check()
            passed = (now() - last.created_at) / timedelta(seconds=1)
            arrived = store.arrivals(config.world.env, last.created_at) if self.min_episodes else 0
            left = max(self.every - passed, 0.0)
            tell(arrived, left)
            if not left and arrived >= self.min_episodes:
                return series.next
            for _ in range(int(min(POLL, left) if left else POLL) or 1):
                check()
                sleep(min(1.0, left) if left else 1.0)


def run_forever(
    store: Store,
    config: ImproveConfig,
    schedule: Schedule,
    play: Callable[[ImproveConfig, bool], object],
    clean: Callable[[], None],
    *,
    told: Told,
    check: Callable[[], None],
    fresh: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> NoReturn:
    """Rounds without end; a fault of the world breaks one off, and it is gone on with after a while.

    Args:
        store: what has happened so far.
        config: the first round's settings.
        schedule: when a round is due.
        play: plays the round of these settings; the flag gives up an unfinished one of others.
        clean: called before the first round and after every one.
        told: is told of waits and failures.
        check: called every second of a wait; ends the loop by raising.
        fresh: give up an unfinished round of other settings at the start.
        sleep: waits.
    """
    failures = 0
    clean()
    while True:
        try:
            wanted = schedule.wait(store, config, check=check, tell=told.waiting, sleep=sleep)
            given_up, fresh = fresh, False  # once: what is broken off now is gone on with
            play(wanted, given_up)
            clean()
        except (UsageError, LoopReplacedError, BrokenPipeError):
            raise
        except (EngrainError, OSError) as error:
            failures += 1
            pause = min(PATIENCE * 2 ** (failures - 1), MOST_PATIENCE)
            told.failed(error, pause)
            for _ in range(int(pause)):
                check()
                sleep(1.0)
        else:
            failures = 0
