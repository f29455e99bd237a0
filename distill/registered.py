"""Objectives of your own, by name: what `--objective` and `DistillConfig.objective` take besides the built-in ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from distill.errors import DistillConfigError
from envs.plugins import Plugins

if TYPE_CHECKING:
    from distill.objective import Divergence

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "skew_kl", "topk")
CROSS_ENTROPY = "cross_entropy"

OBJECTIVES = Plugins(
    "engrain.objectives", "objective", dict.fromkeys((*DIVERGENCES, CROSS_ENTROPY), "distill.objective")
)
_D = TypeVar("_D", bound="Divergence")


def register_objective(name: str, divergence: _D) -> _D:
    """Add an objective to this process, and return it.

    One that an entry point of the group `engrain.objectives` names needs no call, and the command line knows it too;
    so do the other processes of `accelerate launch`.

    Raises:
        UsageError: a built-in objective has the same name.
    """
    OBJECTIVES.register(name, divergence)
    return divergence


def from_value(value: Callable[[Tensor, Tensor], Tensor]) -> Divergence:
    """An objective from its value alone; autograd finds the derivative.

    Args:
        value: (student log-probs PV, teacher log-probs PV) -> the objective of every position, P, in nats. It must
            treat each position by itself: positions come a few at a time. It must be smooth in the student's
            log-probabilities, and 0 where the two are equal if the monitor's figures are to mean anything.

    It holds autograd's intermediate results for these few positions, and costs two to three times as much as one of
    the built-in ones, whose derivative is written out.
    """

    def divergence(logp_s_PV: Tensor, logp_t_PV: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf_PV = logp_s_PV.detach().clone().requires_grad_()
            d_P = value(leaf_PV, logp_t_PV)
            # d/d log p = p d/dp: the weighted derivative that `distill.objective` asks for
            (g_PV,) = torch.autograd.grad(d_P.sum(), leaf_PV)
        return d_P.detach(), g_PV

    return divergence


def known_objective(name: str) -> str:
    """The name itself, if there is an objective of that name.

    Raises:
        DistillConfigError: there is none; the message lists the known ones.
    """
    if name not in OBJECTIVES.names():
        raise DistillConfigError(f"unknown objective {name!r}; use one of {', '.join(OBJECTIVES.names())}")
    return name


def own_objective(name: str) -> Divergence:
    """A registered objective.

    Raises:
        DistillConfigError: there is none of that name; the message lists the known ones.
        BadPluginError: it does not import, or is no function.
    """
    return OBJECTIVES.function(known_objective(name))  # type: ignore[no-any-return]
