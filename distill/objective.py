"""Exact divergences between a student's and a teacher's next-token distributions.

Each divergence is a pure function of two log-probability tensors and returns, besides the divergence d of every
position, g = p * dd/dp: its derivative in the student's probabilities p, times p. That is all a gradient needs, since
for logits z with p = softmax(z)

    dd/dz_v = g_v - p_v sum_u g_u

for dd/dp known up to a constant a position. (The product g stays finite where dd/dp does not: forward KL's is -t,
however little the student gives to a token.) `distill.chunked` uses it to go from hidden states to loss and gradient.

Notation: P positions, V vocabulary; s student, t teacher. Everything is in nats and float32 or wider.

Sources: OPCD, arXiv 2602.12275 (reverse KL); GKD, arXiv 2306.13649 (generalised JSD); DistiLLM, arXiv 2402.03898
(skew KL). The paper's own truncated sum over the student's 256 most likely tokens is not a divergence (it can be
negative); `topk` adds the missing tail as one bucket, which makes it a lower bound of the exact KL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distill.errors import DistillConfigError
from distill.registered import own_objective

#: (student log-probs PV, teacher log-probs PV) -> (divergence P, weighted derivative g PV)
Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def reverse_kl(logp_s_PV: Tensor, logp_t_PV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(s || t) = sum_v s (log s - log t): the paper's objective (eq. 3). Mode-seeking; blind where s has no mass."""
    g_PV = logp_s_PV.exp().mul_(logp_s_PV - logp_t_PV)
    return g_PV.sum(-1), g_PV


def forward_kl(logp_s_PV: Tensor, logp_t_PV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(t || s) = sum_v t (log t - log s). Mass-covering: pulls s up wherever t has mass."""
    t_PV = logp_t_PV.exp()
    return (logp_t_PV - logp_s_PV).mul_(t_PV).sum(-1), t_PV.neg_()


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
        g_PV = (1 - beta) * logp_s_PV.exp() * (logp_s_PV - logm_PV)
        kl_t_P = (logp_t_PV.exp() * (logp_t_PV - logm_PV)).sum(-1)
        return beta * kl_t_P + g_PV.sum(-1), g_PV

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
        log_ratio_PV = logp_t_PV - logm_PV  # at most -log(alpha)
        d_P = (logp_t_PV.exp() * log_ratio_PV).sum(-1)
        return d_P, (alpha - 1) * (logp_s_PV + log_ratio_PV).exp()

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
            return d_P, torch.zeros_like(logp_s_PV).scatter(-1, index_PK, top_s_PK.exp() * (top_s_PK - top_t_PK + 1))
        tiny = torch.finfo(logp_s_PV.dtype).tiny
        tail_s_P = (-torch.expm1(top_s_PK.logsumexp(-1).clamp(max=0))).clamp(min=tiny)
        tail_t_P = (-torch.expm1(top_t_PK.logsumexp(-1).clamp(max=0))).clamp(min=tiny)
        gap_P = tail_s_P.log() - tail_t_P.log()
        f_PV = gap_P[:, None].expand_as(logp_s_PV).scatter(-1, index_PK, top_s_PK - top_t_PK)
        return d_P + tail_s_P * gap_P, logp_s_PV.exp() * f_PV

    return divergence


def divergence_named(name: str, *, beta: float = 0.5, alpha: float = 0.1, k: int = 256) -> Divergence:
    """The divergence a configuration names: one of these, or a registered one.

    Raises:
        DistillConfigError: no divergence has that name, or its parameter is out of range.
        BadPluginError: a registered one does not import.
    """
    known: dict[str, Callable[[], Divergence]] = {
        "reverse_kl": lambda: reverse_kl,
        "forward_kl": lambda: forward_kl,
        "jsd": lambda: jsd(beta),
        "skew_kl": lambda: skew_kl(alpha),
        "topk": lambda: topk(k),
    }
    return known[name]() if name in known else own_objective(name)


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
