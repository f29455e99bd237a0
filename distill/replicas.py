"""An engine in every process, asked in the main one: what it is to generate is dealt out, and all of them answer.

The main process plays, with a `ReplicatedEngine` around its engine; the others `serve` with theirs until they are let
go. So whatever is played, read or judged under `accelerate launch` is sampled on all devices, and only one process
writes. (A training step's samples are dealt out by task instead, see `distill.distributed.play`.)
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.engines.base import Completion, Engine, steady
from agent.episode import SamplingParams
from distill.distributed import everyone, from_main, rank, world
from envs.errors import EngrainError

#: So many prompts may go to one process whatever the others have: a few rows take hardly longer than one.
_FEW = 8


@dataclass(frozen=True)
class _Generate:
    prompts: Sequence[Sequence[int]]
    sampling: Sequence[SamplingParams]
    shares: Sequence[Sequence[int]]  # of each process, indices of its prompts

    def done_by(self, engine: Engine) -> list[Completion]:
        """Every process's completions, in the order of the prompts."""
        mine = self.shares[rank()]
        parts = everyone(lambda: engine.generate([self.prompts[i] for i in mine], [self.sampling[i] for i in mine]))
        found: dict[int, Completion] = {}
        for share, part in zip(self.shares, parts, strict=True):
            found.update(zip(share, part, strict=True))
        return [found[i] for i in range(len(self.prompts))]


@dataclass(frozen=True)
class _Load:
    checkpoint: Path | None

    def done_by(self, engine: Engine) -> None:
        """The same weights everywhere."""
        everyone(lambda: engine.load(self.checkpoint))


@dataclass(frozen=True)
class _Steady:
    """Until let go, the weights stay as they are; see `agent.engines.base.steady`."""


class ReplicatedEngine:
    """In the main process: an engine of which every process has its own, all of the same weights.

    A conversation goes to the process that had its earlier turns, and so their keys and values.

    Args:
        engine: the main process's.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.model, self.tokenizer = engine.model, engine.tokenizer
        self.copies = world()
        self._places: dict[int, int] = {}  # checksum of a prompt -> the process that read it
        self._lengths: set[int] = set()  # of those prompts

    @property
    def checkpoint(self) -> str | None:
        """The main engine's."""
        return self.engine.checkpoint

    @checkpoint.setter
    def checkpoint(self, name: str | None) -> None:
        self.engine.checkpoint = name

    @property
    def max_context(self) -> int:
        """The engine's own."""
        return self.engine.max_context

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]) -> list[Completion]:
        """As the engine's own, and raises what any of them raises."""
        order = _Generate(prompts, sampling, self._deal(prompts))
        _tell(order)
        return order.done_by(self.engine)

    def load(self, checkpoint: Path | None) -> None:
        """Let all of them sample from this checkpoint, whose folder all processes must see."""
        self._forget()
        order = _Load(checkpoint)
        _tell(order)
        order.done_by(self.engine)

    @contextmanager
    def steady(self) -> Iterator[None]:
        """As the engine's own, in all processes."""
        _tell(_Steady())
        try:
            with steady(self.engine):
                yield
        except Exception:  # nothing harder: then this process leaves, and the launcher sees to the others
            _tell(None)
            raise
        _tell(None)
        self._forget()

    def close(self) -> None:
        """Nothing: each process closes its own."""

    def _forget(self) -> None:
        self._places.clear()
        self._lengths.clear()

    def _deal(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Each process's prompts: those that go on from what it read, unless it has too many, and others elsewhere."""
        shares: list[list[int]] = [[] for _ in range(self.copies)]
        most = max(_FEW, 2 * len(prompts) // self.copies)
        new: list[int] = []
        sums = [self._checksums(prompt) for prompt in prompts]
        for index, (earlier, _) in enumerate(sums):
            place = next((self._places[one] for one in reversed(earlier) if one in self._places), None)
            (new if place is None or len(shares[place]) >= most else shares[place]).append(index)
        for index in new:
            min(shares, key=len).append(index)
        for place, share in enumerate(shares):
            for index in share:
                self._places[sums[index][1]] = place
                self._lengths.add(len(prompts[index]))
        return [sorted(share) for share in shares]

    def _checksums(self, prompt: Sequence[int]) -> tuple[list[int], int]:
        """Of the prompt's beginnings that are as long as prompts read before, and of all of it.

        Two prompts with one checksum cost the keys and values of one of them, nothing else.
        """
        read, done, total, earlier = array("q", prompt).tobytes(), 0, 0, []
        for length in sorted(self._lengths):
            if length > len(prompt):
                break
            total, done = zlib.crc32(read[8 * done : 8 * length], total), length
            earlier.append(total)
        return earlier, zlib.crc32(read[8 * done :], total)


def serve(engine: Engine, other: Callable[[Any], None] | None = None) -> None:
    """In a process that is not the main one: do with this engine what the main one does with its own, until let go.

    Args:
        engine: this process's, of the same weights.
        other: does what the main process sends besides.
    """
    while (order := from_main(_nothing)) is not None:
        if isinstance(order, _Steady):
            with steady(engine):
                serve(engine)
        elif isinstance(order, _Generate | _Load):
            with suppress(EngrainError):  # the main process has it too, and knows what to do
                order.done_by(engine)
        elif other is not None:
            other(order)


def dismiss() -> None:
    """In the main process: let those that serve go."""
    _tell(None)


@contextmanager
def replicated(engine: Engine) -> Iterator[Engine]:
    """In the main process, while the others `serve` with theirs: all engines as one; they are let go at the end."""
    if world() == 1:
        yield engine
        return
    try:
        yield ReplicatedEngine(engine)
    except Exception:
        dismiss()
        raise
    dismiss()


def _tell(order: object) -> None:
    from_main(lambda: order)


def _nothing() -> Any:
    return None
