"""The decode loop: many prompts through one causal language model, continuously batched.

Tokens that all prompts begin with run once, at batch 1. Prompts are prefilled in groups of about the same number of
new tokens, rows leave the batch when they are done, and waiting prompts take their places. What a row gets depends on
its own prompt, parameters and seed only (up to the rounding of the matrix products).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from agent.constraint import Restriction, Vocabulary
from agent.engines.base import Completion
from agent.engines.cache import PastStore, RowCache, RowState
from agent.engines.sampling import pick, pick_among
from agent.episode import FinishReason, SamplingParams
from agent.errors import EngineFailedError
from agent.renderer import common_prefix

_MIN_SHARED = 16  # a shorter common prefix saves less than its own forward pass costs
_LEAVE = 8  # rows leave when one in this many is done
_REFILL = 4  # waiting prompts enter when one in this many places is free


@dataclass(frozen=True)
class Limits:
    """How much runs together. Tokens are counted as rows times their widest row.

    Rows that are prefilled together are padded to the widest; a CPU is busy with few, and then wastes less on padding.
    """

    max_batch: int = 64
    batch_tokens: int = 131_072
    prefill_tokens: int = 8_192


@dataclass
class _Row:
    index: int
    prompt: list[int]
    sampling: SamplingParams
    uniforms: Tensor
    shared: int = 0  # leading tokens whose keys and values exist already ...
    past: RowState = ()  # ... namely these
    replaces: int = 0  # length of the stored state that this row's own will replace
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: FinishReason | None = None
    restriction: Restriction | None = None

    @property
    def total(self) -> int:
        return len(self.prompt) + self.sampling.max_tokens

    @property
    def new(self) -> int:
        """Tokens of the prompt that have no keys and values yet."""
        return len(self.prompt) - self.shared


class Decoder:
    """Continues token ids with one model. Call it in inference mode, with the model in eval mode.

    `store` keeps keys and values between calls (None: not at all); it must be cleared when the weights change.
    `vocabulary` is needed for rows with choices only.
    """

    def __init__(
        self,
        model: Any,
        stop_ids: frozenset[int],
        limits: Limits,
        store: PastStore | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.vocabulary = vocabulary
        self.model = model
        self.stop_ids = stop_ids
        self.limits = limits
        self.store = store
        self.device = next(model.parameters()).device
        self.flexible = has_plain_cache(model)
        self._waiting: deque[_Row] = deque()
        self._running: list[_Row] = []
        self._cache: RowCache | _ModelCache | None = None

    def run(self, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]) -> list[Completion]:
        """Continue every prompt; results in the order of the prompts.

        Raises:
            EngineFailedError: the model's logits are not numbers.
            ConstraintError: none of a row's choices can be written with the model's tokens.
        """
        rows = [
            _Row(index, list(prompt), params, _uniforms(params), restriction=self._restriction(params))
            for index, (prompt, params) in enumerate(zip(prompts, sampling, strict=True))
        ]
        with _contiguous_head(self.model):
            if self.flexible:
                self._find_pasts(rows)
            self._waiting = deque(sorted(rows, key=lambda row: (-row.new, -row.total, row.index)))
            while self._waiting or self._running:
                if self._waiting and self._may_refill():
                    self._refill()
                else:
                    self._step()
                self._leave()
        return [_completion(row) for row in rows]

    def _restriction(self, params: SamplingParams) -> Restriction | None:
        if not params.choices:
            return None
        assert self.vocabulary is not None  # noqa: S101
        return Restriction(self.vocabulary, params.choices)

    def _find_pasts(self, rows: list[_Row]) -> None:
        """Give every row the keys and values that exist already, or that it shares with the others."""
        if self.store is not None:
            for row in rows:
                row.shared, row.past = self.store.find(row.prompt)
                row.replaces = row.shared
        prefix = common_prefix(*(row.prompt[:-1] for row in rows))
        rows = [row for row in rows if row.shared < len(prefix)]
        if len(prefix) < _MIN_SHARED or len(rows) < 2:
            return
        known = min(rows, key=lambda row: row.shared)  # all of them hold the same tokens up to there
        cache = RowCache.of_rows([known.past], self.device)
        self._forward([prefix[known.shared :]], [known.shared], cache)
        state = cache.row(0)
        if self.store is not None:
            self.store.put(prefix, state)
        for row in rows:
            row.shared, row.past, row.replaces = len(prefix), state, 0

    def _may_refill(self) -> bool:
        if not self._running:
            return True
        free = self.limits.max_batch - len(self._running)
        enough = free >= min(len(self._waiting), max(1, self.limits.max_batch // _REFILL))
        return self.flexible and enough and self._fits([self._waiting[0]])

    def _fits(self, rows: Sequence[_Row]) -> bool:
        """Whether these rows may run with those that run already."""
        together = [*self._running, *rows]
        widest = max(row.total for row in together)
        return len(together) <= self.limits.max_batch and len(together) * widest <= self.limits.batch_tokens

    def _next_group(self) -> list[_Row]:
        group = [self._waiting.popleft()]  # the one with the most new tokens
        while self._waiting:
            too_many = (len(group) + 1) * group[0].new > self.limits.prefill_tokens
            if (too_many and self.flexible) or not self._fits([*group, self._waiting[0]]):
                break
            group.append(self._waiting.popleft())
        return group

    def _refill(self) -> None:
        """Let waiting rows in, group by group, until no more fit."""
        caches = [] if self._cache is None else [self._cache]
        caches.append(self._admit(self._next_group()))
        while self.flexible and self._waiting and self._fits([self._waiting[0]]):
            caches.append(self._admit(self._next_group()))
        self._cache = caches[0]
        if isinstance(self._cache, RowCache):  # only such are refilled
            self._cache.join([cache for cache in caches[1:] if isinstance(cache, RowCache)])

    def _admit(self, group: list[_Row]) -> RowCache | _ModelCache:
        """Run the group's prompts, sample every row's first token, and return their keys and values."""
        cache = (
            RowCache.of_rows([row.past for row in group], self.device)
            if self.flexible
            else _ModelCache(self.model, len(group), self.device)
        )
        logits_BV = self._forward([row.prompt[row.shared :] for row in group], [row.shared for row in group], cache)
        for row in group:
            row.past = ()
        self._accept(group, logits_BV)
        self._running += group
        return cache

    def _step(self) -> None:
        """One token for every running row."""
        assert self._cache is not None  # noqa: S101
        inputs = [row.ids[-1:] for row in self._running]
        positions = [len(row.prompt) + len(row.ids) - 1 for row in self._running]
        self._accept(self._running, self._forward(inputs, positions, self._cache))

    def _accept(self, rows: list[_Row], logits_BV: Tensor) -> None:
        """Sample one token for every row that is not done, and see which are done now."""
        live = [i for i, row in enumerate(rows) if row.finish is None]
        uniforms_B = torch.stack([rows[i].uniforms[len(rows[i].ids)] for i in live])
        if len(live) < len(rows):
            logits_BV = logits_BV[live]
        ids, logprobs = pick(logits_BV, [rows[i].sampling for i in live], uniforms_B)
        for place, i in enumerate(live):
            row, id_, logprob = rows[i], ids[place], logprobs[place]
            if row.restriction is not None:
                uniform = float(uniforms_B[place])
                id_, logprob = pick_among(logits_BV[place], row.restriction.allowed, row.sampling, uniform)
                row.restriction.advance(id_)
            if logprob != logprob:
                raise EngineFailedError(
                    "the model's logits are not numbers (NaN); its weights are damaged, or the number format "
                    "is too small for them: try dtype float32"
                )
            row.ids.append(id_)
            row.logprobs.append(logprob)
            if id_ in self.stop_ids:
                row.finish = FinishReason.STOP
            elif len(row.ids) == row.sampling.max_tokens:
                row.finish = FinishReason.LENGTH

    def _leave(self) -> None:
        """Take finished rows out of the batch once enough are done to pay for moving the others."""
        assert self._cache is not None  # noqa: S101
        live = [i for i, row in enumerate(self._running) if row.finish is None]
        done = len(self._running) - len(live)
        if done == 0 or (live and done * _LEAVE < len(self._running)):
            return
        if self.store is not None and isinstance(self._cache, RowCache):
            for i, row in enumerate(self._running):
                if row.finish is not None:
                    ids = [*row.prompt, *row.ids[:-1]]  # the last token has not been through the model
                    state = self._cache.row(i, len(ids))
                    self.store.put(ids, state, row.replaces)
        if not live:
            self._running, self._cache = [], None
        elif self._cache.keep(live):
            self._running = [self._running[i] for i in live]

    def _forward(self, inputs: list[list[int]], starts: list[int], cache: RowCache | _ModelCache) -> Tensor:
        """Append token ids to every row, the first at position `starts[row]`; logits `[B, V]` of the last."""
        width = max(map(len, inputs))
        ids_BT = torch.zeros(len(inputs), width, dtype=torch.long)
        positions_BT = torch.zeros(len(inputs), width, dtype=torch.long)
        for row, (ids, start) in enumerate(zip(inputs, starts, strict=True)):
            ids_BT[row, width - len(ids) :] = torch.tensor(ids)
            positions_BT[row, width - len(ids) :] = torch.arange(start, start + len(ids))
        missing_B1 = torch.tensor([[width - len(ids)] for ids in inputs])
        mask_Bn = (torch.arange(width) >= missing_B1).to(self.device)
        output = self.model(
            input_ids=ids_BT.to(self.device),
            attention_mask=cache.extend_mask(mask_Bn),
            position_ids=positions_BT.to(self.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV


class _ModelCache(DynamicCache):
    """The model's own cache where it is not a plain one (sliding windows, recurrent states): rows never join."""

    def __init__(self, model: Any, rows: int, device: torch.device) -> None:
        super().__init__(config=model.config)
        self.mask_BT = torch.ones(rows, 0, dtype=torch.bool, device=device)

    def extend_mask(self, mask_Bn: Tensor) -> Tensor:
        """See `RowCache.extend_mask`."""
        self.mask_BT = torch.cat([self.mask_BT, mask_Bn], dim=1)
        return self.mask_BT

    def keep(self, rows: Sequence[int]) -> bool:
        """Drop all other rows, where every layer can."""
        if not all(isinstance(layer, DynamicLayer) for layer in self.layers):
            return False
        index = torch.tensor(rows, device=self.mask_BT.device)
        self.batch_select_indices(index)
        self.mask_BT = self.mask_BT[index]
        return True


@contextmanager
def _contiguous_head(model: Any) -> Iterator[None]:
    """Inside, the output head gets contiguous inputs.

    It is handed the last position of every row, a strided view. For such an input torch multiplies a frozen head
    (as under LoRA) row by row, with a copy of the whole head for each: gigabytes a batch.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda module, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


def has_plain_cache(model: Any) -> bool:
    """Whether every layer of the model keeps all keys and values: only then may rows share, join and be kept."""
    try:
        layers = DynamicCache(config=model.config).layers
    except (AttributeError, KeyError, ValueError):
        return False
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def _uniforms(sampling: SamplingParams) -> Tensor:
    seed = sampling.seed if sampling.seed is not None else int(torch.randint(2**62, ()))
    generator = torch.Generator().manual_seed(seed % 2**63)
    return torch.rand(sampling.max_tokens, generator=generator, dtype=torch.float64)


def _completion(row: _Row) -> Completion:
    return Completion(tuple(row.ids), tuple(row.logprobs), row.finish or FinishReason.LENGTH, row.shared)
