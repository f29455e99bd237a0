"""On-policy with another engine: one that samples from its own copy of the weights and is refreshed now and then."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import nn

from agent.engines.base import Engine, awake
from distill.checkpoint import save_weights
from distill.distributed import from_main, gather, is_main
from distill.source import Batch, Source


class RefreshedSource:
    """Brings a source's engine up to date every few steps, and says how stale its samples are.

    A sync is a folder `sync-000010/` in the run's folder, named after the step, so that an engine which caches by path
    or name sees a new one; the one before is deleted. A run that starts or resumes syncs at once: with checkpoints only
    at multiples of `every` (DistillConfig sees to that), a resumed run samples from the weights an unbroken one would.
    With several processes each has an engine of its own, or one that they may all refresh. An engine that can sleep is
    to sleep while the source is not called (`agent.engines.base.asleep`).

    Args:
        source: samples from `engine`.
        engine: loads adapters, or whole weights, from a folder.
        model: the weights under training.
        folder: the run's folder.
        every: steps between syncs; 1 samples from the current weights always.
        named: what episodes call the weights of a step; None is the name of the sync's folder.
    """

    def __init__(
        self,
        source: Source,
        engine: Engine,
        model: nn.Module,
        folder: Path,
        every: int,
        named: Callable[[int], str | None] | None = None,
    ) -> None:
        self.source, self.engine, self.model, self.folder, self.every = source, engine, model, folder, every
        self.named = named
        self.synced: int | None = None

    def __call__(self, step: int) -> Batch:
        """The source's batch, after a sync if it is due."""
        with awake(self.engine):
            if self.synced is None or step % self.every == 0 or step < self.synced:
                self._sync(step)
            assert self.synced is not None  # noqa: S101 - just set
            return replace(self.source(step), staleness=step - self.synced)

    def _sync(self, step: int) -> None:
        folder = self.folder / f"sync-{step:06d}"

        def clear() -> list[Path]:
            self.folder.mkdir(parents=True, exist_ok=True)
            if folder.exists():
                shutil.rmtree(folder)
            return list(self.folder.glob("sync-*"))

        older = from_main(clear)
        save_weights(folder, self.model)
        self.engine.load(folder)
        if self.named is not None:
            self.engine.checkpoint = self.named(step)
        self.synced = step
        gather(None)  # nobody reads the one before any more
        for old in older if is_main() else ():
            shutil.rmtree(old)


def drop_syncs(folder: Path) -> None:
    """Delete a run's syncs, when no engine samples from them any more."""
    for sync in folder.glob("sync-*"):
        shutil.rmtree(sync)
