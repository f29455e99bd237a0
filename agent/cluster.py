"""Episodes on many machines: players on a Ray cluster, each with an engine of its own, fed by one driver.

Ray starts players, says which were lost, and carries tasks there and episodes back; which player gets which task is
decided here, by outstanding work. A task whose player is lost is played again by another, under the same id. Episodes
come to the driver one by one, so the driver's store is the only one.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

from agent.engines.base import Engine
from agent.engines.folders import identity
from agent.episode import Episode, StopReason
from agent.errors import ClusterError, MissingPackageError
from agent.options import BATCH, PlayOptions
from agent.player import Item, Job, Player
from agent.rollout import identified
from agent.stats import RolloutStats
from envs.base import Task
from envs.errors import EngrainError, UsageError

#: How many lost players one task may have been on before its episode is written off.
_TRIES = 4
#: How often in a row players may be lost, no episode finished in between; those lost at one time count once.
_LOSSES = 4
_START_SECONDS = 900.0  # the most time without any player: placing one, and loading a model
_WAIT_SECONDS = 1.0
_CONNECT_SECONDS = 10.0
_MOST_CALLS = 10_000  # under way in one player; the driver sends far fewer
_SUMMED = ("requests", "sampled_tokens", "prompt_tokens", "cached_tokens", "later_prompt_tokens", "later_cached_tokens")
_JOBS = itertools.count()


@dataclass(eq=False)
class _Seat:
    """A player as the driver sees it."""

    actor: Any
    outstanding: int = 0
    alone: bool = False  # it has a task on its last try, and gets no other
    lost: bool = False
    born: float = field(default_factory=time.monotonic)
    stats: RolloutStats = field(default_factory=RolloutStats)


class Cluster:
    """Players on a Ray cluster. They are started with the first `play` and kept for the next ones, until `close`.

    Args:
        make_engine: makes a player's engine, on its machine; must pickle, and so must what it holds.
        address: `local` starts a cluster in this machine that ends with this object; otherwise a running one:
            `auto`, `host:port` of its head, or `ray://host:port`.
        players: how many; None is one for each GPU of the cluster, or one for each machine where there is none. Each
            has a GPU to itself, or an equal share of the cores, which are also the threads of its arithmetic.

    Raises:
        UsageError: Ray is not installed, there is no cluster at `address`, or no core in it.
    """

    def __init__(
        self, make_engine: Callable[[], Engine], *, address: str = "local", players: int | None = None
    ) -> None:
        self._ray, self._own = _connect(address)
        self._make_engine = make_engine
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        cores = [int(machine["CPU"]) for machine in machines if machine.get("CPU", 0) >= 1]
        gpus = int(sum(machine.get("GPU", 0) for machine in machines))
        if not cores:
            raise UsageError(f"the Ray cluster at {address!r} has no machine with a CPU core to play on")
        self._wanted = players or gpus or len(cores)
        self._gpus = min(gpus, 1)
        self._cpus = 1 if gpus else max(1, min(min(cores), sum(cores) // self._wanted))
        #: Id of the checkpoint that players load next, None for the base model; `load` says which folder it is.
        self.checkpoint: str | None = None
        self._folder: Path | None = None
        self._seats: list[_Seat] = []
        self._starting: dict[Any, _Seat] = {}
        self._losses, self._last_loss = 0, 0.0

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(self, checkpoint: Path | None) -> None:
        """Have all players sample from this checkpoint folder from the next `play` on; None is the base model.

        The folder must be there under the same path on every machine. It is read when it is first played with, and
        `checkpoint` is the id in its manifest, or its name where this machine reads none.
        """
        self._folder = checkpoint
        self.checkpoint = identity(checkpoint) if checkpoint else None

    def play(
        self,
        tasks: Sequence[Task],
        *,
        on_episode: Callable[[Episode], None] | None = None,
        progress: Callable[[RolloutStats], None] | None = None,
        stats: RolloutStats | None = None,
        skip: Collection[str] = (),
        **options: Unpack[PlayOptions],
    ) -> list[Episode]:
        """`agent.rollout.play` by all players together: same arguments, same ids, same seeds, same result.

        The samples may differ from those of another number of players in the rounding of the model's arithmetic.
        `batch` and `workers` are each player's. In `stats`, `engine_seconds` is the mean over the players.

        Raises:
            UsageError: the engine cannot be made, or the checkpoint not be loaded.
            ClusterError: the players keep failing, or there is no room for any.
        """
        items = [
            Item(order, identity, task, sample)
            for order, (identity, task, sample) in enumerate(
                identified(tasks, options["namespace"], options.get("samples", 1))
            )
            if identity not in skip
        ]
        stats = stats if stats is not None else RolloutStats()
        stats.total += len(items)
        job = Job(next(_JOBS), options, self._folder, self.checkpoint)
        run = _Run(self, job, items, on_episode or (lambda episode: None), progress or (lambda stats: None), stats)
        return run.all()

    def close(self) -> None:
        """End the players and the connection, and the cluster if it was started for it."""
        self._dismiss()
        if self._own:
            self._ray.shutdown()

    @property
    def complete(self) -> bool:
        """Whether all players that are wanted are there."""
        return len(self._seats) == self._wanted

    # -- the players, for `_Run` --------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """As many players as are wanted, running or being started."""
        while len(self._seats) + len(self._starting) < self._wanted:
            options = {"num_cpus": self._cpus, "num_gpus": self._gpus, "max_concurrency": _MOST_CALLS}
            actor = self._ray.remote(Player).options(scheduling_strategy="SPREAD", **options)
            seat = _Seat(actor.remote(self._make_engine))
            self._starting[seat.actor.ready.remote()] = seat

    def _dismiss(self) -> None:
        """End all players, whatever they are doing."""
        for seat in [*self._seats, *self._starting.values()] if self._ray.is_initialized() else []:
            self._ray.kill(seat.actor)
        self._seats, self._starting = [], {}

    def _started(self, ref: Any) -> None:
        seat = self._starting.pop(ref)
        try:
            self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            self._lose(seat, error)
        else:
            self._seats.append(seat)

    def _lose(self, seat: _Seat, error: Exception) -> None:
        """A player is of no more use; another one is started in its place, where there is room for it.

        Raises:
            UsageError: its engine says that it was asked for what cannot be.
            ClusterError: too many were lost in a row.
        """
        if seat.lost:
            return
        seat.lost = True
        if seat in self._seats:
            self._seats.remove(seat)
        self._ray.kill(seat.actor)
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, UsageError):
            raise cause
        if seat.born > self._last_loss:
            self._losses, self._last_loss = self._losses + 1, time.monotonic()
        if self._losses > _LOSSES:
            says = " ".join(str(cause).split())[:500]
            kind = "" if isinstance(cause, EngrainError) else f"{type(cause).__name__}: "
            raise ClusterError(f"players were lost {self._losses} times in a row, the last to: {kind}{says}") from None
        self._fill()


class _Run:
    """One `Cluster.play`."""

    def __init__(
        self,
        cluster: Cluster,
        job: Job,
        items: Sequence[Item],
        on_episode: Callable[[Episode], None],
        progress: Callable[[RolloutStats], None],
        stats: RolloutStats,
    ) -> None:
        self.cluster, self.ray, self.job = cluster, cluster._ray, job
        self.shared = self.ray.put(job)
        self.waiting = deque(items)
        self.flying: dict[Any, tuple[_Seat, Item]] = {}
        self.finished: dict[int, Episode] = {}
        self.seats: set[_Seat] = set()  # all that had a part in this
        self.on_episode, self.progress, self.stats = on_episode, progress, stats

    def all(self) -> list[Episode]:
        if self.waiting:
            try:
                self._all()
            except BaseException:
                self.cluster._dismiss()  # what they are at is of no use any more
                raise
        return [self.finished[order] for order in sorted(self.finished)]

    def _all(self) -> None:
        start, last = time.perf_counter(), time.monotonic()
        before = replace(self.stats)
        self.cluster._fill()
        while self.waiting or self.flying:
            self._hand_out()
            refs = [*self.flying, *self.cluster._starting]
            if self.ray.wait(refs, num_returns=1, timeout=_WAIT_SECONDS)[0]:
                for ref in self.ray.wait(refs, num_returns=len(refs), timeout=0)[0]:
                    if ref in self.flying:
                        self._landed(ref)
                    else:
                        self.cluster._started(ref)
            if self.cluster._seats:
                last = time.monotonic()
            elif time.monotonic() - last > _START_SECONDS:
                raise ClusterError(
                    f"the cluster gave no player in {_START_SECONDS:.0f} s: does a machine have "
                    f"{self.cluster._cpus:g} free CPU cores and {self.cluster._gpus} free GPUs?"
                )
            self.stats.wall_seconds = before.wall_seconds + time.perf_counter() - start
            self._sum(before)
            self.progress(self.stats)

    def _hand_out(self) -> None:
        """Tasks to whoever has the fewest, up to what a scheduler opens at once."""
        while self.waiting and (seats := [seat for seat in self.cluster._seats if not seat.alone]):
            seat = min(seats, key=lambda seat: seat.outstanding)
            # A last try is played alone: who was only there when another task cost the player is not written off.
            last = self.waiting[0].tries == _TRIES - 1
            if seat.outstanding >= (1 if last else 2 * self.job.options.get("batch", BATCH)):
                return
            item = self.waiting.popleft()
            seat.alone = last
            if item.tries < _TRIES:
                ref = seat.actor.play.remote(self.shared, item)
            else:
                ref = seat.actor.give_up.remote(
                    self.shared, item, f"{item.tries} players were lost while it was played"
                )
            self.flying[ref] = seat, item
            seat.outstanding += 1
            self.seats.add(seat)

    def _landed(self, ref: Any) -> None:
        """Keep an episode, or play it again where its player was lost."""
        seat, item = self.flying.pop(ref)
        seat.outstanding -= 1
        seat.alone = False
        try:
            episode, seat.stats = self.ray.get(ref)
        except self.ray.exceptions.RayError as error:
            item.tries += not isinstance(error, self.ray.exceptions.RayTaskError)  # an engine's fault is no task's
            self.waiting.append(item)
            self.cluster._lose(seat, error)
            return
        self.cluster._losses = 0
        self.finished[item.order] = episode
        self.stats.episodes += 1
        self.stats.successes += episode.success
        self.stats.failed += episode.stop_reason is StopReason.ERROR
        self.on_episode(episode)

    def _sum(self, before: RolloutStats) -> None:
        for name in _SUMMED:
            total = sum(getattr(seat.stats, name) for seat in self.seats)
            setattr(self.stats, name, getattr(before, name) + total)
        busy = sum(seat.stats.engine_seconds for seat in self.seats) / max(1, len(self.seats))
        self.stats.engine_seconds = before.engine_seconds + busy


def _connect(address: str) -> tuple[Any, bool]:
    """Ray, connected, and whether it is this call that connected it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # those of players that were given up
    try:
        import ray
    except ImportError:
        raise MissingPackageError("playing on a cluster needs Ray: pip install 'engrain[ray]'") from None
    if ray.is_initialized():
        return ray, False
    _answers(address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        options["include_dashboard"] = False
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        says = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"no Ray cluster at {address!r}: {says}; use local, auto or host:port") from None
    return ray, True


def _answers(address: str) -> None:
    """Refuse a host and port where nobody listens: Ray itself would wait for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UsageError(f"no Ray cluster at {address!r}: {error}; use local, auto or the head's host:port") from None
