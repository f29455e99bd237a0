"""From hidden states to loss and gradient in one pass over the vocabulary, a chunk of positions at a time.

`chunked_divergence` scores a student against a teacher, `chunked_cross_entropy` against sampled tokens. Positions x
vocabulary is never held for a whole batch: a chunk of positions is multiplied with the output heads, its rows go
through `distill.objective` a few at a time, and what stays is one gradient of the hidden states.

Notation: P positions, C of a chunk, R of a block within it, V vocabulary, D hidden size; s student, t teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from distill.objective import Divergence


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


@dataclass(frozen=True)
class _Block:
    """A few rows of a chunk. Its tensors are buffers that the next block uses again."""

    place: slice  # among the positions
    here: slice  # within the chunk
    logp_s_RV: Tensor
    s_RV: Tensor
    logits_t_RV: Tensor | None
    spare: tuple[Tensor, Tensor]  # RV each, for what the score needs


#: A block -> (d R, g RV, the fields of Overlap, each R)
_Score = Callable[[_Block], tuple[Tensor, Tensor, tuple[Tensor, ...]]]


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
        chunks = _chunks(hidden_PD, weight_VD, hidden_t_PD, weight_t_VD, chunk, allowed)
        for part, logits_CV, blocks in chunks:
            for block in blocks:
                d_P[block.place], g_RV, stats = score(block)
                for row, values in enumerate(stats):
                    stats_KP[row, block.place] = values
                if grad_PD is not None:
                    logits_CV[block.here] = _in_logits(g_RV, block)  # the rows' logits are not needed any more
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
            again = _chunks(hidden_PD, weight_VD, hidden_t_PD, weight_t_VD, ctx.chunk, ctx.allowed)
            for part, logits_CV, blocks in again:
                for block in blocks:
                    grad_RV = _in_logits(ctx.score(block)[1], block)
                    logits_CV[block.here] = grad_RV.mul_(upstream_P[block.place, None])
                grad_weight += logits_CV.T @ hidden_PD[part].to(weight_VD.dtype)
            grad_weight = grad_weight.to(weight_VD.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


def _chunks(
    hidden_PD: Tensor,
    weight_VD: Tensor,
    hidden_t_PD: Tensor | None,
    weight_t_VD: Tensor | None,
    chunk: int,
    allowed: Restrictions,
) -> Iterator[tuple[slice, Tensor, Iterator[_Block]]]:
    """Each chunk's place, the student's logits there, and its rows a few at a time.

    Buffers are used again: memory of this size that is asked for at every turn may come from the system each time,
    which takes longer than the arithmetic.
    """
    buffers = [w.new_empty(min(chunk, len(hidden_PD)), len(w)) for w in (weight_VD, weight_t_VD) if w is not None]
    rows = min(len(buffers[0]), _cached_rows(weight_VD))
    work = weight_VD.new_empty(4, rows, len(weight_VD), dtype=_wide(weight_VD.dtype))
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
        yield part, logits_CV, _blocks(logits_CV, logits_t_CV, start, work)


def _blocks(logits_CV: Tensor, logits_t_CV: Tensor | None, start: int, work_4RV: Tensor) -> Iterator[_Block]:
    for first in range(0, len(logits_CV), work_4RV.shape[1]):
        here = slice(first, min(first + work_4RV.shape[1], len(logits_CV)))
        logp_s_RV, s_RV, *spare = work_4RV[:, : here.stop - here.start]
        torch.exp(_log_probs(logits_CV[here], logp_s_RV, s_RV), out=s_RV)
        yield _Block(
            place=slice(start + here.start, start + here.stop),
            here=here,
            logp_s_RV=logp_s_RV,
            s_RV=s_RV,
            logits_t_RV=None if logits_t_CV is None else logits_t_CV[here],
            spare=(spare[0], spare[1]),
        )


def _in_logits(g_RV: Tensor, block: _Block) -> Tensor:
    """g - s sum(g), the gradient in the student's logits; it takes the place of s."""
    return torch.addcmul(g_RV, block.s_RV, g_RV.sum(-1, keepdim=True), value=-1, out=block.s_RV)


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


def _wide(dtype: torch.dtype) -> torch.dtype:
    """float32 (float64 stays)."""
    return torch.promote_types(dtype, torch.float32)


def _log_probs(logits_RV: Tensor, buffer_RV: Tensor, wide_RV: Tensor) -> Tensor:
    """Into the first buffer; the second holds the logits in its wider type."""
    return torch.log_softmax(wide_RV.copy_(logits_RV), dim=-1, out=buffer_RV)


def _overlap(logp_s_RV: Tensor, s_RV: Tensor, logp_t_RV: Tensor, buffer_RV: Tensor) -> tuple[Tensor, ...]:
    """The fields of Overlap for some rows."""
    t_RV = torch.exp(logp_t_RV, out=buffer_RV)
    return (
        -torch.linalg.vecdot(s_RV, logp_s_RV),
        -torch.linalg.vecdot(t_RV, logp_t_RV),
        t_RV.gather(-1, logp_s_RV.argmax(-1, keepdim=True)).squeeze(-1),
        s_RV.gather(-1, logp_t_RV.argmax(-1, keepdim=True)).squeeze(-1),
        torch.minimum(s_RV, t_RV, out=t_RV).sum(-1),
    )


def chunk_size(weight_VD: Tensor, budget_bytes: int = 64 * 2**20) -> int:
    """Positions a chunk so that student's and teacher's logits fit the budget."""
    return max(1, budget_bytes // (2 * weight_VD.element_size() * weight_VD.shape[0]))


def _cached_rows(weight_VD: Tensor, cache_bytes: int = 2 * 2**20, budget_bytes: int = 64 * 2**20) -> int:
    """Rows whose float32 values fit a processor's cache; on an accelerator many more, for few large kernels."""
    return max(1, (cache_bytes if weight_VD.device.type == "cpu" else budget_bytes) // (4 * len(weight_VD)))


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

    def score(block: _Block) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        assert block.logits_t_RV is not None  # noqa: S101 - there is a teacher
        logp_t_RV = _log_probs(block.logits_t_RV, *block.spare)
        d_R, g_RV = divergence(block.logp_s_RV, logp_t_RV)
        return d_R, g_RV, _overlap(block.logp_s_RV, block.s_RV, logp_t_RV, block.spare[1])

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

    def score(block: _Block) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        target_R, logp_RV = target_P[block.place], block.logp_s_RV
        d_R = -logp_RV.gather(-1, target_R[:, None]).squeeze(-1)
        g_RV = block.spare[0].zero_().scatter_(-1, target_R[:, None], -1.0)
        hit_R = (logp_RV.argmax(-1) == target_R).to(d_R.dtype)
        mass_R = (-d_R).exp()
        return d_R, g_RV, (-torch.linalg.vecdot(block.s_RV, logp_RV), torch.zeros_like(d_R), hit_R, mass_R, mass_R)

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
