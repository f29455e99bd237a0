"""The decode loop against transformers' own: same tokens, same log-probabilities, whoever else is in the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from agent.engines.base import Completion, steady
from agent.engines.cache import PastStore, RowCache
from agent.engines.decode import Limits
from agent.engines.lora import _sum, can_merge, merged
from agent.engines.sampling import draw, keep_top, pick
from agent.engines.transformers import TransformersEngine, pick_dtype
from agent.episode import FinishReason, Message, SamplingParams
from agent.errors import CheckpointError, ContextLengthError, EngineFailedError, ModelLoadError
from agent.renderer import common_prefix

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Matrices this small only lose time to a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def engine(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> TransformersEngine:
    return TransformersEngine(tiny_model(), tiny_tokenizer, name="tiny", max_batch=4)


def prompts_of(engine: TransformersEngine, *texts: str, knowledge: str | None = None) -> list[list[int]]:
    return [engine.renderer.prompt([Message(role="user", content=text)], knowledge) for text in texts]


def forward_logprobs(model: Any, prompt: list[int], sampled: tuple[int, ...]) -> torch.Tensor:
    """Log-probabilities of the sampled ids from one plain forward pass without any cache."""
    with torch.no_grad():
        logits_TV = model(torch.tensor([[*prompt, *sampled]])).logits[0, len(prompt) - 1 : -1]
    return logits_TV.float().log_softmax(-1).gather(1, torch.tensor(sampled).unsqueeze(1)).squeeze(1)


def reference(model: Any, prompt: list[int], params: SamplingParams, stop: set[int]) -> list[int]:
    """transformers' own greedy generation."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=params.max_tokens,
            do_sample=False,
            eos_token_id=sorted(stop),
            pad_token_id=0,
        )
    return list(out[0, len(prompt) :].tolist())


def test_greedy_is_what_transformers_generates(engine: TransformersEngine) -> None:
    texts = ["a", "What is 2 + 2?", "x" * 70, "", "north", "look around, then go", "7", "8", "99"]
    prompts = prompts_of(engine, *texts)
    for prompt, completion in zip(prompts, engine.generate(prompts, [GREEDY] * len(prompts)), strict=True):
        expected = reference(engine.network, prompt, GREEDY, set(engine.renderer.stop_ids))
        assert list(completion.token_ids) == expected


@pytest.mark.parametrize("knowledge", [None, "Remember: always go north, and look behind every door."])
def test_logprobs_are_a_full_forwards(engine: TransformersEngine, knowledge: str | None) -> None:
    prompts = prompts_of(engine, *(f"{n} + {n * n}?" for n in range(7)), knowledge=knowledge)
    sampling = [SamplingParams(temperature=0.7, top_k=20, max_tokens=5 + n, seed=n) for n in range(7)]
    for prompt, completion in zip(prompts, engine.generate(prompts, sampling), strict=True):
        expected = forward_logprobs(engine.network, prompt, completion.token_ids)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=2e-5, rtol=1e-4)


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=9),
    max_batch=st.integers(1, 5),
    reuse=st.sampled_from([0, 10_000]),
)
def test_a_result_does_not_depend_on_its_neighbours(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, lengths: list[int], max_batch: int, reuse: int
) -> None:
    model = tiny_model()
    engine = TransformersEngine(model, tiny_tokenizer, name="t", max_batch=max_batch, reuse_tokens=reuse)
    alone = TransformersEngine(model, tiny_tokenizer, name="t", max_batch=1, reuse_tokens=0)
    prompts = prompts_of(engine, *("abc" * n for n in lengths))
    sampling = [SamplingParams(max_tokens=1 + (n % 7), seed=i) for i, n in enumerate(lengths)]
    together = engine.generate(prompts, sampling)
    for prompt, params, completion in zip(prompts, sampling, together, strict=True):
        single = alone.generate([prompt], [params])[0]
        assert completion.token_ids == single.token_ids
        assert completion.finish_reason == single.finish_reason
        assert completion.logprobs == pytest.approx(single.logprobs, abs=1e-4)


