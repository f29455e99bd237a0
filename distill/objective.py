"""Exact divergences between a student's and a teacher's next-token distributions.

Each divergence is a pure function of two log-probability tensors and returns, besides the divergence d of every
position, its derivative f with respect to the student's probabilities. That is all a gradient needs, since for
logits z with p = softmax(z)

    dd/dz_v = p_v (f_v - sum_u p_u f_u)

for any f known up to a constant a position. `chunked_divergence` uses it to go from hidden states to loss and
gradient in one pass over the vocabulary, a chunk of positions at a time, so that positions x vocabulary is never
held for a whole batch.

Notation: P positions, V vocabulary, D hidden size; s student, t teacher. Everything is in nats and float32 or wider.

Sources: OPCD, arXiv 2602.12275 (reverse KL); GKD, arXiv 2306.13649 (generalised JSD); DistiLLM, arXiv 2402.03898
(skew KL). The paper's own truncated sum over the student's 256 most likely tokens is not a divergence (it can be
negative); `topk` adds the missing tail as one bucket, which makes it a lower bound of the exact KL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.errors import DistillConfigError

#: (student log-probs PV, teacher log-probs PV) -> (divergence P, derivative f PV)
Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def reverse_kl(logp_s_PV: Tensor, logp_t_PV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(s || t) = sum_v s (log s - log t): the paper's objective (eq. 3). Mode-seeking; blind where s has no mass."""
    f_PV = logp_s_PV - logp_t_PV
    return (logp_s_PV.exp() * f_PV).sum(-1), f_PV


