"""Choosing the next token of every row from its logits: pure tensor functions.

Notation: B rows, V vocabulary. Every row has its own parameters and its own random number, so what one row gets
does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from agent.episode import SamplingParams

_BLOCK = 128  # first level of the two-level search for the sampled token
_ROWS = 8  # rows turned to float32 at a time: enough to fill the cores, few enough to stay in their caches
_FIRST_CANDIDATES = 1024  # top_p rarely needs more, and a full sort of a 150k vocabulary is slow


def pick_among(logits_V: Tensor, allowed: Sequence[int], params: SamplingParams, uniform: float) -> tuple[int, float]:
    """Next id of one row among the allowed ones, and its natural log-probability among them, untempered.

    `uniform` in [0, 1) decides where the temperature is above 0. Logits that are not numbers give NaN.
    """
    logits_A = logits_V[torch.tensor(allowed, device=logits_V.device)].float()
    if params.temperature > 0:
        weights_A = ((logits_A - logits_A.max()) / params.temperature).exp()
        weights_A = keep_top(weights_A, params.top_k, params.top_p)
        chosen = int(draw(weights_A.unsqueeze(0), torch.tensor([uniform], device=logits_V.device)))
    else:
        chosen = int(logits_A.argmax())
    return allowed[chosen], float(logits_A.log_softmax(-1)[chosen])


def pick(logits_BV: Tensor, sampling: Sequence[SamplingParams], uniforms_B: Tensor) -> tuple[list[int], list[float]]:
    """Next id of every row and its natural log-probability under the untempered, unfiltered distribution.

    `logits_BV` may be of any float type; `uniforms_B` (float64, in [0, 1)) decides the rows with temperature > 0.
    The log-probability of a row with non-finite logits is NaN.
    """
    ids: list[int] = []
    logprobs: list[float] = []
    # One buffer for all: fresh memory for every few rows costs more than the arithmetic.
    scratch_KV = torch.empty(_ROWS, logits_BV.shape[1], dtype=torch.float32, device=logits_BV.device)
    for start in range(0, logits_BV.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        ids_b, logprobs_b = _pick(logits_BV[rows], sampling[rows], uniforms_B[rows], scratch_KV)
        ids += ids_b.tolist()
        logprobs += logprobs_b.tolist()
    return ids, logprobs


def _pick(
    logits_BV: Tensor, sampling: Sequence[SamplingParams], uniforms_B: Tensor, scratch_KV: Tensor
) -> tuple[Tensor, Tensor]:
    drawn = [row for row, s in enumerate(sampling) if s.temperature > 0]
    weights_BV = scratch_KV[: len(sampling)].copy_(logits_BV)
    top_B1 = weights_BV.amax(dim=-1, keepdim=True)
    if len(drawn) < len(sampling):
        ids_B1 = weights_BV.argmax(dim=-1, keepdim=True)
    else:
        ids_B1 = torch.empty(len(drawn), 1, dtype=torch.long, device=logits_BV.device)
    weights_BV.sub_(top_B1).exp_()
    log_normalizer_B1 = top_B1 + weights_BV.sum(dim=-1, keepdim=True).log()
    if drawn:
        if len(drawn) < len(sampling):
            weights_BV = weights_BV[drawn]
        for i, row in enumerate(drawn):
            params = sampling[row]
            if params.temperature != 1.0:
                weights_BV[i] = logits_BV[row].float().sub(top_B1[row]).div_(params.temperature).exp_()
            if params.top_k or params.top_p < 1:
                weights_BV[i] = keep_top(weights_BV[i], params.top_k, params.top_p)
        ids_B1[drawn] = draw(weights_BV, uniforms_B[drawn].to(logits_BV.device)).unsqueeze(1)
    logprobs_B1 = logits_BV.gather(1, ids_B1).float() - log_normalizer_B1
    return ids_B1.squeeze(1), logprobs_B1.squeeze(1)


def draw(weights_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """Ids `[B]` drawn in proportion to non-negative weights, by inverting the cumulative sum at `uniforms_B`.

    Two levels: block sums find the block, a sum inside it the token, so that the whole vocabulary is only read
    once. A token of weight 0 is never drawn.
    """
    rows = torch.arange(weights_BV.shape[0], device=weights_BV.device)
    vocabulary = weights_BV.shape[1]
    if vocabulary % _BLOCK:
        weights_BV = torch.nn.functional.pad(weights_BV, (0, _BLOCK - vocabulary % _BLOCK))
    blocks_BNK = weights_BV.view(len(rows), -1, _BLOCK)
    sums_BN = blocks_BNK.sum(dim=-1).to(torch.float64)
    uniforms_B1 = uniforms_B.to(torch.float64).clamp(0, 1 - 1e-12).unsqueeze(1)

    ends_BN = sums_BN.cumsum(dim=-1)
    target_B1 = uniforms_B1 * ends_BN[:, -1:]
    block_B1 = torch.searchsorted(ends_BN, target_B1, right=True).clamp(max=sums_BN.shape[1] - 1)
    sum_B1 = sums_BN.gather(1, block_B1)
    within_B1 = (target_B1 - (ends_BN.gather(1, block_B1) - sum_B1)) / sum_B1

    inner_BK = blocks_BNK[rows, block_B1.squeeze(1)].to(torch.float64).cumsum(dim=-1)
    inner_target_B1 = within_B1.clamp(0, 1 - 1e-12) * inner_BK[:, -1:]
    offset_B1 = torch.searchsorted(inner_BK, inner_target_B1, right=True).clamp(max=_BLOCK - 1)
    return (block_B1 * _BLOCK + offset_B1).squeeze(1).clamp(max=vocabulary - 1)


def keep_top(weights_V: Tensor, top_k: int, top_p: float) -> Tensor:
    """The weights with all but the `top_k` largest (0: all), then all beyond mass `top_p`, set to 0.

    At least one token stays. Tokens that tie with the last one kept stay too.
    """
    vocabulary = weights_V.shape[0]
    if 0 < top_k < vocabulary:
        weights_V = weights_V.where(weights_V >= weights_V.topk(top_k).values[-1], 0.0)
    if top_p < 1:
        wanted = top_p * weights_V.sum(dtype=torch.float64)
        largest = weights_V.topk(min(_FIRST_CANDIDATES, vocabulary)).values
        if largest.sum(dtype=torch.float64) < wanted:
            largest = weights_V.sort(descending=True).values
        mass = largest.to(torch.float64).cumsum(0)
        last = int(torch.searchsorted(mass, wanted).clamp(max=len(mass) - 1))
        weights_V = weights_V.where(weights_V >= largest[last], 0.0)
    return weights_V