def test_the_end_of_turn_is_the_last_id(engine: TransformersEngine) -> None:
    stop = engine.renderer.end_of_turn
    bias = torch.zeros(engine.network.config.vocab_size)
    bias[stop] = 50.0
    engine.network.lm_head.register_forward_hook(lambda module, inputs, output: output + bias)
    completion = engine.generate(prompts_of(engine, "a"), [GREEDY])[0]
    assert completion.token_ids == (stop,)
    assert completion.finish_reason is FinishReason.STOP


def test_a_next_turn_costs_only_its_new_tokens(engine: TransformersEngine) -> None:
    prompts = prompts_of(engine, "one", "two")
    first = engine.generate(prompts, [GREEDY] * 2)
    longer = [
        [*prompt, *completion.token_ids, *engine.renderer.bridge([], "more", ended=False)]
        for prompt, completion in zip(prompts, first, strict=True)
    ]
    seen: list[int] = []
    handle = engine.network.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].shape[1])
    )
    again = engine.generate(longer, [GREEDY] * 2)
    handle.remove()
    bridge = len(engine.renderer.bridge([], "more", ended=False))
    assert seen[0] == bridge + 1  # the last sampled token had not been through the model
    fresh = TransformersEngine(engine.network, engine.tokenizer, name="fresh", reuse_tokens=0)
    assert [c.token_ids for c in again] == [c.token_ids for c in fresh.generate(longer, [GREEDY] * 2)]


@contextmanager
def forwarded(engine: TransformersEngine) -> Iterator[list[tuple[int, int]]]:
    """Rows and columns of every forward pass inside."""
    shapes: list[tuple[int, int]] = []
    embedding = engine.network.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(inputs[0].shape)))
    yield shapes
    handle.remove()


def test_what_all_prompts_begin_with_goes_through_the_model_once(engine: TransformersEngine) -> None:
    prompts = prompts_of(engine, "1", "2", "3", "4", knowledge="Remember: look behind every door. " * 5)
    shared = len(common_prefix(*prompts))
    with forwarded(engine) as shapes:
        engine.generate(prompts, [GREEDY.model_copy(update={"max_tokens": 1})] * 4)
    assert shapes == [(1, shared), (4, len(prompts[0]) - shared)]


def test_rows_with_as_many_new_tokens_are_read_together(engine: TransformersEngine) -> None:
    short, other, long, known = prompts_of(engine, "a" * 40, "b" * 40, "c" * 150, "d" * 200)
    one = GREEDY.model_copy(update={"max_tokens": 1})
    engine.generate([known], [one])
    engine.limits = Limits(prefill_tokens=3 * len(short))
    with forwarded(engine) as shapes:
        engine.generate([[*known, *short], short, long, other], [one] * 4)
    assert shapes == [(1, len(long)), (3, len(short))]


def test_no_more_tokens_run_together_than_allowed(engine: TransformersEngine) -> None:
    prompts = prompts_of(engine, *("a" * n for n in (10, 90, 30, 70, 50)))
    engine.limits = Limits(batch_tokens=3 * (len(prompts[1]) + GREEDY.max_tokens), prefill_tokens=128)
    with forwarded(engine) as shapes:
        engine.generate(prompts, [GREEDY] * 5)
    assert max(rows for rows, columns in shapes if columns == 1) == 3


def test_finished_rows_leave_the_batch(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    engine = TransformersEngine(tiny_model(), tiny_tokenizer, name="tiny")
    engine.network.generation_config.eos_token_id = None
    engine.renderer.stop_ids = frozenset()
    lengths = range(8, 72, 8)
    sampling = [SamplingParams(max_tokens=n, seed=n) for n in lengths]
    with forwarded(engine) as shapes:
        done = engine.generate(prompts_of(engine, *"abcdefgh"), sampling)
    assert [len(c.token_ids) for c in done] == list(lengths)
    steps = [rows * columns for rows, columns in shapes if columns == 1]
    assert sum(steps) == sum(n - 1 for n in lengths)  # the first token of each comes from its prompt


def test_a_sliding_window_model_falls_back(tiny_tokenizer: Any) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=8,
        max_position_embeddings=512,
    )
    engine = TransformersEngine(MistralForCausalLM(config).eval(), tiny_tokenizer, name="mistral", max_batch=2)
    prompts = prompts_of(engine, "a", "some more text", "b")
    for prompt, completion in zip(prompts, engine.generate(prompts, [GREEDY] * 3), strict=True):
        expected = forward_logprobs(engine.network, prompt, completion.token_ids)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=2e-5, rtol=1e-4)


