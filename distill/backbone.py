"""A Hugging Face causal LM seen as what the loss needs: hidden states of packed sequences, and an output head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from transformers import DynamicCache

from distill.attention import IMPLEMENTATION, Layout, States
from distill.errors import UnsupportedModelError
from distill.packing import Packed, Sample, attention_mask, pack


class Backbone:
    """The decoder stack and the output head of a model, with or without a LoRA adapter around it.

    Raises:
        UnsupportedModelError: logits are not `hidden @ head.T` (soft-capped or scaled logits, a biased head), or the
            model cannot read packed rows (recurrent layers).
    """

    def __init__(self, model: nn.Module, *, check: bool = True) -> None:
        self.model = model
        base = cast(Any, model.get_base_model() if isinstance(model, PeftModel) else model)
        self.decoder: nn.Module = base.get_decoder()
        head = base.get_output_embeddings()
        if head is None or getattr(head, "bias", None) is not None:
            raise UnsupportedModelError(f"{type(base).__name__} has no plain output head; use a decoder-only model")
        self.config: Any = base.config.get_text_config(decoder=True)
        self._head = head
        self._base = base
        adapter = {p.dtype for n, p in model.named_parameters() if "lora_" in n}
        self._mixed = head.weight.dtype == torch.bfloat16 and torch.float32 in adapter
        kinds = set(getattr(self.config, "layer_types", None) or ())
        slides = getattr(self.config, "sliding_window", None) is not None and not kinds
        if self.config._attn_implementation == "sdpa" and kinds <= {"full_attention"} and not slides:
            self.config._attn_implementation = IMPLEMENTATION
        if check:
            self._check()

    @property
    def head_VD(self) -> Tensor:
        """The output head's weight, vocabulary x hidden size."""
        return cast(Tensor, self._head.weight)

    @property
    def device(self) -> torch.device:
        """Where inputs must lie."""
        return self.head_VD.device

    def hidden(self, packed: Packed, prefix: States = (), cache: DynamicCache | None = None) -> Tensor:
        """Last hidden states of a packed row, T x D.

        Args:
            packed: the row.
            prefix: keys and values from which every sequence of the row goes on.
            cache: keys and values from which the row, then one sequence, goes on; it grows by the row.
        """
        attention: dict[str, Any]
        if self.config._attn_implementation == IMPLEMENTATION:  # four dimensions: transformers hands such a mask on
            unread = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
            grown = cache.get_seq_length() if cache is not None else 0
            attention = {"attention_mask": unread, "layout": Layout(packed.sequences, prefix, grown)}
        else:
            if prefix:
                cache = DynamicCache()
                for layer, (keys, values) in enumerate(prefix):
                    cache.update(keys, values, layer)
            attention = {"attention_mask": self._masks(packed, cache.get_seq_length() if cache is not None else 0)}
        with self._precision():
            output = self.decoder(
                input_ids=packed.input_ids_1T,
                position_ids=packed.position_ids_1T,
                past_key_values=cache,
                use_cache=cache is not None,
                **attention,
            )
        return cast(Tensor, output.last_hidden_state[0])

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """Of a model in bfloat16 the adapter, kept in float32, multiplies in bfloat16 too, as under mixed precision.

        PEFT's way is to turn every layer's input into float32 for it, which a backward pass then keeps, too.
        """
        if not self._mixed:
            yield
            return
        with torch.autocast(self.device.type, torch.bfloat16), ExitStack() as stack:
            if not getattr(self._base, "is_gradient_checkpointing", False):  # the second forward runs outside of this
                stack.enter_context(disable_input_dtype_casting(self.model))
            yield

    def states(self, ids: Sequence[int], piece: int = 1024) -> States:
        """Keys and values of all layers for these tokens, read `piece` tokens at a time to bound the memory."""
        cache = DynamicCache()  # without a config: every layer keeps all positions, sliding ones are masked instead
        for start in range(0, len(ids), piece):
            part = tuple(ids[start : start + piece])
            sample = Sample("prefix", part[:1], part[:1], part[1:], (False,) * (len(part) - 1))
            self.hidden(pack([part[:1]], [sample], offset=start, device=self.device), cache=cache)
        return [(layer.keys, layer.values) for layer in cast(Any, cache.layers)]

    def _masks(self, packed: Packed, prefix: int) -> Tensor | dict[str, Tensor]:
        window = getattr(self.config, "sliding_window", None)
        kinds = set(getattr(self.config, "layer_types", None) or ())
        if kinds <= {"full_attention"}:
            slides = window is not None and not kinds  # such as Mistral: every layer slides, none is named
            return attention_mask(packed, prefix=prefix, window=window if slides else None)
        if not kinds <= {"full_attention", "sliding_attention"}:
            raise UnsupportedModelError(
                f"layers of kind {', '.join(sorted(kinds))} cannot read packed rows; use a model with full or "
                "sliding-window attention"
            )
        return {
            "full_attention": attention_mask(packed, prefix=prefix),
            "sliding_attention": attention_mask(packed, prefix=prefix, window=window),
        }

    @property
    def tolerance(self) -> float:
        """Relative difference that rounding in the model's dtype explains."""
        return 0.05 if self.head_VD.dtype in (torch.bfloat16, torch.float16) else 1e-3

    def _check(self) -> None:
        difference = self._difference()
        if not difference <= self.tolerance and self.config._attn_implementation == IMPLEMENTATION:
            self.config._attn_implementation = "sdpa"  # it keeps the layout from its attention layers
            difference = self._difference()
        if not difference <= self.tolerance:
            raise UnsupportedModelError(
                f"{type(self._base).__name__}: its logits are not its output head applied to packed hidden states "
                f"(relative difference {difference:.2g}); soft-capped, scaled or recurrent models are not supported"
            )

    @torch.no_grad()
    def _difference(self) -> float:
        """How far the logits of two short sequences, packed, lie from those the model itself gives for each alone."""
        size = self.head_VD.shape[0]
        first, second = ([(7 * i + 3) % size for i in range(n)] for n in (5, 4))
        samples = [
            Sample("check", (ids[0],), (ids[0],), tuple(ids[1:]), (True,) * (len(ids) - 1)) for ids in (first, second)
        ]
        was_training = self.model.training
        self.model.eval()
        packed = pack([s.student_prompt for s in samples], samples, device=self.device)
        ours = self.hidden(packed).to(self.head_VD.dtype) @ self.head_VD.T
        theirs = torch.cat(
            [self.model(input_ids=torch.tensor([ids], device=self.device)).logits[0] for ids in (first, second)]
        )
        self.model.train(was_training)
        return float((ours - theirs).float().abs().max() / theirs.float().abs().max().clamp(min=1e-6))
