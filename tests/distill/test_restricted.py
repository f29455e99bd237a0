"""Restricted replies in distillation: student and teacher share their probability out among the same allowed ids."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
import torch

from agent.constraint import Vocabulary, allowed_ids
from agent.episode import Episode, FinishReason, Message, SamplingParams, StopReason, Turn
from agent.renderer import Renderer
from distill.chunked import chunked_cross_entropy, chunked_divergence
from distill.objective import divergence_named
from distill.packing import Sample, pack
from distill.partial import PrefixSource
from distill.source import make_sample
from envs.base import Split, Task

P, D, V = 7, 5, 40
ALLOWED = (None, (3,), (0, 39), tuple(range(40)), (1, 5, 8, 13), None, (2, 4))


@pytest.fixture
def states() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((P, D), (V, D), (P, 3), (V, 3))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "skew_kl", "topk"])
@pytest.mark.parametrize("chunk", [2, 100])
def test_value_and_gradient_are_those_of_the_allowed_ids_alone(
    name: str, chunk: int, states: tuple[torch.Tensor, ...]
) -> None:
    hidden, head, hidden_t, head_t = (t.clone().requires_grad_(i < 2) for i, t in enumerate(states))
    divergence = divergence_named(name, k=3)
    d_P, overlap = chunked_divergence(hidden, head, hidden_t, head_t, divergence, chunk=chunk, allowed=ALLOWED)
    weights = torch.arange(1.0, P + 1)
    (weights * d_P).sum().backward()
    assert all(torch.isfinite(values).all() for values in vars(overlap).values())
    for place, ids in enumerate(ALLOWED):
        rows = list(range(V)) if ids is None else list(ids)
        h, w = states[0][place : place + 1].clone().requires_grad_(), states[1][rows]
        alone, _ = chunked_divergence(h, w, states[2][place : place + 1], states[3][rows], divergence)
        torch.testing.assert_close(d_P[place], alone[0], atol=1e-5, rtol=1e-5)
        (weights[place] * alone[0]).backward()
        torch.testing.assert_close(hidden.grad[place], h.grad[0], atol=1e-5, rtol=1e-4)
    assert float(d_P[1].detach()) == pytest.approx(0.0, abs=1e-6)  # only one id was allowed: nothing to learn


def test_cross_entropy_is_that_of_the_allowed_ids(states: tuple[torch.Tensor, ...]) -> None:
    target = torch.tensor([0, 3, 39, 7, 8, 1, 4])
    d_P, _ = chunked_cross_entropy(states[0], states[1], target, allowed=ALLOWED)
    logits = states[0] @ states[1].T
    for place, ids in enumerate(ALLOWED):
        rows = list(range(V)) if ids is None else list(ids)
        expected = -logits[place, rows].log_softmax(-1)[rows.index(int(target[place]))]
        assert float(d_P[place]) == pytest.approx(float(expected), abs=1e-5)


def test_as_many_restrictions_as_positions(states: tuple[torch.Tensor, ...]) -> None:
    with pytest.raises(ValueError, match="7 positions and 2 restrictions"):
        chunked_divergence(*states, divergence_named("reverse_kl"), allowed=[None, None])


def played(tokenizer: Any, choices: tuple[str, ...] | None) -> Episode:
    """One turn, a bridge, and a second turn that is free."""
    renderer = Renderer(tokenizer)
    messages = [Message(role="user", content="Where to?")]
    prompt = renderer.prompt(messages)
    first = [*tokenizer("go")["input_ids"], renderer.end_of_turn]
    bridge = renderer.bridge(messages, "There.", ended=True)
    second = [*tokenizer("ok")["input_ids"], renderer.end_of_turn]
    ids = [*prompt, *first, *bridge, *second]
    start, again = len(prompt), len(prompt) + len(first) + len(bridge)
    mask = [start <= i < start + len(first) or i >= again for i in range(len(ids))]
    said = {"finish_reason": FinishReason.STOP, "observation": "Where to?"}
    return Episode(
        id="e",
        task=Task.create("textworld", Split.TRAIN, 1, {}),
        messages=(*messages, Message(role="assistant", content="go"), Message(role="user", content="There.")),
        turns=(
            Turn(start=start, end=start + len(first), action="go", choices=choices, **said),
            Turn(start=again, end=len(ids), action="ok", **said),
        ),
        token_ids=tuple(ids),
        prompt_length=len(prompt),
        loss_mask=tuple(mask),
        logprobs=(0.0,) * len(ids),
        reward=0,
        score=0,
        success=False,
        feedback="",
        stop_reason=StopReason.DONE,
        model="tiny",
        sampling=SamplingParams(admissible_only=choices is not None),
        started_at=datetime.now(UTC),
        seconds=0,
    )


def test_an_episodes_masks_reach_the_packed_row(tiny_tokenizer: Any) -> None:
    renderer = Renderer(tiny_tokenizer)
    episode = played(tiny_tokenizer, ("go", "go on", "stay"))
    restricted = make_sample(episode, renderer, "Never stay.", 4096)
    free = make_sample(played(tiny_tokenizer, None), renderer, "Never stay.", 4096)
    reply = episode.token_ids[episode.turns[0].start : episode.turns[0].end]
    masks = allowed_ids(Vocabulary(tiny_tokenizer), ("go", "go on", "stay"), reply)
    assert restricted.allowed == (*masks, None, None, None)
    assert free.allowed == ()
    packed = pack([free.student_prompt, restricted.student_prompt], [free, restricted])
    assert packed.allowed == [*[None] * free.sampled, *restricted.allowed]
    assert pack([free.student_prompt], [free]).allowed == []
    for target, ids in zip(packed.target_R.tolist(), packed.allowed, strict=True):
        assert ids is None or target in ids
    with pytest.raises(ValueError, match="one entry for each sampled token"):
        Sample("x", (1,), (1,), (2, 3), (True, True), allowed=(None,))


def test_a_reply_that_is_given_anew_is_restricted_as_the_first_was(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    from agent.engines.transformers import TransformersEngine

    engine = TransformersEngine(tiny_model(), tiny_tokenizer, name="tiny")
    choices = ("go", "go on", "stay")
    source = PrefixSource(
        [played(tiny_tokenizer, choices)],
        engine,
        "Never stay.",
        batch_size=6,
        sampling=SamplingParams(max_tokens=12),
        seed=0,
    )
    batch = source(0)
    restricted = [sample for sample in batch.samples if sample.allowed]
    assert 0 < len(restricted) < len(batch.samples)  # the other turn was free
    for sample in restricted:
        assert engine.renderer.decode(sample.continuation) in choices
        assert all(id_ in ids for id_, ids in zip(sample.continuation, sample.allowed, strict=True) if ids)