def test_a_prompt_that_does_not_fit_is_refused_with_its_lengths(engine: TransformersEngine) -> None:
    with pytest.raises(ContextLengthError, match="4090 tokens plus 12 to sample exceeds the 4096"):
        engine.generate([[5] * 4090], [GREEDY])


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -2},
        {"max_tokens": 0},
    ],
)
def test_bad_sampling_parameters_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        SamplingParams(**bad)


def test_broken_weights_are_named(engine: TransformersEngine) -> None:
    with torch.no_grad():
        engine.network.model.norm.weight.fill_(float("nan"))
    with pytest.raises(EngineFailedError, match="NaN"):
        engine.generate([[5]], [GREEDY])


def test_no_prompts(engine: TransformersEngine) -> None:
    assert engine.generate([], []) == []


# --- sampling ---------------------------------------------------------------------------------------------------


def test_draw_follows_the_weights() -> None:
    weights_V = torch.tensor([0.0, 1.0, 0.0, 3.0, 0.0, 4.0, 0.0])
    uniforms_B = (torch.arange(8000, dtype=torch.float64) + 0.5) / 8000
    counts = draw(weights_V.expand(8000, 7), uniforms_B).bincount(minlength=7)
    assert counts.tolist() == [0, 1000, 0, 3000, 0, 4000, 0]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 700), st.floats(0, 1, exclude_max=True))
