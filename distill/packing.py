"""Samples laid end to end in one row: no padding goes through the network.

A `Sample` is one trained episode: the same sampled continuation after two prompts, the student's (bare) and the
teacher's (knowledge first). `pack` lays several side by side; position ids restart at each, and `attention_mask`
keeps each to itself, except for a prefix that all of them share and that lies in a key-value cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from agent.constraint import Allowed
from agent.episode import Episode


@dataclass(frozen=True)
class Sample:
    """One sequence to train on, as ids only; nothing is ever tokenised again.

    `continuation` is everything after the first prompt, as it was sampled and answered; `mask` marks its sampled
    tokens. Each sample carries its own teacher prompt, so that a lost rollout shifts nothing.
    """

    episode_id: str
    student_prompt: tuple[int, ...]
    teacher_prompt: tuple[int, ...]
    continuation: tuple[int, ...]
    mask: tuple[bool, ...]
    #: For each sampled token the ids that were allowed there, None for all; () where no reply was restricted.
    allowed: tuple[Allowed | None, ...] = ()

    def __post_init__(self) -> None:
        if len(self.continuation) != len(self.mask):
            raise ValueError("continuation and mask differ in length")
        if not self.student_prompt or not self.teacher_prompt:
            raise ValueError("a prompt is empty")
        if self.allowed and len(self.allowed) != self.sampled:
            raise ValueError("allowed has not one entry for each sampled token")

    @classmethod
    def from_episode(
        cls, episode: Episode, teacher_prompt: Sequence[int], allowed: Sequence[Allowed | None] = ()
    ) -> Sample:
        """The episode's own ids, with the prompt the teacher shall read in place of the student's."""
        start = episode.prompt_length
        end = max(
            (i + 1 for i, sampled in enumerate(episode.loss_mask) if sampled), default=start
        )  # the rest is unread
        return cls(
            episode_id=episode.id,
            student_prompt=episode.token_ids[:start],
            teacher_prompt=tuple(teacher_prompt),
            continuation=episode.token_ids[start:end],
            mask=episode.loss_mask[start:end],
            allowed=tuple(allowed),
        )

    @property
    def sampled(self) -> int:
        """Number of tokens that the loss sees."""
        return sum(self.mask)

    @property
    def tokens(self) -> int:
        """Length of the longer of its two sequences."""
        return self.reads(0)

    def reads(self, cached: int) -> int:
        """Tokens the longer of the two forwards reads when the teacher prompt's first `cached` stand in a cache."""
        return max(len(self.student_prompt), len(self.teacher_prompt) - cached) + len(self.continuation)


@dataclass(frozen=True)
class Packed:
    """Sequences in one row of T tokens, and the R rows of its hidden states that predict sampled tokens."""

    input_ids_1T: Tensor
    position_ids_1T: Tensor
    segment_T: Tensor  # which sequence a token belongs to
    sequences: tuple[int, ...]  # tokens of each sequence, summing to T
    predict_R: Tensor  # indices into T
    target_R: Tensor  # the sampled ids at those positions
    lengths: list[int] = field(default_factory=list)  # sampled tokens of each sequence, summing to R
    allowed: list[Allowed | None] = field(default_factory=list)  # for each of the R; [] where none is restricted


def pack(
    prompts: Sequence[Sequence[int]],
    samples: Sequence[Sample],
    *,
    offset: int = 0,
    device: torch.device | None = None,
) -> Packed:
    """Lay prompt + continuation of every sample in one row.

    Args:
        prompts: the prompt to read before each continuation, without the first `offset` tokens that stand in a cache.
        samples: whose continuations and masks are used.
        offset: cached tokens before every sequence; position ids start there.
        device: where the tensors shall lie.

    Raises:
        ValueError: a prompt is empty, so that nothing would predict the first sampled token.
    """
    ids: list[int] = []
    positions: list[int] = []
    segments: list[int] = []
    sequences: list[int] = []
    predict: list[int] = []
    targets: list[int] = []
    lengths: list[int] = []
    allowed: list[Allowed | None] = []
    for index, (prompt, sample) in enumerate(zip(prompts, samples, strict=True)):
        if not prompt:
            raise ValueError("a packed prompt is empty: at least its last token must be read")
        start = len(ids)
        sequence = [*prompt, *sample.continuation]
        ids += sequence
        positions += range(offset, offset + len(sequence))
        segments += [index] * len(sequence)
        sequences.append(len(sequence))
        marked = [i for i, sampled in enumerate(sample.mask) if sampled]
        predict += [start + len(prompt) + i - 1 for i in marked]
        targets += [sample.continuation[i] for i in marked]
        lengths.append(len(marked))
        allowed += sample.allowed or [None] * len(marked)
    return Packed(
        input_ids_1T=torch.tensor([ids], dtype=torch.long, device=device),
        position_ids_1T=torch.tensor([positions], dtype=torch.long, device=device),
        segment_T=torch.tensor(segments, dtype=torch.long, device=device),
        sequences=tuple(sequences),
        predict_R=torch.tensor(predict, dtype=torch.long, device=device),
        target_R=torch.tensor(targets, dtype=torch.long, device=device),
        lengths=lengths,
        allowed=allowed if any(ids is not None for ids in allowed) else [],
    )


def attention_mask(packed: Packed, *, prefix: int = 0, window: int | None = None) -> Tensor:
    """Who may look at whom: bool 1 x 1 x T x (prefix + T), True where attention is allowed.

    Every token sees the cached prefix and the earlier tokens of its own sequence; `window` keeps only the nearest
    `window` positions, itself included, as sliding-window layers do.
    """
    positions_T = packed.position_ids_1T[0]
    own_TT = packed.segment_T[:, None] == packed.segment_T[None, :]
    allowed_TT = own_TT & (positions_T[:, None] >= positions_T[None, :])
    prefix_TP = torch.ones(len(positions_T), prefix, dtype=torch.bool, device=positions_T.device)
    if window is not None:
        allowed_TT &= positions_T[:, None] - positions_T[None, :] < window
        prefix_TP &= positions_T[:, None] - torch.arange(prefix, device=positions_T.device)[None, :] < window
    return torch.cat([prefix_TP, allowed_TT], dim=1)[None, None]


def micro_batches(samples: Sequence[Sample], token_budget: int, cached: int = 0) -> Iterator[list[Sample]]:
    """Split a batch, in order, into packs of at most `token_budget` tokens (a longer sample stands alone).

    Tokens are those that a forward reads: the first `cached` tokens of every teacher prompt count for nothing.
    """
    group: list[Sample] = []
    used = 0
    for sample in samples:
        tokens = sample.reads(cached)
        if group and used + tokens > token_budget:
            yield group
            group, used = [], 0
        group.append(sample)
        used += tokens
    if group:
        yield group