def forward_kl(logp_s_PV: Tensor, logp_t_PV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(t || s) = sum_v t (log t - log s). Mass-covering: pulls s up wherever t has mass."""
    d_P = (logp_t_PV.exp() * (logp_t_PV - logp_s_PV)).sum(-1)
    return d_P, -(logp_t_PV - logp_s_PV).exp()


def jsd(beta: float = 0.5) -> Divergence:
    """Generalised Jensen-Shannon divergence with mixture m = beta t + (1 - beta) s (GKD eq. 2).

    d = beta KL(t || m) + (1 - beta) KL(s || m), bounded by the entropy of (beta, 1 - beta). At the ends of the
    range, where that expression vanishes, the usual convention holds: beta 0 is forward KL, beta 1 reverse KL.

    Raises:
        DistillConfigError: beta lies outside [0, 1].
    """
    if not 0.0 <= beta <= 1.0:
        raise DistillConfigError(f"jsd beta is {beta}; it must lie in [0, 1]")
    if beta == 0.0:
        return forward_kl
    if beta == 1.0:
        return reverse_kl

    def divergence(logp_s_PV: Tensor, logp_t_PV: Tensor) -> tuple[Tensor, Tensor]:
        logm_PV = torch.logaddexp(logp_t_PV + math.log(beta), logp_s_PV + math.log1p(-beta))
        f_PV = (1 - beta) * (logp_s_PV - logm_PV)
        kl_t_P = (logp_t_PV.exp() * (logp_t_PV - logm_PV)).sum(-1)
        return beta * kl_t_P + (logp_s_PV.exp() * f_PV).sum(-1), f_PV

    return divergence


def skew_kl(alpha: float = 0.1) -> Divergence:
    """KL(t || alpha t + (1 - alpha) s): forward KL whose gradient is bounded by the teacher's share (DistiLLM eq. 3).

    Raises:
        DistillConfigError: alpha lies outside [0, 1).
    """
    if not 0.0 <= alpha < 1.0:
        raise DistillConfigError(f"skew_kl alpha is {alpha}; it must lie in [0, 1)")
    if alpha == 0.0:
        return forward_kl

    def divergence(logp_s_PV: Tensor, logp_t_PV: Tensor) -> tuple[Tensor, Tensor]:
        logm_PV = torch.logaddexp(logp_t_PV + math.log(alpha), logp_s_PV + math.log1p(-alpha))
        d_P = (logp_t_PV.exp() * (logp_t_PV - logm_PV)).sum(-1)
        return d_P, -(1 - alpha) * (logp_t_PV - logm_PV).exp()

    return divergence


def topk(k: int, *, tail: bool = True) -> Divergence:
    """Reverse KL over the student's k most likely tokens, everything else gathered in one tail bucket.

    With the tail it is a true KL of coarsened distributions: never negative, never above the exact one. Without it
    (`tail=False`) it is the truncated sum of the paper's code, which is neither; kept for comparison only.

    Raises:
        DistillConfigError: k is not positive.
    """
    if k < 1:
        raise DistillConfigError(f"topk k is {k}; it must be at least 1")

    def divergence(logp_s_PV: Tensor, logp_t_PV: Tensor) -> tuple[Tensor, Tensor]:
        top_s_PK, index_PK = logp_s_PV.topk(min(k, logp_s_PV.shape[-1]), dim=-1)
        top_t_PK = logp_t_PV.gather(-1, index_PK)
        d_P = (top_s_PK.exp() * (top_s_PK - top_t_PK)).sum(-1)
        if not tail:
            f_PV = torch.full_like(logp_s_PV, 0.0).scatter(-1, index_PK, top_s_PK - top_t_PK + 1)
            return d_P, f_PV
        tiny = torch.finfo(logp_s_PV.dtype).tiny
        tail_s_P = (-torch.expm1(top_s_PK.logsumexp(-1).clamp(max=0))).clamp(min=tiny)
        tail_t_P = (-torch.expm1(top_t_PK.logsumexp(-1).clamp(max=0))).clamp(min=tiny)
        gap_P = tail_s_P.log() - tail_t_P.log()
        f_PV = gap_P[:, None].expand_as(logp_s_PV).scatter(-1, index_PK, top_s_PK - top_t_PK)
        return d_P + tail_s_P * gap_P, f_PV

    return divergence


def divergence_named(name: str, *, beta: float = 0.5, alpha: float = 0.1, k: int = 256) -> Divergence:
    """The divergence a configuration names.

    Raises:
        DistillConfigError: no divergence has that name, or its parameter is out of range.
    """
    known: dict[str, Callable[[], Divergence]] = {
        "reverse_kl": lambda: reverse_kl,
        "forward_kl": lambda: forward_kl,
        "jsd": lambda: jsd(beta),
        "skew_kl": lambda: skew_kl(alpha),
        "topk": lambda: topk(k),
    }
    if name not in known:
        raise DistillConfigError(f"unknown objective {name!r}; use one of {', '.join(known)}")
    return known[name]()


@dataclass(frozen=True)
class Overlap:
    """What the two distributions look like at each position, read off in the same pass (no gradient; shape P)."""

    student_entropy_P: Tensor  # nats
    teacher_entropy_P: Tensor  # nats
    teacher_mass_P: Tensor  # teacher's probability of the student's most likely token
    student_mass_P: Tensor  # student's probability of the teacher's most likely token


class _ChunkedDivergence(torch.autograd.Function):
    """Hidden states and output heads in, divergences out; the gradient of the hidden states is made on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_s_PD: Tensor,
        weight_s_VD: Tensor,
        hidden_t_PD: Tensor,
        weight_t_VD: Tensor,
        divergence: Divergence,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        size = hidden_s_PD.shape[0]
        d_P = hidden_s_PD.new_empty(size, dtype=torch.float32)
        stats_4P = hidden_s_PD.new_empty(4, size, dtype=torch.float32)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_PD = torch.empty_like(hidden_s_PD) if needs_hidden else None
        for start in range(0, size, chunk):
            part = slice(start, start + chunk)
            logp_s = _log_probs(hidden_s_PD[part], weight_s_VD)
            logp_t = _log_probs(hidden_t_PD[part], weight_t_VD)
            d, f = divergence(logp_s, logp_t)
            d_P[part] = d
            p_s = logp_s.exp()
            stats_4P[0, part] = -(p_s * logp_s).sum(-1)
            stats_4P[1, part] = -(logp_t.exp() * logp_t).sum(-1)
            stats_4P[2, part] = logp_t.gather(-1, logp_s.argmax(-1, keepdim=True)).squeeze(-1).exp()
            stats_4P[3, part] = logp_s.gather(-1, logp_t.argmax(-1, keepdim=True)).squeeze(-1).exp()
            if grad_PD is not None:
                grad_logits = _grad_logits(p_s, f)
                grad_PD[part] = grad_logits.to(weight_s_VD.dtype) @ weight_s_VD
        ctx.save_for_backward(grad_PD, *((hidden_s_PD, weight_s_VD, hidden_t_PD, weight_t_VD) if needs_weight else ()))
        ctx.divergence, ctx.chunk = divergence, chunk
        ctx.mark_non_differentiable(stats_4P)
        return d_P, stats_4P

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        upstream_P = grads[0]
        grad_PD, *rest = ctx.saved_tensors
        grad_hidden = None if grad_PD is None else grad_PD * upstream_P[:, None].to(grad_PD.dtype)
        grad_weight = None
        if rest:  # a trained output head: the upstream weights are only known now, so the chunks are made again
            hidden_s_PD, weight_s_VD, hidden_t_PD, weight_t_VD = rest
            grad_weight = torch.zeros_like(weight_s_VD, dtype=torch.float32)
            for start in range(0, hidden_s_PD.shape[0], ctx.chunk):
                part = slice(start, start + ctx.chunk)
                logp_s = _log_probs(hidden_s_PD[part], weight_s_VD)
                _, f = ctx.divergence(logp_s, _log_probs(hidden_t_PD[part], weight_t_VD))
                grad_logits = _grad_logits(logp_s.exp(), f) * upstream_P[part, None]
                dtype = weight_s_VD.dtype
                grad_weight += grad_logits.to(dtype).T @ hidden_s_PD[part].to(dtype)
            grad_weight = grad_weight.to(weight_s_VD.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _log_probs(hidden_CD: Tensor, weight_VD: Tensor) -> Tensor:
    """Log-probabilities of a chunk in float32 (float64 stays): the product in the head's dtype, the rest in full."""
    logits_CV = hidden_CD.to(weight_VD.dtype) @ weight_VD.T
    wide = torch.promote_types(logits_CV.dtype, torch.float32)
    return torch.log_softmax(logits_CV, dim=-1, dtype=wide)


def _grad_logits(p_s_CV: Tensor, f_CV: Tensor) -> Tensor:
    """p (f - E_p f), the gradient of a divergence in the student's logits."""
    return p_s_CV * (f_CV - (p_s_CV * f_CV).sum(-1, keepdim=True))


def chunk_size(vocabulary: int, budget_bytes: int = 256 * 2**20) -> int:
    """Positions a chunk so that about six float32 tensors of chunk x vocabulary fit the budget."""
    return max(1, budget_bytes // (6 * 4 * vocabulary))


def chunked_divergence(
    hidden_s_PD: Tensor,
    weight_s_VD: Tensor,
    hidden_t_PD: Tensor,
    weight_t_VD: Tensor,
    divergence: Divergence,
    *,
    chunk: int | None = None,
) -> tuple[Tensor, Overlap]:
    """Divergence of every position, exact over the whole vocabulary, without holding P x V.

    Args:
        hidden_s_PD: the student's last hidden states at the positions that predict sampled tokens.
        weight_s_VD: the student's output head; it gets a gradient if it asks for one.
        hidden_t_PD: the teacher's hidden states at the same positions; never a gradient. Its D may differ.
        weight_t_VD: the teacher's output head over the same vocabulary.
        divergence: one of this module's.
        chunk: positions at a time; by default what fits 256 MiB.

    Returns:
        d_P in nats, differentiable, and the detached `Overlap` of the same positions.

    Raises:
        ValueError: the shapes do not belong together.
    """
    if hidden_s_PD.shape[0] != hidden_t_PD.shape[0] or weight_s_VD.shape[0] != weight_t_VD.shape[0]:
        raise ValueError(
            f"student {tuple(hidden_s_PD.shape)} x {tuple(weight_s_VD.shape)} and teacher "
            f"{tuple(hidden_t_PD.shape)} x {tuple(weight_t_VD.shape)} differ in positions or vocabulary"
        )
    size = chunk or chunk_size(weight_s_VD.shape[0])
    d_P, stats_4P = _ChunkedDivergence.apply(  # type: ignore[no-untyped-call]
        hidden_s_PD, weight_s_VD, hidden_t_PD.detach(), weight_t_VD.detach(), divergence, size
    )
    return d_P, Overlap(*stats_4P.unbind(0))


def position_weights(
    lengths: Sequence[int], normalize: str, *, sequences: int, tokens: int, device: torch.device | None = None
) -> Tensor:
    """Weight w of every position, such that the loss of a whole batch is sum(w * d) over all its micro-batches.

    `sequence` is the paper's 1/|y| within each response, then the mean over responses; `token` weighs every token
    of the batch alike.

    Args:
        lengths: positions of each sequence of this micro-batch, in order.
        normalize: `sequence` or `token`.
        sequences: responses in the whole batch.
        tokens: positions in the whole batch.
        device: where the weights shall lie.

    Raises:
        DistillConfigError: another name.
    """
    sizes = torch.tensor(lengths, dtype=torch.float32, device=device)
    if normalize == "sequence":
        per_sequence = 1.0 / (sizes.clamp(min=1) * sequences)
    elif normalize == "token":
        per_sequence = torch.full_like(sizes, 1.0 / tokens)
    else:
        raise DistillConfigError(f"unknown normalize {normalize!r}; use sequence or token")
    return per_sequence.repeat_interleave(sizes.long())