def test_a_token_of_weight_zero_is_never_drawn(seed: int, vocabulary: int, uniform: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights_1V = torch.rand(1, vocabulary, generator=generator)
    weights_1V *= torch.rand(1, vocabulary, generator=generator) < 0.2
    weights_1V[0, seed % vocabulary] = 1e-6
    assert weights_1V[0, draw(weights_1V, torch.tensor([uniform], dtype=torch.float64))] > 0


def test_keep_top() -> None:
    weights_V = torch.tensor([0.1, 0.4, 0.2, 0.3])
    assert keep_top(weights_V, 2, 1.0).nonzero().squeeze(1).tolist() == [1, 3]
    assert keep_top(weights_V, 0, 0.6).nonzero().squeeze(1).tolist() == [1, 3]
    assert keep_top(weights_V, 0, 1e-9).nonzero().squeeze(1).tolist() == [1]
    assert keep_top(weights_V, 1, 0.99).nonzero().squeeze(1).tolist() == [1]


def test_pick_gives_untempered_logprobs() -> None:
    logits_BV = torch.randn(11, 300, generator=torch.Generator().manual_seed(1))
    sampling = [SamplingParams(temperature=t) for t in [0.0, 0.5, 1.0, 2.0, 0.0, 1.0, 1.0, 0.3, 1.0, 0.0, 1.5]]
    ids, logprobs = pick(logits_BV, sampling, torch.linspace(0, 0.99, 11, dtype=torch.float64))
    expected = logits_BV.log_softmax(-1)[torch.arange(11), ids]
    torch.testing.assert_close(torch.tensor(logprobs), expected)
    assert ids[0] == int(logits_BV[0].argmax())


# --- cache ------------------------------------------------------------------------------------------------------


def test_rows_join_leave_and_come_back() -> None:
    def state(length: int, fill: float) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        return ((torch.full((1, length, 2), fill), torch.full((1, length, 2), -fill)),)

    cache = RowCache.of_rows([state(2, 1.0), state(5, 2.0)], torch.device("cpu"))
    cache.join([RowCache.of_rows([state(length, 3.0)], torch.device("cpu")) for length in (3, 6)])
    assert cache.mask_BT.sum(1).tolist() == [2, 5, 3, 6]
    cache.keep([0, 2])
    assert cache.width == 3
    assert torch.equal(cache.row(0)[0][0], torch.full((1, 2, 2), 1.0))
    assert torch.equal(cache.row(1, 2)[0][1], torch.full((1, 2, 2), -3.0))


def test_the_store_forgets_the_least_recently_used() -> None:
    store = PastStore(10)
    state = ((torch.zeros(1, 4, 1), torch.zeros(1, 4, 1)),)
    store.put([1, 2, 3, 4], state)
    store.put([5, 6, 7, 8], state)
    assert store.find([1, 2, 3, 4, 9])[0] == 4
    store.put([9, 9, 9], state)
    assert store.find([5, 6, 7, 8, 9])[0] == 0
    assert store.find([1, 2, 3, 4])[0] == 0  # the last token has to go through the model
    store.put([1, 2, 3, 4, 5, 6], state, replaces=4)
    assert store.find([1, 2, 3, 4, 0])[0] == 0
    assert store.tokens == 9


# --- LoRA -------------------------------------------------------------------------------------------------------


def with_adapter(model: Any, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", **options))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return peft


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_leaves_every_weight_bitwise_as_it_was(tiny_model: Callable[..., Any], dtype: torch.dtype) -> None:
    model = with_adapter(tiny_model().to(dtype))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        plain = model(ids).logits.float()
        with merged(model):
            inside = model(ids).logits.float()
            changed = sum(not torch.equal(model.state_dict()[name], old) for name, old in before.items())
        after = model(ids).logits.float()
    assert changed == 14
    torch.testing.assert_close(
        inside, plain, **({"atol": 1e-5, "rtol": 1e-4} if dtype is torch.float32 else {"atol": 0.1, "rtol": 0.1})
    )
    assert torch.equal(plain, after)
    assert all(torch.equal(model.state_dict()[name], old) for name, old in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_the_sum_rounded_once(
    tiny_model: Callable[..., Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.engines.lora._BLOCK", 100)  # several blocks a matrix, the last one smaller
    qwen = with_adapter(tiny_model().to(dtype), use_rslora=True)
    qwen.add_adapter("second", LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    qwen.base_model.set_adapter(["default", "second"])
    torch.manual_seed(0)
    small = GPT2Config(vocab_size=40, n_embd=24, n_layer=1, n_head=2, n_positions=16)
    gpt2 = with_adapter(GPT2LMHeadModel(small).to(dtype), fan_in_fan_out=True)  # its layers hold their weights turned
    for model, adapters, layers in ((qwen, ["default", "second"], 14), (gpt2, ["default"], 4)):
        wanted = {
            name: module.get_base_layer().weight.float() + sum(module.get_delta_weight(a).float() for a in adapters)
            for name, module in model.named_modules()
            if isinstance(module, LoraLayer)
        }
        assert len(wanted) == layers
        with merged(model):
            for name, expected in wanted.items():
                weight = model.get_submodule(name).get_base_layer().weight
                assert weight.dtype == dtype
                step = torch.finfo(dtype).eps
                torch.testing.assert_close(weight.float(), expected, rtol=2 * step, atol=1e-6)


def test_merging_many_times_drifts_nowhere(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    """W + BA - BA is not W in bfloat16: over a run of steps a base that is computed back walks away."""
    model = with_adapter(tiny_model().to(torch.bfloat16))
    engine = TransformersEngine.wrap(model, tiny_tokenizer, name="tiny")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "base_layer" in name}
    prompts = prompts_of(engine, "a")
    for _ in range(5):
        engine.generate(prompts, [GREEDY])
        with engine.steady():
            engine.generate(prompts, [GREEDY])
    assert len(before) == 20  # 14 weights, 6 biases
    assert all(torch.equal(model.state_dict()[name], old) for name, old in before.items())


def test_a_steady_adapter_is_merged_once_and_its_turns_go_on(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_adapter(tiny_model())
    engine = TransformersEngine.wrap(model, tiny_tokenizer, name="tiny")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made: list[Any] = []
    monkeypatch.setattr("agent.engines.lora._sum", lambda layer, *more: made.append(layer) or _sum(layer, *more))
    prompts = prompts_of(engine, "one", "two")

    def turns() -> list[Completion]:
        first = engine.generate(prompts, [GREEDY] * 2)
        more = engine.renderer.bridge([], "more", ended=False)
        longer = [[*p, *c.token_ids, *more] for p, c in zip(prompts, first, strict=True)]
        return first + engine.generate(longer, [GREEDY] * 2)

    loose = turns()
    assert len(made) == 28
    made.clear()
    with steady(engine), steady(engine):
        held = turns()
        assert len(made) == 14
    assert [c.token_ids for c in held] == [c.token_ids for c in loose]
    assert all(c.cached_tokens < len(p) for c, p in zip(loose[2:], prompts, strict=True))
    assert all(c.cached_tokens > len(p) for c, p in zip(held[2:], prompts, strict=True))
    assert all(torch.equal(model.state_dict()[name], old) for name, old in before.items())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.neg_()
    with steady(engine):
        assert engine.generate(prompts, [GREEDY] * 2) != loose[:2]  # nothing of the old weights is left
    with pytest.raises(KeyboardInterrupt), steady(engine):
        raise KeyboardInterrupt
    assert can_merge(model)
    with steady(object()):  # an engine that knows nothing of it
        pass


def test_weights_come_back_when_sampling_fails(tiny_model: Callable[..., Any]) -> None:
    model = with_adapter(tiny_model())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), merged(model):
        raise KeyboardInterrupt
    assert all(torch.equal(model.state_dict()[name], old) for name, old in before.items())
    assert can_merge(model)
    assert not any("forward" in vars(module) for module in model.modules())  # PEFT's layers are asked again


def test_what_cannot_be_merged_is_left_alone(tiny_model: Callable[..., Any]) -> None:
    assert not can_merge(tiny_model())
    assert not can_merge(with_adapter(tiny_model(), use_dora=True))
    assert not can_merge(get_peft_model(tiny_model(), LoraConfig(target_modules=["embed_tokens"])))


def test_wrapping_a_training_model_leaves_it_in_training(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = with_adapter(tiny_model(), lora_dropout=0.5)
    model.train()
    model.base_model.model.model.layers[0].eval()  # a mixed mode comes back too
    modes = [module.training for module in model.modules()]
    engine = TransformersEngine.wrap(model, tiny_tokenizer, name="tiny")
    prompts = prompts_of(engine, "a", "bb")
    first = engine.generate(prompts, [GREEDY] * 2)
    assert [module.training for module in model.modules()] == modes
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    unmerged = TransformersEngine.wrap(model, tiny_tokenizer, name="tiny", merge=False)
    for a, b in zip(first, unmerged.generate(prompts, [GREEDY] * 2), strict=True):
        assert a.token_ids == b.token_ids
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    assert engine.generate(prompts, [GREEDY] * 2) != first  # new weights are seen at once
    loss = model(torch.tensor([prompts[0]]), labels=torch.tensor([prompts[0]])).loss
    loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)
    with pytest.raises(CheckpointError, match="being trained"):
        engine.load(None)


def test_a_frozen_head_is_not_copied_for_every_row(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    """torch multiplies a strided batch with a frozen weight by expanding the weight: 2.5 times the whole cost."""
    model = with_adapter(tiny_model())
    engine = TransformersEngine.wrap(model, tiny_tokenizer, name="tiny")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        engine.generate(prompts_of(engine, "a", "bb", "ccc"), [GREEDY] * 3)
    vocabulary = model.config.vocab_size
    products = [event for event in profile.events() or [] if event.name == "aten::bmm"]
    expanded = [event for event in products if any(vocabulary in shape for shape in event.input_shapes)]
    assert not expanded
    assert not model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("merge", ["auto", False])
def test_adapters_load_swap_and_go(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, tiny_folder: Path, tmp_path: Path, merge: Any
) -> None:
    for seed in (1, 2):
        with_adapter(tiny_model(), seed).save_pretrained(tmp_path / f"ck{seed}")
    engine = TransformersEngine(tiny_folder, name="tiny", dtype="float32", merge=merge)
    prompts = prompts_of(engine, "a", "bb", "ccc")
    base = engine.generate(prompts, [GREEDY] * 3)
    seen = {}
    for seed in (1, 2):
        engine.load(tmp_path / f"ck{seed}")
        assert engine.checkpoint == f"ck{seed}"
        seen[seed] = engine.generate(prompts, [GREEDY] * 3)
        expected = forward_logprobs(with_adapter(tiny_model(), seed), prompts[0], seen[seed][0].token_ids)
        torch.testing.assert_close(torch.tensor(seen[seed][0].logprobs), expected, atol=1e-4, rtol=1e-3)
    assert seen[1] != seen[2] != base
    engine.load(None)
    assert engine.checkpoint is None
    assert engine.generate(prompts, [GREEDY] * 3) == base
    engine.close()


def test_full_weights_load_and_the_base_comes_back(
    tiny_model: Callable[..., Any], tiny_folder: Path, tmp_path: Path
) -> None:
    tiny_model(seed=9).save_pretrained(tmp_path / "full")
    engine = TransformersEngine(tiny_folder, name="tiny", dtype="float32")
    prompts = prompts_of(engine, "a")
    base = engine.generate(prompts, [GREEDY])
    engine.load(tmp_path / "full")
    other = engine.generate(prompts, [GREEDY])
    expected = forward_logprobs(tiny_model(seed=9), prompts[0], other[0].token_ids)
    torch.testing.assert_close(torch.tensor(other[0].logprobs), expected, atol=1e-4, rtol=1e-3)
    engine.load(None)
    assert engine.generate(prompts, [GREEDY]) == base


def test_a_bad_checkpoint_is_refused_and_the_old_one_stays(
    engine: TransformersEngine, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        engine.load(tmp_path / "no")
    with pytest.raises(CheckpointError, match="neither"):
        engine.load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        engine.load(tmp_path)
    with_adapter(tiny_model(hidden_size=64)).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="does not fit"):
        engine.load(tmp_path / "other")
    assert engine.generate(prompts_of(engine, "a"), [GREEDY])


def test_the_checkpoints_id_is_the_one_in_its_manifest(
    engine: TransformersEngine, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "step-000004"
    with_adapter(tiny_model()).save_pretrained(folder)
    engine.load(folder)
    assert engine.checkpoint == "step-000004"
    for manifest, expected in (('{"id": "0123abcd"}', "0123abcd"), ("[]", "step-000004"), ("{", "step-000004")):
        (folder / "manifest.json").write_text(manifest)
        engine.load(folder)
        assert engine.checkpoint == expected


def test_a_broken_model_or_adapter_is_one_error_that_names_it(
    engine: TransformersEngine, tiny_model: Callable[..., Any], tiny_folder: Path, tmp_path: Path
) -> None:
    weights, config = (tiny_folder / name for name in ("model.safetensors", "config.json"))
    whole = load_file(weights)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in whole.items() if key != name}, weights, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=f"tiny cannot be loaded from .*1 weights are missing, {name}"):
        TransformersEngine(tiny_folder, name="tiny")
    weights.write_bytes(b"123456789")
    with pytest.raises(ModelLoadError, match="tiny cannot be loaded"):
        TransformersEngine(tiny_folder, name="tiny")
    weights.unlink()
    with pytest.raises(ModelLoadError, match="tiny cannot be loaded"):
        TransformersEngine(tiny_folder, name="tiny")
    config.write_text("{")
    with pytest.raises(ModelLoadError, match="tiny cannot be loaded"):
        TransformersEngine(tiny_folder, name="tiny")
    adapter = tmp_path / "adapter"
    with_adapter(tiny_model()).save_pretrained(adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"123456789")
    with pytest.raises(CheckpointError, match="does not fit"):
        engine.load(adapter)
    assert engine.generate(prompts_of(engine, "a"), [GREEDY])


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(CheckpointError, match="bf17"):
        pick_dtype("bf17", torch.device("cpu"))


@pytest.mark.model
def test_smollm2_greedy_and_logprobs(smollm2: Path) -> None:
    engine = TransformersEngine(smollm2, name="smollm2-135m", dtype="float32")
    prompts = prompts_of(engine, "What is 2 + 2?", "Name three colours.", "Say hello.", "Why?")
    params = SamplingParams(temperature=0.0, max_tokens=20)
    for prompt, completion in zip(prompts, engine.generate(prompts, [params] * 4), strict=True):
        assert list(completion.token_ids) == reference(engine.network, prompt, params, set(engine.renderer.stop_ids))
        expected = forward_logprobs(engine.network, prompt, completion.token_ids)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-3, rtol=1e-3)
