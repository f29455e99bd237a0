"""Exact divergences between a student's and a teacher's next-token distributions.

Each divergence is a pure function of two log-probability tensors and returns, besides the divergence d of every
position, g = p * dd/dp: its derivative in the student's probabilities p, times p. That is all a gradient needs, since
for logits z with p = softmax(z)

    dd/dz_v = g_v - p_v sum_u g_u

for dd/dp known up to a constant a position. (The product g stays finite where dd/dp does not: forward KL's is -t,
however little the student gives to a token.) `chunked_divergence` uses it to go from hidden states to loss and
gradient in one pass over the vocabulary, a chunk of positions at a time, so that positions x vocabulary is never
held for a whole batch; `chunked_cross_entropy` does the same for sampled tokens in place of a teacher.

Notation: P positions, V vocabulary, D hidden size; s student, t teacher. Everything is in nats and float32 or wider.

Sources: OPCD, arXiv 2602.12275 (reverse KL); GKD, arXiv 2306.13649 (generalised JSD); DistiLLM, arXiv 2402.03898
(skew KL). The paper's own truncated sum over the student's 256 most likely tokens is not a divergence (it can be
negative); `topk` adds the missing tail as one bucket, which makes it a lower bound of the exact KL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from distill.errors import DistillConfigError
from distill.registered import own_objective

#: (student log-probs PV, teacher log-probs PV) -> (divergence P, weighted derivative g PV)
Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def reverse_kl(logp_s_PV: Tensor, logp_t_PV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(s || t) = sum_v s (log s - log t): the paper's objective (eq. 3). Mode-seeking; blind where s has no mass."""
    g_PV = logp_s_PV.exp() * (logp_s_PV - logp_t_PV)
    return g_PV.sum(-1), g_PV


