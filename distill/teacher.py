"""The teacher: the distribution that saw the knowledge, scored on what the student said without it.

All teacher prompts of a job begin with the same knowledge and the teacher is frozen, so the key-value states of that
prefix are computed once and every sample of every step is scored from them (a teacher that moves computes them once a
step). Which tokens are shared is found on the ids themselves: whatever a sample's prompt has in common with the cached
prefix is taken from the cache, the rest is read, so that the result never depends on the cache being right about the
text.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from distill.adapters import follow, teacher_tensors, teacher_weights
from distill.attention import States
from distill.backbone import Backbone
from distill.distributed import world
from distill.errors import CheckpointError, DistillConfigError, VocabularyMismatchError
from distill.packing import Sample, pack

logger = logging.getLogger(__name__)


class Teacher(Protocol):
    """Scores samples; never trains, but may follow the student."""

    @property
    def head_VD(self) -> Tensor:
        """Output head, vocabulary x the teacher's hidden size."""
        ...

    def prepare(self, prompts: Sequence[Sequence[int]]) -> int:
        """Told the teacher prompts of a whole batch before they are scored in parts; how many leading tokens of each
        need no reading then."""
        ...

    def hidden(self, samples: Sequence[Sample]) -> Tensor:
        """Hidden states at the positions that predict sampled tokens, all samples in order, R x D."""
        ...

    def follow(self) -> None:
        """Told after each optimiser step."""
        ...

    def state(self) -> Mapping[str, Tensor]:
        """What a resumed run cannot find elsewhere."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        ...


class PrefixCache:
    """Key-value states of shared prompt beginnings, least recently used out first.

    Args:
        backbone: whose states they are; frozen while the cache lives.
        max_bytes: bound on all entries together. An entry that alone exceeds it is used and not kept.
    """

    def __init__(self, backbone: Backbone, max_bytes: int = 4 * 2**30) -> None:
        self.backbone = backbone
        self.max_bytes = max_bytes
        self._entries: OrderedDict[tuple[int, ...], States] = OrderedDict()
        self._recalled: list[tuple[int, ...]] = []

    def clear(self) -> None:
        """Forget all entries: the weights have changed."""
        self.recall(())

    @property
    def prefixes(self) -> list[tuple[int, ...]]:
        """Token ids of all entries, least recently used first."""
        return self._recalled or list(self._entries)

    def recall(self, prefixes: Sequence[tuple[int, ...]]) -> None:
        """Have entries for just these from the next `find` on.

        Which entries there are decides where a prompt is split, and so the last bits of what is made of it.
        """
        self._entries.clear()
        self._recalled = list(prefixes)

    @property
    def bytes(self) -> int:
        """Memory held now."""
        return sum(_size(entry) for entry in self._entries.values())

    def best(self, prompts: Sequence[Sequence[int]]) -> tuple[int, States]:
        """How many leading tokens of all `prompts` stand in the cache, and the keys and values of just those.

        Several prompts whose shared beginning no entry covers by half get an entry of their own first. A single
        prompt shares all of itself with itself and takes what there is. The last token of a prompt is always left to
        be read, since its hidden state predicts the first sampled token. Several processes make entries in `find`
        alone, where all see the same prompts: with sharded layers they must make the same passes.
        """
        length, entry = self.find(prompts, grow=world() == 1)
        return length, [(keys[:, :, :length], values[:, :, :length]) for keys, values in entry]

    def find(self, prompts: Sequence[Sequence[int]], *, grow: bool = True) -> tuple[int, States]:
        """The same, as the entry itself (keys and values a layer), which may be longer than what is covered."""
        recalled, self._recalled = self._recalled, []
        for ids in recalled:
            self._keep(ids, self.backbone.states(ids))
        shared = _common_prefix(prompts)
        shared = shared[: min(len(prompt) for prompt in prompts) - 1]
        covered = {key: len(_common_prefix([key, shared])) for key in self._entries}
        key = max(covered, key=lambda k: covered[k], default=())
        length = covered.get(key, 0)
        if grow and len(prompts) > 1 and 2 * length < len(shared):
            key, length = tuple(shared), len(shared)
            entry = self.backbone.states(shared)
            self._keep(key, entry)
        elif length:
            entry = self._entries[key]
            self._entries.move_to_end(key)
        else:
            return 0, []
        return length, entry

    def _keep(self, key: tuple[int, ...], entry: States) -> None:
        size = _size(entry)
        if size > self.max_bytes:
            logger.warning("prefix of %d tokens needs %d bytes, over the bound: not kept", len(key), size)
            return
        self._entries[key] = entry
        while self.bytes > self.max_bytes:
            old, _ = self._entries.popitem(last=False)
            logger.info("dropped the cached prefix of %d tokens", len(old))
        logger.info("cached a prefix of %d tokens, %.1f MiB", len(key), size / 2**20)


class FrozenTeacher:
    """The initial student (its LoRA adapter off) or a second model, with the knowledge prefix cached.

    Args:
        backbone: the student's own backbone for self-distillation, or another model's.
        use_cache: False reads every prompt in full (for comparison).
        max_cache_bytes: bound on the prefix cache.
    """

    def __init__(self, backbone: Backbone, *, use_cache: bool = True, max_cache_bytes: int = 4 * 2**30) -> None:
        self.backbone = backbone
        self.cache: PrefixCache | None = None
        if use_cache:
            with self._scoring():
                reason = _why_not_cached(backbone)
            if reason is None:
                self.cache = PrefixCache(backbone, max_cache_bytes)
            else:
                logger.warning("%s: %s; every teacher prompt is read in full", type(backbone.decoder).__name__, reason)

    @property
    def head_VD(self) -> Tensor:
        """Output head, vocabulary x hidden size."""
        return self.backbone.head_VD

    @torch.no_grad()
    def prepare(self, prompts: Sequence[Sequence[int]]) -> int:
        """Cache what these prompts have in common, unless that is done already."""
        if self.cache is None:
            return 0
        with self._scoring():
            return self.cache.find(prompts)[0]

    @torch.no_grad()
    def hidden(self, samples: Sequence[Sample]) -> Tensor:
        """Hidden states at the positions that predict sampled tokens, R x D."""
        prompts = [sample.teacher_prompt for sample in samples]
        with self._scoring():
            length, prefix = self.cache.best(prompts) if self.cache is not None else (0, ())
            packed = pack([p[length:] for p in prompts], samples, offset=length, device=self.backbone.device)
            hidden_TD = self.backbone.hidden(packed, prefix)
        return hidden_TD[packed.predict_R]

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        """Teacher's weights, eval mode: no dropout, and a cache also where the student checkpoints its gradients."""
        model = self.backbone.model
        was_training = model.training
        with teacher_weights(model):
            model.eval()
            try:
                yield
            finally:
                model.train(was_training)

    def follow(self) -> None:
        """Stay as it is."""

    def state(self) -> Mapping[str, Tensor]:
        """Token ids of the cached prefixes, least recently used first: its weights are to be found elsewhere."""
        prefixes = self.cache.prefixes if self.cache is not None else []
        return {f"prefix.{number:04d}": torch.tensor(ids) for number, ids in enumerate(prefixes)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Have the same prefixes cached."""
        if self.cache is not None:
            self.cache.recall([tuple(state[name].tolist()) for name in sorted(state)])


class EmaTeacher(FrozenTeacher):
    """A moving average of the student's adapter: w_T += rate (w_S - w_T) after each step.

    A and B are averaged each for itself, so that it is an adapter too. Every step drops the prefix cache, which is
    then computed anew once a step (`StepMetrics.seconds_prefix`).

    Args:
        backbone: the student's own, with a teacher adapter beside the student's (`continue_lora(kind="ema")`).
        rate: share of the student in each step, in (0, 1].
        use_cache: False reads every prompt in full.
        max_cache_bytes: bound on the prefix cache.

    Raises:
        DistillConfigError: the model has no teacher adapter.
    """

    def __init__(
        self, backbone: Backbone, rate: float, *, use_cache: bool = True, max_cache_bytes: int = 4 * 2**30
    ) -> None:
        super().__init__(backbone, use_cache=use_cache, max_cache_bytes=max_cache_bytes)
        if not teacher_tensors(backbone.model):
            raise DistillConfigError("an ema teacher needs an adapter of its own; make the student with kind='ema'")
        self.rate = rate

    def follow(self) -> None:
        """Move towards the student."""
        follow(self.backbone.model, self.rate)
        self._forget()

    def state(self) -> Mapping[str, Tensor]:
        """The adapter's weights."""
        return teacher_tensors(self.backbone.model)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back the adapter's weights.

        Raises:
            CheckpointError: they are not those of this adapter.
        """
        own = teacher_tensors(self.backbone.model)
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in state.items()}:
            raise CheckpointError("the checkpoint's teacher does not fit this adapter; give this run another folder")
        for name, weight in own.items():
            weight.copy_(state[name])
        self._forget()

    def _forget(self) -> None:
        if self.cache is not None:
            self.cache.clear()


@torch.no_grad()
def _why_not_cached(backbone: Backbone) -> str | None:
    """Why this model cannot go on from cached states, or None if it can: tried out on a dozen tokens."""
    size = backbone.head_VD.shape[0]
    prefix, suffix = (tuple((5 * i + start) % size for i in range(6)) for start in (1, 2))
    end = Sample("check", suffix[:1], prefix + suffix[:1], suffix[1:], (True,) * (len(suffix) - 1))
    whole = pack([end.teacher_prompt], [end], device=backbone.device)
    full_TD = backbone.hidden(whole)[len(prefix) :]
    try:
        states = backbone.states(prefix, piece=len(prefix) // 2)
        cached_TD = backbone.hidden(pack([suffix[:1]], [end], offset=len(prefix), device=backbone.device), states)
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return f"it does not take a key-value cache ({error})"
    difference = (cached_TD - full_TD).float().abs().max() / full_TD.float().abs().max().clamp(min=1e-6)
    return None if difference <= backbone.tolerance else f"cached states give other results (by {difference:.2g})"


def check_vocabulary(student: Any, teacher: Any) -> None:
    """Both tokenizers must map every token to the same id, since distributions are compared id by id.

    Raises:
        VocabularyMismatchError: naming the first token that differs.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    different = next((t for t in ours if theirs.get(t) != ours[t]), None) or next(iter(set(theirs) - set(ours)))
    raise VocabularyMismatchError(
        f"teacher and student have different vocabularies ({len(theirs)} and {len(ours)} tokens; {different!r} is "
        f"{theirs.get(different)} and {ours.get(different)}); use two models of one family"
    )


def _common_prefix(sequences: Sequence[Sequence[int]]) -> list[int]:
    low, high = min(map(tuple, sequences)), max(map(tuple, sequences))
    length = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return list(low[:length])


def _size(entry: States) -> int:
    return sum(t.numel() * t.element_size() for pair in entry for t in pair)
