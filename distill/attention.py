"""Attention of packed rows: every sequence reads the cached prefix that all share, and itself, and nothing else.

A block mask says the same, but a kernel that is handed a mask multiplies out every pair of tokens of the row. Here each
sequence is one causal call, so that a row of n equal sequences costs an n-th of that. A shared prefix is one more call
for the whole row; its part and the sequence's own are put together by their log-sum-exps, which is exact.

A model's own attention dropout is not applied to packed rows: what is trained is the distribution that was sampled.

It is a transformers attention implementation by the name of `IMPLEMENTATION`. A model that has it behaves as with
`sdpa` until a forward is given a `layout`; gradient checkpointing carries the layout into its second forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "engrain_packed"


#: Keys and values of each layer, 1 x KV heads x positions x d.
States = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Layout:
    """How one row divides: sequences of these lengths, end to end, and what stands before every one of them.

    That is `states`, of all layers, or the first `grown` keys and values that the layer itself is handed.
    """

    lengths: tuple[int, ...]
    states: States = ()
    grown: int = 0


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
    """A transformers attention function: query 1 x heads x T x d, key and value 1 x KV heads x (grown + T) x d.

    Without a layout it is transformers' own `sdpa`, mask included; with one, the mask is not looked at.
    """
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast rotary embeddings leave them in float32
    before = (key[:, :, : layout.grown], value[:, :, : layout.grown])
    if layout.states:
        keys, values = layout.states[cast(int, module.layer_idx)]
        before = (keys.to(value.dtype), values.to(value.dtype))
    groups, scale = query.shape[1] // key.shape[1], kwargs.get("scaling")
    key, value = (repeat_kv(part[:, :, layout.grown :], groups) for part in (key, value))
    parts = [torch.split(part, list(layout.lengths), dim=2) for part in (query, key, value)]
    own = list(zip(*parts, strict=True))
    if not before[0].shape[2]:
        outputs = [scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale) for q, k, v in own]
    elif query.device.type == "cpu" and not (torch.is_grad_enabled() and query.requires_grad):
        outputs = [_cascade(query, *before, own, scale)]
    else:
        shared = [repeat_kv(part, groups) for part in before]
        outputs = [
            scaled_dot_product_attention(
                q,
                torch.cat([shared[0], k], dim=2),
                torch.cat([shared[1], v], dim=2),
                attn_mask=causal_lower_right(q.shape[2], shared[0].shape[2] + q.shape[2]),
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
    # heads that read the same keys lie side by side and go as one, so that the prefix need not be repeated for each
    grouped = query.reshape(1, key.shape[1], -1, query.shape[3])
    shared, shared_lse = attend(grouped, key, value, 0.0, False, attn_mask=None, scale=scale)
    shared, shared_lse = shared.reshape(query.shape), shared_lse.reshape(query.shape[:3])
    each = [attend(q, k, v, 0.0, True, attn_mask=None, scale=scale) for q, k, v in own]
    alone = torch.cat([output for output, _ in each], dim=2)
    alone_lse = torch.cat([lse for _, lse in each], dim=2)
    share = torch.sigmoid(shared_lse - alone_lse).unsqueeze(-1)  # e^a / (e^a + e^b)
    return torch.lerp(alone.float(), shared.float(), share).to(query.dtype)


AttentionInterface.register(IMPLEMENTATION, packed_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