def forward_kl(logp_s_PV: Tensor, logp_t_PV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(t || s) = sum_v t (log t - log s). Mass-covering: pulls s up wherever t has mass."""
    t_PV = logp_t_PV.exp()
    return (t_PV * (logp_t_PV - logp_s_PV)).sum(-1), -t_PV


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


@dataclass(frozen=True)
class Overlap:
    """What the two distributions look like at each position, read off in the same pass (no gradient; shape P)."""

    student_entropy_P: Tensor  # nats
    teacher_entropy_P: Tensor  # nats
    teacher_mass_P: Tensor  # teacher's probability of the student's most likely token
    student_mass_P: Tensor  # student's probability of the teacher's most likely token
    shared_mass_P: Tensor  # sum_v min(s, t): 1 where they are equal, 0 where they are disjoint


#: For each position the ids that could be sampled there, None for all.
Restrictions = Sequence[Sequence[int] | None]

_FORBIDDEN = -1e4  # the logit of an id that was not allowed


#: (student log-probs RV of some rows, their probabilities, the teacher's logits RV or None, their place among the
#: positions) -> (d R, g RV, the fields of Overlap, each R)
_Score = Callable[[Tensor, Tensor, Tensor | None, slice], tuple[Tensor, Tensor, tuple[Tensor, ...]]]


class _Chunked(torch.autograd.Function):
    """Hidden states and output heads in, scores out; the gradient of the hidden states is made on the way.

    A chunk of positions at a time is multiplied with the heads (a matrix product wants many rows). What follows goes
    through it a few rows at a time, such that they stay in the processor's cache.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_PD: Tensor,
        weight_VD: Tensor,
        hidden_t_PD: Tensor | None,
        weight_t_VD: Tensor | None,
        score: _Score,
        chunk: int,
        allowed: Restrictions,
    ) -> tuple[Tensor, Tensor]:
        size = hidden_PD.shape[0]
        d_P = hidden_PD.new_empty(size, dtype=torch.float32)
        stats_KP = hidden_PD.new_empty(len(fields(Overlap)), size, dtype=torch.float32)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_PD = torch.empty_like(hidden_PD) if needs_hidden else None
        chunks = _chunks(hidden_PD, weight_VD, hidden_t_PD, weight_t_VD, score, chunk, allowed)
        for part, logits_CV, rows in chunks:
            for place, here, grad_RV, d_R, stats in rows:
                d_P[place] = d_R
                for row, values in enumerate(stats):
                    stats_KP[row, place] = values
                if grad_PD is not None:
                    logits_CV[here] = grad_RV  # the rows' logits are not needed any more
            if grad_PD is not None:
                grad_PD[part] = logits_CV @ weight_VD
        ctx.save_for_backward(grad_PD, *((hidden_PD, weight_VD, hidden_t_PD, weight_t_VD) if needs_weight else ()))
        ctx.score, ctx.chunk, ctx.allowed = score if needs_weight else None, chunk, allowed
        ctx.mark_non_differentiable(stats_KP)
        return d_P, stats_KP

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        upstream_P = grads[0]
        grad_PD, *rest = ctx.saved_tensors
        grad_hidden = None if grad_PD is None else grad_PD * upstream_P[:, None].to(grad_PD.dtype)
        grad_weight = None
        if rest:  # a trained output head: the upstream weights are only known now, so the chunks are made again
            hidden_PD, weight_VD, hidden_t_PD, weight_t_VD = rest
            grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
            again = _chunks(hidden_PD, weight_VD, hidden_t_PD, weight_t_VD, ctx.score, ctx.chunk, ctx.allowed)
            for part, logits_CV, rows in again:
                for place, here, grad_RV, _, _ in rows:
                    logits_CV[here] = grad_RV * upstream_P[place, None]
                grad_weight += logits_CV.T @ hidden_PD[part].to(weight_VD.dtype)
            grad_weight = grad_weight.to(weight_VD.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


#: A row's place among the positions and within its chunk, its gradient in the logits, its d and its Overlap.
_Row = tuple[slice, slice, Tensor, Tensor, tuple[Tensor, ...]]


def _chunks(
    hidden_PD: Tensor,
    weight_VD: Tensor,
    hidden_t_PD: Tensor | None,
    weight_t_VD: Tensor | None,
    score: _Score,
    chunk: int,
    allowed: Restrictions,
) -> Iterator[tuple[slice, Tensor, Iterator[_Row]]]:
    """Each chunk's place, the student's logits there, and its rows scored a few at a time. Buffers are used again."""
    buffers = [w.new_empty(min(chunk, len(hidden_PD)), len(w)) for w in (weight_VD, weight_t_VD) if w is not None]
    for start in range(0, len(hidden_PD), chunk):
        part = slice(start, min(start + chunk, len(hidden_PD)))
        logits_CV = _logits(hidden_PD[part], weight_VD, buffers[0])
        logits_t_CV = None
        if hidden_t_PD is not None and weight_t_VD is not None:
            logits_t_CV = _logits(hidden_t_PD[part], weight_t_VD, buffers[1])
        if allowed:
            restrict(logits_CV, allowed[part])
            if logits_t_CV is not None:
                restrict(logits_t_CV, allowed[part])
        yield part, logits_CV, _rows(logits_CV, logits_t_CV, score, start)


def _rows(logits_CV: Tensor, logits_t_CV: Tensor | None, score: _Score, start: int) -> Iterator[_Row]:
    step = _cached_rows(logits_CV)
    for first in range(0, len(logits_CV), step):
        here = slice(first, min(first + step, len(logits_CV)))
        place = slice(start + here.start, start + here.stop)
        logp_RV = _log_probs(logits_CV[here])
        s_RV = logp_RV.exp()
        d_R, g_RV, stats = score(logp_RV, s_RV, None if logits_t_CV is None else logits_t_CV[here], place)
        # g - p sum(g), the gradient in the student's logits
        yield place, here, torch.addcmul(g_RV, s_RV, g_RV.sum(-1, keepdim=True), value=-1), d_R, stats


def _logits(hidden_CD: Tensor, weight_VD: Tensor, buffer_CV: Tensor) -> Tensor:
    return torch.mm(hidden_CD.to(weight_VD.dtype), weight_VD.T, out=buffer_CV[: len(hidden_CD)])


def restrict(logits_CV: Tensor, allowed: Restrictions) -> None:
    """Take all probability from the ids that were not allowed, in place; rows with None keep theirs.

    Their logits become so low that their probability is 0 in float32, and stay finite, so that 0 * log 0 is 0.
    """
    for row_V, ids in zip(logits_CV, allowed, strict=True):
        if ids is not None:
            index = torch.tensor(ids, device=row_V.device)
            kept = row_V[index]
            row_V.fill_(_FORBIDDEN)
            row_V[index] = kept


def _log_probs(logits_RV: Tensor) -> Tensor:
    """In float32 (float64 stays)."""
    return torch.log_softmax(logits_RV, dim=-1, dtype=torch.promote_types(logits_RV.dtype, torch.float32))


def _overlap(logp_s_RV: Tensor, s_RV: Tensor, logp_t_RV: Tensor) -> tuple[Tensor, ...]:
    """The fields of Overlap for some rows."""
    t_RV = logp_t_RV.exp()
    return (
        -torch.linalg.vecdot(s_RV, logp_s_RV),
        -torch.linalg.vecdot(t_RV, logp_t_RV),
        t_RV.gather(-1, logp_s_RV.argmax(-1, keepdim=True)).squeeze(-1),
        s_RV.gather(-1, logp_t_RV.argmax(-1, keepdim=True)).squeeze(-1),
        torch.minimum(s_RV, t_RV).sum(-1),
    )


def chunk_size(weight_VD: Tensor, budget_bytes: int = 64 * 2**20) -> int:
    """Positions a chunk so that student's and teacher's logits fit the budget."""
    return max(1, budget_bytes // (2 * weight_VD.element_size() * weight_VD.shape[0]))


def _cached_rows(logits_CV: Tensor, cache_bytes: int = 2 * 2**20) -> int:
    """Rows whose float32 values fit a processor's cache; on an accelerator all of them, for few large kernels."""
    rows, vocabulary = logits_CV.shape
    return max(1, cache_bytes // (4 * vocabulary)) if logits_CV.device.type == "cpu" else rows


def chunked_divergence(
    hidden_s_PD: Tensor,
    weight_s_VD: Tensor,
    hidden_t_PD: Tensor,
    weight_t_VD: Tensor,
    divergence: Divergence,
    *,
    chunk: int | None = None,
    allowed: Restrictions = (),
) -> tuple[Tensor, Overlap]:
    """Divergence of every position, exact over the whole vocabulary, without holding P x V.

    Args:
        hidden_s_PD: the student's last hidden states at the positions that predict sampled tokens.
        weight_s_VD: the student's output head; it gets a gradient if it asks for one.
        hidden_t_PD: the teacher's hidden states at the same positions; never a gradient. Its D may differ.
        weight_t_VD: the teacher's output head over the same vocabulary.
        divergence: one of this module's.
        chunk: positions at a time; by default those whose logits fit 64 MiB.
        allowed: the ids among which both distribute their probability, one entry a position; () restricts none.

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
    hidden_t_PD, weight_t_VD = hidden_t_PD.detach(), weight_t_VD.detach()

    def score(
        logp_s_RV: Tensor, s_RV: Tensor, logits_t_RV: Tensor | None, place: slice
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        assert logits_t_RV is not None  # noqa: S101 - there is a teacher
        logp_t_RV = _log_probs(logits_t_RV)
        return *divergence(logp_s_RV, logp_t_RV), _overlap(logp_s_RV, s_RV, logp_t_RV)

    return _run(hidden_s_PD, weight_s_VD, hidden_t_PD, weight_t_VD, score, chunk, allowed)


def chunked_cross_entropy(
    hidden_PD: Tensor,
    weight_VD: Tensor,
    target_P: Tensor,
    *,
    chunk: int | None = None,
    allowed: Restrictions = (),
) -> tuple[Tensor, Overlap]:
    """-log s(target) of every position, exact over the whole vocabulary, without holding P x V.

    It is forward KL from a teacher that puts all its mass on the target, and `Overlap` reads that teacher: its entropy
    is 0 and the student's mass on its most likely token is the target's probability.

    Args:
        hidden_PD: the student's last hidden states at the positions that predict the targets.
        weight_VD: the student's output head; it gets a gradient if it asks for one.
        target_P: token ids.
        chunk: positions at a time; by default those whose logits fit 64 MiB.
        allowed: the ids among which the student distributes its probability, one entry a position; () restricts none.

    Returns:
        d_P in nats, differentiable, and the detached `Overlap` of the same positions.

    Raises:
        ValueError: the shapes do not belong together.
    """
    if hidden_PD.shape[0] != target_P.shape[0]:
        raise ValueError(f"{hidden_PD.shape[0]} positions and {target_P.shape[0]} targets")

    def score(
        logp_RV: Tensor, s_RV: Tensor, _: Tensor | None, place: slice
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        index_R1 = target_P[place, None]
        d_R = -logp_RV.gather(-1, index_R1).squeeze(-1)
        g_RV = torch.zeros_like(logp_RV).scatter_(-1, index_R1, -1.0)
        hit_R = (logp_RV.argmax(-1) == target_P[place]).to(d_R.dtype)
        mass_R = (-d_R).exp()
        return d_R, g_RV, (-torch.linalg.vecdot(s_RV, logp_RV), torch.zeros_like(d_R), hit_R, mass_R, mass_R)

    return _run(hidden_PD, weight_VD, None, None, score, chunk, allowed)


def _run(
    hidden_PD: Tensor,
    weight_VD: Tensor,
    hidden_t_PD: Tensor | None,
    weight_t_VD: Tensor | None,
    score: _Score,
    chunk: int | None,
    allowed: Restrictions,
) -> tuple[Tensor, Overlap]:
    if allowed and len(allowed) != len(hidden_PD):
        raise ValueError(f"{len(hidden_PD)} positions and {len(allowed)} restrictions")
    kind = hidden_PD.device.type
    if torch.is_autocast_enabled(kind):  # the products below write into buffers, which autocast does not look at
        lower = torch.get_autocast_dtype(kind)
        weight_VD, weight_t_VD = weight_VD.to(lower), None if weight_t_VD is None else weight_t_VD.to(lower)
    d_P, stats_KP = _Chunked.apply(  # type: ignore[no-untyped-call]
        hidden_PD, weight_VD, hidden_t_PD, weight_t_VD, score, chunk or chunk_size(weight_VD), allowed
    )
    return d_P, Overlap(*stats_KP.unbind(0))


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
