"""Restricted replies: every way to write a choice is allowed, nothing else, and the mask comes back from the ids."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.constraint import Restriction, Vocabulary, allowed_ids, episode_allowed
from agent.engines.sampling import pick_among
from agent.engines.transformers import TransformersEngine
from agent.episode import Episode, FinishReason, Message, SamplingParams, StopReason, Turn
from agent.errors import ConstraintError
from envs.base import Split, Task

CHOICES = ("go east", "go", "go west", "open fridge", "öffne 🚪")


@pytest.fixture(scope="module")
def vocabulary(tiny_tokenizer: Any) -> Vocabulary:
    return Vocabulary(tiny_tokenizer)


def spell(vocabulary: Vocabulary, text: str) -> list[int]:
    by_text = {text: id_ for id_, text in vocabulary.bytes.items()}
    return [by_text[bytes([byte])] for byte in text.encode()]


def test_one_token_a_byte(vocabulary: Vocabulary, tiny_tokenizer: Any) -> None:
    assert len(vocabulary.bytes) == 256
    assert tiny_tokenizer.decode(spell(vocabulary, CHOICES[-1])) == CHOICES[-1]
    start = Restriction(vocabulary, CHOICES).allowed
    assert {vocabulary.bytes[i] for i in start} == {b"g", b"o", "ö".encode()[:1]}


def test_a_choice_that_another_goes_on_from_may_end_or_go_on(vocabulary: Vocabulary) -> None:
    after_go = allowed_ids(vocabulary, CHOICES, [*spell(vocabulary, "go"), *vocabulary.ends])[-1]
    assert set(after_go) == {*vocabulary.ends, *spell(vocabulary, " ")}
    after_east = allowed_ids(vocabulary, CHOICES, [*spell(vocabulary, "go east"), *vocabulary.ends])[-1]
    assert after_east == vocabulary.ends


@pytest.mark.parametrize("reply", ["go north", "Go", "gone", "open fridge now"])
def test_a_reply_that_is_no_choice_is_refused(vocabulary: Vocabulary, reply: str) -> None:
    with pytest.raises(ConstraintError, match="none of the choices"):
        allowed_ids(vocabulary, CHOICES, spell(vocabulary, reply))


def test_choices_that_cannot_be_written_are_refused(tiny_tokenizer: Any) -> None:
    vocabulary = Vocabulary(tiny_tokenizer)
    vocabulary._ids = {}
    with pytest.raises(ConstraintError, match="can be written"):
        Restriction(vocabulary, ["north"])


@pytest.mark.model
def test_every_way_to_cut_a_choice_into_tokens_is_allowed(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    vocabulary = Vocabulary(tokenizer)
    for id_, text in itertools.islice(vocabulary.bytes.items(), 0, None, 97):
        assert text.decode(errors="replace") == tokenizer.decode([id_])
    restriction = Restriction(vocabulary, ["go east", "wait"])
    texts = {vocabulary.bytes[i] for i in restriction.allowed}
    assert {b"g", b"go", b"w", b"wait"} <= texts
    assert all(b"go east".startswith(text) or b"wait".startswith(text) for text in texts)
    for ids in (tokenizer("go east")["input_ids"], [*tokenizer("g")["input_ids"], *tokenizer("o east")["input_ids"]]):
        assert len(allowed_ids(vocabulary, ["go east", "wait"], [*ids, tokenizer.eos_token_id])) == len(ids) + 1


@settings(max_examples=20, deadline=None)
@given(
    choices=st.lists(
        st.sampled_from(["go", "go east", "look", "lock", "a", "take knife", "é"]), min_size=1, unique=True
    ),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    seed=st.integers(0, 2**32),
)
def test_what_is_sampled_is_a_choice(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, choices: list[str], temperature: float, seed: int
) -> None:
    engine = TransformersEngine(tiny_model(), tiny_tokenizer, name="tiny")
    free = SamplingParams(temperature=temperature, max_tokens=12, seed=seed, top_k=5)
    restricted = free.model_copy(update={"choices": tuple(choices)})
    prompt = engine.renderer.prompt([Message(role="user", content="which way?")])
    said, unrestricted = engine.generate([prompt, prompt], [restricted, free])
    assert engine.renderer.decode(said.token_ids) in choices
    assert said.finish_reason is FinishReason.STOP
    assert unrestricted.token_ids == engine.generate([prompt], [free])[0].token_ids


def test_logprobs_are_among_the_allowed(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = tiny_model()
    engine = TransformersEngine(model, tiny_tokenizer, name="tiny")
    vocabulary = Vocabulary(tiny_tokenizer)
    prompt = engine.renderer.prompt([Message(role="user", content="which way?")])
    choices = ("north", "no", "east", "nest")
    completion = engine.generate([prompt], [SamplingParams(choices=choices, seed=3)])[0]
    ids = completion.token_ids
    with torch.no_grad():
        logits_TV = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    for logits_V, allowed, id_, logprob in zip(
        logits_TV, allowed_ids(vocabulary, choices, ids), ids, completion.logprobs, strict=True
    ):
        expected = logits_V[list(allowed)].log_softmax(-1)[allowed.index(id_)]
        assert logprob == pytest.approx(float(expected), abs=1e-4)
    assert completion.logprobs[-1] == 0.0 or len(allowed_ids(vocabulary, choices, ids)[-1]) > 1


def test_allowed_ids_far_below_the_rest_are_still_drawn_in_proportion() -> None:
    logits_V = torch.tensor([200.0, 0.0, 1.0, -3.0])
    drawn = [pick_among(logits_V, (1, 2, 3), SamplingParams(), (n + 0.5) / 1000)[0] for n in range(1000)]
    shares = torch.tensor([drawn.count(id_) / 1000 for id_ in (1, 2, 3)])
    torch.testing.assert_close(shares, logits_V[1:].softmax(-1), atol=2e-3, rtol=0)
    assert pick_among(logits_V, (1, 3), SamplingParams(temperature=0.0), 0.0)[0] == 1


def test_an_episode_gives_its_masks_back(vocabulary: Vocabulary) -> None:
    end = vocabulary.ends[0]
    first, second, third = [*spell(vocabulary, "go"), end], spell(vocabulary, "free text"), spell(vocabulary, "look")
    bridge = spell(vocabulary, "...")
    ids = [*bridge, *first, *bridge, *second, *bridge, *third]
    starts = [3, 3 + len(first) + 3, 3 + len(first) + 3 + len(second) + 3]
    spans = [range(start, start + len(reply)) for start, reply in zip(starts, (first, second, third), strict=True)]
    mask = [any(i in span for span in spans) for i in range(len(ids))]
    turn = {"observation": "", "action": "", "finish_reason": FinishReason.STOP}
    episode = Episode(
        id="e",
        task=Task.create("textworld", Split.TRAIN, 1, {}),
        messages=(),
        turns=(
            Turn(start=starts[0], end=starts[0] + len(first), choices=("go", "go east"), **turn),
            Turn(start=starts[1], end=starts[1] + len(second), **turn),
        ),
        token_ids=tuple(ids),
        prompt_length=3,
        loss_mask=tuple(mask),
        logprobs=(0.0,) * len(ids),
        reward=0,
        score=0,
        success=False,
        feedback="",
        stop_reason=StopReason.INTERRUPTED,
        model="tiny",
        sampling=SamplingParams(admissible_only=True),
        started_at=datetime.now(UTC),
        seconds=0,
    )
    masks = episode_allowed(vocabulary, Episode.model_validate_json(episode.model_dump_json()))
    assert len(masks) == episode.sampled
    assert masks[:3] == allowed_ids(vocabulary, ("go", "go east"), first)
    assert set(masks[3:]) == {None}
