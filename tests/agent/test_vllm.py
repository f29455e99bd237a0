"""The vLLM engine against the transformers engine, with the real SmolLM2-135M; one start for all tests.

Both compute in float32, where the two agree to a few digits and a token that differs is a fault.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agent.constraint import Vocabulary, allowed_ids
from agent.engines.base import Completion, StreamingEngine
from agent.engines.transformers import TransformersEngine
from agent.episode import Episode, FinishReason, Message, SamplingParams
from agent.errors import CheckpointError, ConstraintError, ContextLengthError
from distill.config import DistillConfig, LoraSettings
from engrain.consolidate import consolidate
from envs import registry
from envs.base import Split
from envs.errors import UsageError
from memory.records import Knowledge

psutil = pytest.importorskip("psutil")
pytest.importorskip("vllm", exc_type=(ImportError, RuntimeError))

from agent.engines.vllm import VllmEngine  # noqa: E402

pytestmark = [pytest.mark.model, pytest.mark.timeout(1200)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=16)
QUESTIONS = ("What is the capital of France?", "Count from one to five.", "Name a colour.", "Say hello.")
RULES = "You are playing a game. " + "Look at every room, take what you need, and never walk into the dark. " * 8


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Iterator[VllmEngine]:
    before = os.environ.get("LD_PRELOAD"), torch.set_num_threads, random.getstate()
    engine = VllmEngine(smollm2, name="smollm2-135m", dtype="float32", max_context=1024, max_batch=8, cache_bytes=2**28)
    assert (os.environ.get("LD_PRELOAD"), torch.set_num_threads, random.getstate()) == before
    yield engine
    engine.close()
    engine.close()
    mine = psutil.Process()
    assert not [child for child in mine.children(recursive=True) if "VLLM" in child.name() or "vllm" in child.name()]


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(smollm2, name="smollm2-135m", dtype="float32")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def adapter(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter that changes what is said."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    folder = tmp_path_factory.mktemp("adapters") / "adapter-1"
    model.save_pretrained(folder)
    return folder


def prompts_of(engine: Any, *texts: str, system: str = "") -> list[list[int]]:
    rules = [Message(role="system", content=system)] if system else []
    return [engine.renderer.prompt([*rules, Message(role="user", content=text)]) for text in texts]


def teacher_forced(engine: TransformersEngine, prompt: list[int], ids: tuple[int, ...]) -> torch.Tensor:
    """The transformers model's log-probabilities of every token at the positions of `ids`, T x V."""
    with torch.no_grad():
        logits_TV = engine.network(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    return logits_TV.float().log_softmax(-1)


def check_against(reference: TransformersEngine, prompt: list[int], said: Completion, *, greedy: bool) -> None:
    """Ids and log-probabilities are the transformers model's."""
    logp_TV = teacher_forced(reference, prompt, said.token_ids)
    ids = torch.tensor(said.token_ids)
    expected = logp_TV.gather(1, ids[:, None]).squeeze(1)
    torch.testing.assert_close(torch.tensor(said.logprobs), expected, atol=2e-3, rtol=1e-3)
    if greedy:
        best, second = logp_TV.topk(2, dim=-1).values.unbind(-1)
        clear = best - second > 5e-3
        assert clear.sum() > len(ids) // 2
        assert torch.equal(logp_TV.argmax(-1)[clear], ids[clear])


def test_greedy_ids_and_logprobs_are_those_of_transformers(engine: VllmEngine, reference: TransformersEngine) -> None:
    assert isinstance(engine, StreamingEngine)
    prompts = prompts_of(engine, *QUESTIONS)
    assert prompts == prompts_of(reference, *QUESTIONS)
    ours, theirs = engine.generate(prompts, [GREEDY] * 4), reference.generate(prompts, [GREEDY] * 4)
    for prompt, said, expected in zip(prompts, ours, theirs, strict=True):
        check_against(reference, prompt, said, greedy=True)
        assert said.token_ids == expected.token_ids
        assert said.finish_reason is expected.finish_reason


def test_the_end_of_turn_is_the_last_id(engine: VllmEngine) -> None:
    prompts = prompts_of(engine, "Say hello.")
    said = engine.generate(prompts, [SamplingParams(temperature=0.0, max_tokens=200)])[0]
    assert said.finish_reason is FinishReason.STOP
    assert said.token_ids[-1] == engine.renderer.end_of_turn
    assert len(said.token_ids) == len(said.logprobs)
    short = engine.generate(prompts, [SamplingParams(temperature=0.0, max_tokens=2)])[0]
    assert short.finish_reason is FinishReason.LENGTH
    assert short.token_ids == said.token_ids[:2]


def test_a_seed_repeats_a_request_whoever_else_runs(engine: VllmEngine, reference: TransformersEngine) -> None:
    prompts = prompts_of(engine, *QUESTIONS)
    sampling = [SamplingParams(temperature=0.7, top_p=0.9, max_tokens=8, seed=seed) for seed in (1, 2, 3, 2**63 - 1)]
    together = engine.generate(prompts, sampling)
    again = engine.generate(prompts[::-1], sampling[::-1])[::-1]
    assert [said.token_ids for said in again] == [said.token_ids for said in together]
    assert engine.generate(prompts[:1], sampling[:1])[0].token_ids == together[0].token_ids
    other = engine.generate(prompts[:1] * 8, [SamplingParams(max_tokens=8, seed=seed) for seed in range(8)])
    assert len({said.token_ids for said in other}) > 1
    check_against(reference, prompts[0], other[0], greedy=False)  # untempered, unfiltered
    check_against(reference, prompts[0], together[0], greedy=False)


def test_prompts_that_begin_alike_are_cached(engine: VllmEngine) -> None:
    first, second = prompts_of(engine, "Where am I?", "What is in the fridge?", system=RULES)
    shared = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    said = engine.generate([first], [GREEDY])[0]
    cached = engine.generate([second], [GREEDY])[0].cached_tokens
    assert shared - 32 <= cached <= shared  # whole blocks
    turn = [*first, *said.token_ids, *engine.renderer.bridge([], "You are in the kitchen.", ended=False)]
    assert engine.generate([turn], [GREEDY])[0].cached_tokens >= len(first) - 32


def test_seeded_prompts_of_more_tokens_than_one_pass_takes(engine: VllmEngine) -> None:
    prompts = prompts_of(engine, *(f"{number} and then " * 130 for number in range(6)))
    assert sum(map(len, prompts)) > 2500  # vLLM's own limit of a pass is 2048 tokens
    sampling = [SamplingParams(max_tokens=2, seed=seed) for seed in range(6)]
    together = engine.generate(prompts, sampling)
    assert engine.generate(prompts[-1:], sampling[-1:])[0].token_ids == together[-1].token_ids


def test_requests_come_and_go_while_others_run(engine: VllmEngine) -> None:
    prompts = prompts_of(engine, *QUESTIONS)
    long = engine.submit(prompts[0], SamplingParams(temperature=0.0, max_tokens=24))
    assert engine.poll() == []
    short = engine.submit(prompts[1], SamplingParams(temperature=0.0, max_tokens=2))
    dropped = engine.submit(prompts[2], SamplingParams(temperature=0.0, max_tokens=100))
    assert engine.pending == 3
    between = engine.generate(prompts[3:], [SamplingParams(temperature=0.0, max_tokens=4)])[0]
    assert len(between.token_ids) == 4
    engine.cancel([dropped, 10_000])
    with pytest.raises(CheckpointError, match="under way"):
        engine.load(None)
    done: dict[int, Any] = {}
    deadline = time.monotonic() + 300
    while engine.pending and time.monotonic() < deadline:
        done |= dict(engine.poll(0.5))
    assert list(done) == [short, long]
    assert len(done[short].token_ids) == 2
    assert done[long].token_ids == engine.generate(prompts[:1], [GREEDY])[0].token_ids + done[long].token_ids[16:]
    assert engine.poll(1.0) == []


def test_an_interrupted_call_leaves_nothing_under_way(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of(engine, *QUESTIONS[:2])
    step, steps = engine._step, iter(range(3))

    def interrupted() -> None:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        step()

    monkeypatch.setattr(engine, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts, [GREEDY] * 2)
    monkeypatch.undo()
    assert engine.pending == 0
    engine.load(None)
    assert len(engine.generate(prompts, [GREEDY] * 2)) == 2


def test_bad_requests_are_refused(engine: VllmEngine) -> None:
    assert engine.max_context == 1024
    with pytest.raises(ContextLengthError, match="1024 tokens of smollm2-135m"):
        engine.generate([[1] * 1020], [GREEDY])
    with pytest.raises(ContextLengthError, match="empty"):
        engine.submit([], GREEDY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._vocabulary, "_ids", {})
        with pytest.raises(ConstraintError, match="can be written"):
            engine.submit([1], SamplingParams(choices=("north",)))
    assert engine.pending == 0


def test_an_adapter_changes_replies_and_goes_again(
    engine: VllmEngine, reference: TransformersEngine, adapter: Path
) -> None:
    prompts = prompts_of(engine, *QUESTIONS[:2])
    base = engine.generate(prompts, [GREEDY] * 2)
    engine.load(adapter)
    assert engine.checkpoint == "adapter-1"
    changed = engine.generate(prompts, [GREEDY] * 2)
    assert all(said.cached_tokens == 0 for said in changed)  # keys and values of the old weights are not used
    assert [said.token_ids for said in changed] != [said.token_ids for said in base]
    reference.load(adapter)
    try:
        for prompt, said in zip(prompts, changed, strict=True):
            check_against(reference, prompt, said, greedy=True)
    finally:
        reference.load(None)
    engine.load(None)
    assert engine.checkpoint is None
    assert [said.token_ids for said in engine.generate(prompts, [GREEDY] * 2)] == [said.token_ids for said in base]


def test_a_checkpoint_that_does_not_fit_leaves_the_base_model(
    engine: VllmEngine, tiny_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    prompts = prompts_of(engine, QUESTIONS[0])
    base = engine.generate(prompts, [GREEDY])[0]
    with pytest.raises(CheckpointError, match="does not fit"):
        engine.load(tiny_folder)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    (broken / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="broken does not fit smollm2-135m"):
        engine.load(broken)
    assert engine.checkpoint is None
    assert engine.generate(prompts, [GREEDY])[0].token_ids == base.token_ids


def test_restricted_replies_have_the_same_mask_as_in_transformers(
    engine: VllmEngine, reference: TransformersEngine, smollm2: Path
) -> None:
    vocabulary = Vocabulary(engine.tokenizer)
    choices = ("go east", "go", 'read "sign"', "take the red apple", "öffne Tür")
    prompt = prompts_of(engine, "You may go. Which way?")[0]
    params = [SamplingParams(max_tokens=32, seed=seed, choices=choices, temperature=1.5) for seed in range(6)]
    for said in engine.generate([prompt] * 6, params):
        assert engine.renderer.decode(said.token_ids) in choices
        assert said.finish_reason is FinishReason.STOP
        logp_TV = teacher_forced(reference, prompt, said.token_ids)
        masks = allowed_ids(vocabulary, choices, said.token_ids)
        for logp_V, allowed, id_, logprob in zip(logp_TV, masks, said.token_ids, said.logprobs, strict=True):
            among = logp_V[list(allowed)].log_softmax(-1)  # another mask would normalise over other ids
            assert logprob == pytest.approx(float(among[allowed.index(id_)]), abs=5e-3)
    _same_masks_as_xgrammar(vocabulary, engine.tokenizer, choices)


def _same_masks_as_xgrammar(vocabulary: Vocabulary, tokenizer: Any, choices: tuple[str, ...]) -> None:
    """Our masks and those of the library that vLLM restricts with, along every choice, cut in several ways."""
    xgr = pytest.importorskip("xgrammar")
    from vllm.v1.structured_output.utils import choice_as_grammar

    size = len(tokenizer)
    compiler = xgr.GrammarCompiler(xgr.TokenizerInfo.from_huggingface(tokenizer, vocab_size=size))
    grammar = compiler.compile_grammar(choice_as_grammar(list(choices)))
    by_text = {text: id_ for id_, text in vocabulary.bytes.items()}
    for choice in choices:
        cuts = (tokenizer(choice)["input_ids"], [by_text[bytes([byte])] for byte in choice.encode()])
        for ids in cuts:
            matcher = xgr.GrammarMatcher(grammar, override_stop_tokens=list(vocabulary.ends))
            for id_, allowed in zip(
                [*ids, vocabulary.ends[0]], allowed_ids(vocabulary, choices, [*ids, 2]), strict=True
            ):
                bitmask = xgr.allocate_token_bitmask(1, size)
                matcher.fill_next_token_bitmask(bitmask)
                bits = ((bitmask[0].unsqueeze(1) >> torch.arange(32)) & 1).flatten()[:size]
                assert tuple(bits.nonzero().squeeze(1).tolist()) == allowed
                assert matcher.accept_token(id_)


def test_training_samples_from_it_with_the_weights_of_the_moment(
    engine: VllmEngine, reference: TransformersEngine, tmp_path: Path
) -> None:
    settings = DistillConfig(
        steps=3,
        batch_size=2,
        learning_rate=1e-2,
        save_every=2,
        sync_every=2,
        lora=LoraSettings(rank=2, alpha=2),
        sampling=SamplingParams(max_tokens=4),
    )
    tasks = registry.world("math", {}).tasks(Split.TRAIN, 4, 0)
    knowledge = Knowledge(id="k", items=(), text="Answer in French, in capital letters.", tokens=0)
    episodes: list[Episode] = []
    fit = consolidate(reference, tasks, knowledge, settings, tmp_path, sampler=engine, on_episode=episodes.append)
    assert [metrics.staleness for metrics in fit.history] == [0, 1, 0]
    assert [e.checkpoint for e in episodes] == [None] * 4 + [f"{tmp_path.name}@2"] * 2
    samples = [
        (
            list(e.token_ids[: e.prompt_length]),
            np.array(e.token_ids[e.prompt_length :]),
            np.array(e.logprobs[e.prompt_length :]),
        )
        for e in episodes
    ]

    def furthest(some: list[Any]) -> float:
        """Between what was said to be a token's log-probability and what transformers makes of it now."""
        return max(
            float(abs(teacher_forced(reference, prompt, ids)[range(len(ids)), ids].numpy() - logprobs).max())
            for prompt, ids, logprobs in some
        )

    try:
        assert furthest(samples[:4]) < 5e-3  # the base model's
        assert furthest(samples[4:]) > 0.05
        reference.load(tmp_path / "step-000002")
        assert furthest(samples[4:]) < 5e-3  # those of two steps
    finally:
        reference.load(None)
        engine.load(None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it can")
def test_sleep_on_a_cpu_is_refused_in_one_line(engine: VllmEngine) -> None:
    assert not engine.can_sleep
    with pytest.raises(UsageError, match="cannot sleep on a CPU"):
        engine.sleep()
    engine.wake()
