"""Two independent oracles for the divergences, both TRL's: its loss on whole logits, and its own chunked kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distill.chunked import chunked_divergence
from distill.objective import jsd

pytest.importorskip("trl")

#: (student hidden PD, student head VD, teacher hidden PD, teacher head VD, beta) -> divergence
Oracle = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]

POSITIONS, VOCABULARY = 12, 300


def logits_loss(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor, beta: float) -> Tensor:
    """TRL's loss on full logits; it gives the mean over positions only."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    labels = torch.zeros(1, POSITIONS, dtype=torch.long)
    return GKDTrainer.generalized_jsd_loss((h_s @ w_s.T)[None], (h_t @ w_t.T)[None], labels=labels, beta=beta)


def kernel(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor, beta: float) -> Tensor:
    """TRL's chunked kernel, one value a position."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence_P, _ = ChunkedDivergenceFunction.apply(h_s, w_s, None, h_t, w_t, None, beta)
    return divergence_P


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's tiles are larger than the test: made smaller, so that its own sums over tiles take part."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.setattr("trl.kernels.chunked_divergence.TOKEN_CHUNK_SIZE", 5)
    monkeypatch.setattr("trl.kernels.chunked_divergence.VOCAB_CHUNK_SIZE", 128)


@pytest.mark.parametrize("oracle", [logits_loss, kernel])
@pytest.mark.parametrize("scale", [0.1, 0.7, 1.5], ids=["close", "apart", "far"])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0], ids=["forward", "jsd-0.1", "jsd-0.5", "jsd-0.9", "reverse"])
def test_trl_finds_the_same_divergence_and_both_gradients(oracle: Oracle, beta: float, scale: float) -> None:
    draw = torch.Generator().manual_seed(5)
    h_s, h_t = (torch.randn(POSITIONS, width, generator=draw) * scale for width in (8, 9))
    w_s, w_t = (torch.randn(VOCABULARY, width, generator=draw) for width in (8, 9))
    weights_P = torch.linspace(0.3, 2.0, POSITIONS) if oracle is kernel else torch.full((POSITIONS,), 1 / POSITIONS)
    results = []
    for ours in (True, False):
        hidden, head = h_s.clone().requires_grad_(), w_s.clone().requires_grad_()
        if ours:
            d = chunked_divergence(hidden, head, h_t, w_t, jsd(beta), chunk=5)[0]
        else:
            d = oracle(hidden, head, h_t, w_t, beta)
        loss = (d * weights_P).sum() if d.ndim else d
        loss.backward()
        values = d.detach() if oracle is kernel else loss.detach()
        results.append((values, hidden.grad, head.grad))
    (mine, *my_grads), (theirs, *their_grads) = results
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    for my_grad, their_grad in zip(my_grads, their_grads, strict=True):
        assert (my_grad - their_grad).norm() < 1e-5 * their_grad.norm()
