"""Attention of packed rows: every sequence reads the cached prefix that all share, and itself, and nothing else.

A block mask says the same, but a kernel that is handed a mask multiplies out every pair of tokens of the row. Here each
sequence is one causal call, so that a row of n equal sequences costs an n-th of that. A shared prefix is one more call
for the whole row; its part and the sequence's own are put together by their log-sum-exps, which is exact.

It is a transformers attention implementation by the name of `IMPLEMENTATION`. A model that has it behaves as with
`sdpa` until a forward is given a `layout`; gradient checkpointing carries the layout into its second forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "engrain_packed"


@dataclass(frozen=True)
class Layout:
    """How one row divides: `prefix` cached positions for all, then sequences of these lengths, end to end."""

    lengths: tuple[int, ...]
    prefix: int = 0


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """A transformers attention function: query 1 x heads x T x d, key and value 1 x KV heads x (prefix + T) x d.

    Without a layout it is transformers' own `sdpa`, mask included; with one, the mask is not looked at.
    """
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast rotary embeddings leave them in float32
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scale, start = kwargs.get("scaling"), layout.prefix
    lengths = list(layout.lengths)
    parts = [torch.split(part, lengths, dim=2) for part in (query, key[:, :, start:], value[:, :, start:])]
    own = list(zip(*parts, strict=True))
    if not start:
        outputs = [scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale) for q, k, v in own]
    elif query.device.type == "cpu" and not (torch.is_grad_enabled() and query.requires_grad):
        outputs = [_cascade(query, key[:, :, :start], value[:, :, :start], own, scale)]
    else:
        outputs = [
            scaled_dot_product_attention(
                q,
                torch.cat([key[:, :, :start], k], dim=2),
                torch.cat([value[:, :, :start], v], dim=2),
                attn_mask=causal_lower_right(q.shape[2], start + q.shape[2]),
                scale=scale,
            )
            for q, k, v in own
        ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _cascade(
    query: Tensor, key: Tensor, value: Tensor, own: list[tuple[Tensor, Tensor, Tensor]], scale: float | None
) -> Tensor:
    """The whole row over the prefix, each sequence over itself, joined by their shares of the softmax's sum."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    shared, shared_lse = attend(query, key, value, 0.0, False, attn_mask=None, scale=scale)
    each = [attend(q, k, v, 0.0, True, attn_mask=None, scale=scale) for q, k, v in own]
    alone = torch.cat([output for output, _ in each], dim=2)
    alone_lse = torch.cat([lse for _, lse in each], dim=2)
    share = torch.sigmoid(shared_lse - alone_lse).unsqueeze(-1)  # e^a / (e^a + e^b)
    return torch.lerp(alone.float(), shared.float(), share).to(query.dtype)


AttentionInterface.register(IMPLEMENTATION, packed_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
