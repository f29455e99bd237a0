"""Which split a piece of content belongs to: decided by the content alone.

The same question or board falls into the same split whatever seed or process made it, so splits cannot overlap.
"""

from __future__ import annotations

import hashlib

from envs.base import Split

#: Upper bounds of each split's share of the digest's range, in order.
_SHARES = ((0.6, Split.TRAIN), (0.8, Split.VALIDATION), (1.0, Split.TEST))
#: The same with a share kept free for out-of-distribution content from the same generators' language.
_SHARES_WITH_OOD = ((0.55, Split.TRAIN), (0.7, Split.VALIDATION), (0.85, Split.TEST), (1.0, Split.OOD))


def split_of(content: str, *, reserve_ood: bool = False) -> Split:
    """The split of `content`: sha256 buckets of 60/20/20 %, or 55/15/15/15 % where `reserve_ood`."""
    position = int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") / 2**64
    shares = _SHARES_WITH_OOD if reserve_ood else _SHARES
    return next((split for bound, split in shares if position < bound), shares[-1][1])


def content_number(content: str, bits: int = 31) -> int:
    """A number derived from content, below `2**bits`: for seeds that must be the same in every process."""
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") % (1 << bits)
