"""Keys and values of a batch of rows that come and go.

transformers' own dynamic cache copies everything at every step. This one writes each step into spare room, and
lets rows leave, be joined by others, and be taken out for later.

Layout: B rows of equal width T, right-aligned. A column that a row does not use is False in `mask_BT`, wherever
it stands: keys carry their own (rotary) positions, so holes do no harm.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

_SPARE = 64  # columns of room added whenever the width outgrows its buffer

#: One row's keys and values: a pair `[H, L, D]` for every layer.
RowState = tuple[tuple[Tensor, Tensor], ...]


class _Layer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values `[B, H, T, D]`: views into buffers with room to the right."""

    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.width = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append `[B, H, n, D]` and return everything so far."""
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.place(key_states, value_states)
        else:
            width = self.width + key_states.shape[-2]
            if width > self.keys.shape[-2]:
                self.place(*self.used(), spare=key_states.shape[-2] + _SPARE)
            self.keys[:, :, self.width : width] = key_states
            self.values[:, :, self.width : width] = value_states
            self.width = width
        return self.used()

    def used(self) -> tuple[Tensor, Tensor]:
        """Keys and values without the spare room."""
        return self.keys[:, :, : self.width], self.values[:, :, : self.width]

    def place(self, keys: Tensor, values: Tensor, spare: int = _SPARE) -> None:
        """Take these keys and values over, with spare room behind them."""
        self.keys = _with_room(keys, spare)
        self.values = _with_room(values, spare)
        self.width = keys.shape[-2]
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Columns in use."""
        return self.width


class RowCache(Cache):
    """Key-value cache of a running batch, with the mask that says which columns each row uses."""

    layers: list[Any]

    def __init__(self, mask_BT: Tensor, layers: list[Any] | None = None) -> None:
        super().__init__(layers=layers, layer_class_to_replicate=None if layers else _Layer)
        self.mask_BT = mask_BT

    @classmethod
    def of_rows(cls, states: Sequence[RowState], device: torch.device) -> RowCache:
        """Stack rows of any lengths; an empty state is a row without columns. Rows that are one object share."""
        lengths = [state[0][0].shape[-2] if state else 0 for state in states]
        width = max(lengths)
        mask_BT = torch.arange(width, device=device) >= torch.tensor(
            [width - n for n in lengths], device=device
        ).unsqueeze(1)
        template = next((state for state in states if state), None)
        if template is None:
            return cls(mask_BT)
        layers: list[Any] = []
        for index, (key, value) in enumerate(template):
            layer = _Layer()
            layer.dtype, layer.device = key.dtype, key.device
            keys, values = (
                tensor.new_zeros(len(states), tensor.shape[0], width + _SPARE, tensor.shape[2])
                for tensor in (key, value)
            )
            for row, (state, length) in enumerate(zip(states, lengths, strict=True)):
                if length:
                    keys[row, :, width - length : width] = state[index][0]
                    values[row, :, width - length : width] = state[index][1]
            layer.keys, layer.values, layer.width, layer.is_initialized = keys, values, width, True
            layers.append(layer)
        return cls(mask_BT, layers)

    @property
    def width(self) -> int:
        """Columns T."""
        return int(self.mask_BT.shape[1])

    def extend_mask(self, mask_Bn: Tensor) -> Tensor:
        """Say which of the columns that the next forward pass appends are used; returns the whole mask."""
        self.mask_BT = torch.cat([self.mask_BT, mask_Bn], dim=1)
        return self.mask_BT

    def keep(self, rows: Sequence[int]) -> bool:
        """Drop all other rows, and the leading columns that no remaining row uses. Always done: True."""
        index = torch.tensor(rows, device=self.mask_BT.device)
        mask_BT = self.mask_BT[index]
        start = int(mask_BT.any(dim=0).int().argmax())
        self.mask_BT = mask_BT[:, start:]
        for layer in self.layers:
            keys, values = layer.used()
            layer.place(keys[index, :, start:], values[index, :, start:])
        return True

    def join(self, others: Sequence[RowCache]) -> None:
        """Add the other caches' rows below this one's; narrower ones are padded on the left.

        The others are used up layer by layer, so that no more than one layer is there twice.
        """
        if not others:
            return
        caches = [self, *others]
        width = max(cache.width for cache in caches)
        self.mask_BT = torch.cat([_pad_left(cache.mask_BT, width, -1) for cache in caches])
        for layers in zip(*(cache.layers for cache in caches), strict=True):
            used = [layer.used() for layer in layers]
            keys, values = (torch.cat([_pad_left(a, width, -2) for a in parts]) for parts in zip(*used, strict=True))
            del used
            for layer in layers:
                layer.keys = layer.values = None
            layers[0].place(keys, values)

    def row(self, row: int, length: int | None = None) -> RowState:
        """A copy of one row's used columns, or of the first `length` of them."""
        columns = self.mask_BT[row].nonzero().squeeze(1)[:length]
        return tuple((layer.keys[row][:, columns], layer.values[row][:, columns]) for layer in self.layers)


def _with_room(tensor: Tensor, spare: int) -> Tensor:
    batch, heads, width, size = tensor.shape
    buffer = tensor.new_empty(batch, heads, width + spare, size)
    buffer[:, :, :width] = tensor
    return buffer


def _pad_left(tensor: Tensor, width: int, dim: int) -> Tensor:
    missing = width - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor.new_zeros(shape), tensor], dim=dim)


class PastStore:
    """Finished rows' keys and values, so that a prompt that goes on from one costs only its new tokens.

    Holds at most `limit` tokens (their memory: `2 x layers x key-value heads x head size` numbers each); the
    least recently used go first. Valid as long as the weights stay the same: `clear` it when they change.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.tokens = 0
        self._states: OrderedDict[tuple[int, ...], RowState] = OrderedDict()

    def put(self, ids: Sequence[int], state: RowState, replaces: int = 0) -> None:
        """Keep the state after `ids`; that of its first `replaces` ids (0: none) is not needed any more."""
        key = tuple(ids)
        self._drop(key[:replaces])
        self._drop(key)
        if len(key) > self.limit:
            return
        self._states[key] = state
        self.tokens += len(key)
        while self.tokens > self.limit:
            self._drop(next(iter(self._states)))

    def find(self, prompt: Sequence[int]) -> tuple[int, RowState]:
        """Length and state of the longest stored sequence that `prompt` goes on from; (0, ()) for none."""
        for length in sorted({len(key) for key in self._states if len(key) < len(prompt)}, reverse=True):
            key = tuple(prompt[:length])
            if key in self._states:
                self._states.move_to_end(key)
                return length, self._states[key]
        return 0, ()

    def clear(self) -> None:
        """Forget everything."""
        self._states.clear()
        self.tokens = 0

    def _drop(self, key: tuple[int, ...]) -> None:
        if self._states.pop(key, None) is not None:
            self.tokens -= len(key)
