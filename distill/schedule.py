"""The `auto` objective: forward KL until student and teacher overlap, the paper's reverse KL from then on.

Reverse KL weighs each token by the student's own probability. Where the student gives the teacher's opening almost
no mass, nothing pulls it there; forward KL on the same samples does. `auto` therefore looks at the overlap of the two
distributions at the first response token, sum_v min(s, t), and crosses over once it is high, back if it falls low.

This is an option, not a finding: whether it beats each single divergence has yet to be measured, on three worlds and
three seeds. Until then the default stays the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from distill.monitor import StepMetrics

#: Steps whose mean overlap decides.
WINDOW = 3


def auto_objective(
    history: Sequence[StepMetrics], *, enter: float, leave: float
) -> Literal["forward_kl", "reverse_kl"]:
    """The objective of the step after `history`, a function of it alone, so that a resumed run chooses the same.

    Args:
        history: the steps so far; the last one's `objective` is what is in use.
        enter: from this mean `opening_overlap` of the last steps on it is reverse KL.
        leave: below this one it is forward KL again. Between the two nothing changes.
    """
    if not history:
        return "forward_kl"
    recent = history[-WINDOW:]
    overlap = sum(metrics.opening_overlap for metrics in recent) / len(recent)
    if history[-1].objective == "reverse_kl":
        return "forward_kl" if overlap < leave else "reverse_kl"
    return "reverse_kl" if overlap >= enter and len(recent) == WINDOW else "forward_kl"
