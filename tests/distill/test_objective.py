"""The divergences are exact: against float64 autograd, against each other's identities, in chunks or at once."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.chunked import chunked_cross_entropy, chunked_divergence
from distill.errors import DistillConfigError
from distill.objective import (
    divergence_named,
    forward_kl,
    jsd,
    position_weights,
    reverse_kl,
    skew_kl,
    topk,
)

NAMES = ["reverse_kl", "forward_kl", "jsd", "skew_kl", "topk"]


def reference(name: str, z_s: torch.Tensor, z_t: torch.Tensor, beta: float, alpha: float, k: int) -> torch.Tensor:
    """Straight from the definitions, on probabilities, left to autograd."""
    s, t = z_s.softmax(-1), z_t.softmax(-1)

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (p * (p / q).log()).sum(-1)

    if name == "reverse_kl":
        return kl(s, t)
    if name == "forward_kl":
        return kl(t, s)
    if name == "jsd":
        m = beta * t + (1 - beta) * s
        return beta * kl(t, m) + (1 - beta) * kl(s, m)
    if name == "skew_kl":
        return kl(t, alpha * t + (1 - alpha) * s)
    index = s.topk(k, -1).indices
    top_s, top_t = s.gather(-1, index), t.gather(-1, index)
    coarse_s = torch.cat([top_s, 1 - top_s.sum(-1, keepdim=True)], -1)
    coarse_t = torch.cat([top_t, 1 - top_t.sum(-1, keepdim=True)], -1)
    return kl(coarse_s, coarse_t)


def draw(seed: int, positions: int, vocabulary: int, width: int, scale: float) -> tuple[torch.Tensor, ...]:
    make = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=make, dtype=torch.float64) * scale  # noqa: E731
    return rand(positions, width), rand(vocabulary, width), rand(positions, width + 1), rand(vocabulary, width + 1)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    seed=st.integers(0, 10_000),
    positions=st.integers(1, 7),
    vocabulary=st.integers(5, 40),
    chunk=st.integers(1, 8),
    beta=st.floats(0.05, 0.95),
    alpha=st.floats(0.05, 0.9),
    scale=st.floats(0.1, 1.5),
)
def test_value_and_both_gradients_equal_the_float64_reference(
    name: str, seed: int, positions: int, vocabulary: int, chunk: int, beta: float, alpha: float, scale: float
) -> None:
    h_s, w_s, h_t, w_t = draw(seed, positions, vocabulary, 4, scale)
    weights = torch.linspace(0.3, 2.0, positions, dtype=torch.float64)
    grads = []
    for ours in (True, False):
        h, w = h_s.clone().requires_grad_(), w_s.clone().requires_grad_()
        if ours:
            divergence = divergence_named(name, beta=beta, alpha=alpha, k=3)
            d, _ = chunked_divergence(h, w, h_t, w_t, divergence, chunk=chunk)
        else:
            d = reference(name, h @ w.T, h_t @ w_t.T, beta, alpha, 3)
        (d * weights).sum().backward()
        grads.append((d.detach().double(), h.grad, w.grad))
    for mine, theirs in zip(*grads, strict=True):
        # a divergence is a small difference of large terms where the two agree: float32 sets the floor of d
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), positions=st.integers(1, 7), chunk=st.integers(1, 8), scale=st.floats(0.1, 3.0))
def test_cross_entropy_and_both_gradients_equal_torchs(seed: int, positions: int, chunk: int, scale: float) -> None:
    h_0, w_0, *_ = draw(seed, positions, 30, 4, scale)
    target = torch.randint(0, 30, (positions,), generator=torch.Generator().manual_seed(seed))
    weights = torch.linspace(0.3, 2.0, positions, dtype=torch.float64)
    grads = []
    for ours in (True, False):
        h, w = h_0.clone().requires_grad_(), w_0.clone().requires_grad_()
        if ours:
            d, overlap = chunked_cross_entropy(h, w, target, chunk=chunk)
            torch.testing.assert_close(overlap.student_mass_P, (-d).exp().detach())
            assert (overlap.teacher_entropy_P == 0).all()
        else:
            d = torch.nn.functional.cross_entropy(h @ w.T, target, reduction="none")
        (d * weights).sum().backward()
        grads.append((d.detach().double(), h.grad, w.grad))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_distributions_a_thousand_nats_apart_give_finite_gradients(name: str) -> None:
    hidden = torch.tensor([[1.0]], requires_grad=True)
    head_s, head_t = torch.tensor([[0.0], [-1000.0], [-3.0]]), torch.tensor([[-1000.0], [0.0], [-3.0]])
    d, overlap = chunked_divergence(hidden, head_s, torch.ones(1, 1), head_t, divergence_named(name, k=1))
    d.sum().backward()
    assert torch.isfinite(d).all()
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()
    assert overlap.shared_mass_P.item() == pytest.approx(math.exp(-3) / (1 + math.exp(-3)))


@given(seed=st.integers(0, 1000), k=st.integers(1, 30))
def test_topk_with_tail_is_a_lower_bound_and_never_negative(seed: int, k: int) -> None:
    h_s, w_s, h_t, w_t = draw(seed, 4, 30, 4, 1.0)
    s, t = (h_s @ w_s.T).log_softmax(-1), (h_t @ w_t.T).log_softmax(-1)
    exact, _ = reverse_kl(s, t)
    coarse, _ = topk(k)(s, t)
    assert (coarse >= -1e-9).all()
    assert (coarse <= exact + 1e-9).all()


def test_topk_without_tail_goes_negative_as_in_the_paper_code() -> None:
    s = torch.tensor([[0.4, 0.4, 0.2]]).log()
    t = torch.tensor([[0.5, 0.45, 0.05]]).log()
    truncated, _ = topk(2, tail=False)(s, t)
    assert truncated.item() == pytest.approx(-0.1364, abs=1e-3)
    assert topk(2)(s, t)[0].item() > 0


@given(seed=st.integers(0, 1000), beta=st.floats(0.01, 0.99))
def test_jsd_is_bounded_and_symmetric_at_one_half(seed: int, beta: float) -> None:
    h_s, w_s, h_t, w_t = draw(seed, 3, 20, 4, 2.0)
    s, t = (h_s @ w_s.T).log_softmax(-1), (h_t @ w_t.T).log_softmax(-1)
    bound = -(beta * math.log(beta) + (1 - beta) * math.log1p(-beta))
    d, _ = jsd(beta)(s, t)
    assert ((d >= -1e-9) & (d <= bound + 1e-9)).all()
    torch.testing.assert_close(jsd(0.5)(s, t)[0], jsd(0.5)(t, s)[0])


def test_the_ends_of_jsd_and_skew_are_the_plain_divergences() -> None:
    assert jsd(0.0) is forward_kl
    assert jsd(1.0) is reverse_kl
    assert skew_kl(0.0) is forward_kl


def test_float32_is_within_1e_5_of_float64_at_a_real_vocabulary() -> None:
    h_s, w_s, h_t, w_t = draw(0, 16, 50_000, 32, 0.3)
    for name in NAMES:
        exact, _ = chunked_divergence(h_s, w_s, h_t, w_t, divergence_named(name))
        single, _ = chunked_divergence(h_s.float(), w_s.float(), h_t.float(), w_t.float(), divergence_named(name))
        torch.testing.assert_close(single, exact.float(), rtol=1e-5, atol=1e-6)


def test_overlap_reads_both_distributions() -> None:
    eye = torch.eye(3, dtype=torch.float64)
    s, t = torch.tensor([[0.7, 0.2, 0.1]]).double().log(), torch.tensor([[0.1, 0.6, 0.3]]).double().log()
    _, overlap = chunked_divergence(s, eye, t, eye, reverse_kl)
    assert overlap.teacher_mass_P.item() == pytest.approx(0.1)
    assert overlap.student_mass_P.item() == pytest.approx(0.2)
    assert overlap.shared_mass_P.item() == pytest.approx(0.1 + 0.2 + 0.1)
    assert overlap.student_entropy_P.item() == pytest.approx(-sum(p * math.log(p) for p in (0.7, 0.2, 0.1)))


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    cut=st.integers(0, 8),
    normalize=st.sampled_from(["sequence", "token"]),
)
def test_position_weights_sum_to_one_however_the_batch_is_cut(lengths: list[int], cut: int, normalize: str) -> None:
    whole = {"sequences": len(lengths), "tokens": sum(lengths)}
    parts = [position_weights(part, normalize, **whole) for part in (lengths[:cut], lengths[cut:]) if part]
    joined = torch.cat(parts)
    torch.testing.assert_close(joined, position_weights(lengths, normalize, **whole))
    assert joined.sum().item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: jsd(1.5), "1.5"),
        (lambda: skew_kl(-0.1), "-0.1"),
        (lambda: topk(0), "0"),
        (lambda: divergence_named("reversed"), "reverse_kl"),
        (lambda: position_weights([1], "mean", sequences=1, tokens=1), "mean"),
    ],
)
def test_bad_parameters_are_named(make, word: str) -> None:
    with pytest.raises(DistillConfigError, match=word):
        make()
