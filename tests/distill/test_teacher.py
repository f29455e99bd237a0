"""Packing and the prefix cache change the cost, never the numbers."""

from __future__ import annotations

import logging
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
)

from distill.adapters import add_lora
from distill.backbone import Backbone
from distill.config import LoraSettings
from distill.errors import UnsupportedModelError, VocabularyMismatchError
from distill.packing import Sample, micro_batches, pack
from distill.teacher import FrozenTeacher, PrefixCache, check_vocabulary

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def llama():
    return LlamaForCausalLM(LlamaConfig(**SMALL))


def mistral():
    return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=6, head_dim=8))


def gemma3():
    config = Gemma3TextConfig(
        **SMALL,
        head_dim=8,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"] * 1 + ["sliding_attention"],
    )
    return Gemma3ForCausalLM(config)


FAMILIES = {"llama": llama, "mistral": mistral, "gemma3": gemma3}


@pytest.fixture(scope="module", params=list(FAMILIES))
def backbone(request: pytest.FixtureRequest) -> Backbone:
    torch.manual_seed(1)
    return Backbone(FAMILIES[request.param]().eval())


def ids(seed: int, n: int) -> tuple[int, ...]:
    return tuple(torch.randint(0, 64, (n,), generator=torch.Generator().manual_seed(seed)).tolist())


def sample(number: int, prefix: tuple[int, ...], question: int, reply: int, *, turns: bool = False) -> Sample:
    mask = [True] * reply
    if turns and reply > 3:
        mask[reply // 2] = False  # an env's token in the middle of an episode
    return Sample(
        f"e{number}", ids(number, question), prefix + ids(number, question), ids(number + 50, reply), tuple(mask)
    )


def alone(model, prompt: tuple[int, ...], one: Sample) -> torch.Tensor:
    """Log-probs at the sampled positions from the model's own full forward of one unpadded sequence."""
    sequence = torch.tensor([[*prompt, *one.continuation]])
    logits = model(input_ids=sequence, use_cache=False).logits[0]
    where = [len(prompt) + i - 1 for i, m in enumerate(one.mask) if m]
    return logits[where].log_softmax(-1)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prefix=st.integers(0, 40),
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=5),
    cached=st.booleans(),
)
def test_packed_and_cached_scores_equal_a_full_forward(backbone: Backbone, prefix, sizes, cached) -> None:
    shared = ids(999, prefix)
    samples = [sample(i, shared, q, r, turns=True) for i, (q, r) in enumerate(sizes)]
    teacher = FrozenTeacher(backbone, use_cache=cached)
    teacher.prepare([s.teacher_prompt for s in samples])
    with torch.no_grad():
        ours = (teacher.hidden(samples) @ teacher.head_VD.T).log_softmax(-1)
        theirs = torch.cat([alone(backbone.model, s.teacher_prompt, s) for s in samples])
        packed = pack([s.student_prompt for s in samples], samples)
        student = (backbone.hidden(packed)[packed.predict_R] @ backbone.head_VD.T).log_softmax(-1)
        bare = torch.cat([alone(backbone.model, s.student_prompt, s) for s in samples])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(student, bare, rtol=1e-4, atol=1e-4)


def test_with_lora_the_teacher_is_the_base_however_far_the_student_moved() -> None:
    torch.manual_seed(2)
    base = llama().eval()
    samples = [sample(i, ids(999, 20), 4, 6) for i in range(3)]
    expected = torch.cat([alone(base, s.teacher_prompt, s) for s in samples])
    student = add_lora(base, LoraSettings(rank=4), seed=0)
    teacher = FrozenTeacher(Backbone(student))
    teacher.prepare([s.teacher_prompt for s in samples])
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if "lora_B" in name:
                weight.add_(0.5)
    torch.testing.assert_close(
        (teacher.hidden(samples) @ teacher.head_VD.T).log_softmax(-1), expected, rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(alone(student, samples[0].teacher_prompt, samples[0]), expected[:6], atol=1e-2)


def test_the_prefix_is_computed_once_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    teacher = FrozenTeacher(Backbone(llama().eval()))
    samples = [sample(i, ids(999, 60), 4, 6) for i in range(6)]
    teacher.prepare([s.teacher_prompt for s in samples])
    read = []
    forward = teacher.backbone.hidden
    monkeypatch.setattr(
        teacher.backbone, "hidden", lambda p, c=None: read.append(p.input_ids_1T.numel()) or forward(p, c)
    )
    for one in samples:
        teacher.hidden([one])
    assert read == [4 + 6] * 6
    assert teacher.cache is not None
    assert teacher.cache.bytes == 3 * 2 * 2 * 8 * 60 * 4  # layers x (k, v) x heads x width x tokens x float32


def test_several_texts_keep_one_entry_each_least_recently_used_out_first() -> None:
    torch.manual_seed(3)
    backbone = Backbone(llama().eval())
    one = 3 * 2 * 2 * 8 * 30 * 4
    cache = PrefixCache(backbone, max_bytes=2 * one)
    jobs = {seed: [ids(seed, 30) + (1,) * 2, ids(seed, 30) + (2,) * 2] for seed in (1, 2, 3)}
    with torch.no_grad():
        for seed in (1, 2, 1, 3):  # 1 is used again, so 2 leaves for 3
            assert cache.best(jobs[seed])[0] == 30
        assert cache.bytes == 2 * one
        assert cache.best([jobs[1][0]])[0] == 30
        assert cache.best([jobs[2][0]])[0] < 30


def test_a_restored_teacher_splits_prompts_as_the_one_before_did() -> None:
    """Entries come from the batches seen: without them a run that goes on would score with other last bits."""
    backbone = Backbone(llama().eval())
    knowledge = ids(7, 20)
    first, second = ([sample(3 * n + i, (*knowledge, *ids(n, n)), 4, 5) for i in range(2)] for n in (1, 9))
    before = FrozenTeacher(backbone)
    before.hidden(first)
    after, fresh = FrozenTeacher(backbone), FrozenTeacher(backbone)
    after.restore(before.state())
    assert after.state().keys() == before.state().keys() != {}  # also when it is saved again before it is used
    prompts = [one.teacher_prompt for one in second]
    assert fresh.prepare(prompts) == 29
    assert before.prepare(prompts) == after.prepare(prompts) == 20
    assert torch.equal(before.hidden(second), after.hidden(second))
    assert before.cache.prefixes == after.cache.prefixes
    before.restore({})  # of a run that had no prefixes yet
    assert before.prepare(prompts) == 29


def test_an_entry_over_the_bound_is_used_but_not_kept(caplog: pytest.LogCaptureFixture) -> None:
    backbone = Backbone(llama().eval())
    cache = PrefixCache(backbone, max_bytes=10)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        length, held = cache.best([(*ids(1, 30), 1), (*ids(1, 30), 2)])
    assert length == 30
    assert held[0][0].shape[2] == 30
    assert cache.bytes == 0
    assert "not kept" in caplog.text


def test_a_model_that_forgets_its_cache_is_read_in_full_with_the_reason_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Forgetful(LlamaModel):
        def forward(self, *args, past_key_values=None, **kwargs):
            if past_key_values is not None and past_key_values.get_seq_length():
                past_key_values.layers[0].values = torch.zeros_like(past_key_values.layers[0].values)
            return super().forward(*args, past_key_values=past_key_values, **kwargs)

    torch.manual_seed(4)
    model = llama().eval()
    backbone = Backbone(model)
    samples = [sample(i, ids(999, 30), 4, 6) for i in range(3)]
    want = FrozenTeacher(backbone).hidden(samples)
    model.model.__class__ = Forgetful
    with caplog.at_level(logging.WARNING):
        teacher = FrozenTeacher(backbone)
    assert teacher.cache is None
    assert "cached states give other results" in caplog.text
    torch.testing.assert_close(teacher.hidden(samples), want, rtol=1e-4, atol=1e-4)


def test_logits_that_are_not_head_times_hidden_are_refused() -> None:
    class Capped(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = torch.tanh(output.logits * 30)
            return output

    torch.manual_seed(0)
    with pytest.raises(UnsupportedModelError, match="Capped"):
        Backbone(Capped(LlamaConfig(**SMALL)))


def test_other_vocabularies_are_named(tiny_tokenizer) -> None:
    import copy

    other = copy.deepcopy(tiny_tokenizer)
    other.add_tokens(["<extra>"])
    check_vocabulary(tiny_tokenizer, tiny_tokenizer)
    with pytest.raises(VocabularyMismatchError, match="<extra>"):
        check_vocabulary(tiny_tokenizer, other)


@given(st.lists(st.integers(1, 30), max_size=12), st.integers(1, 40), st.integers(0, 20))
def test_micro_batches_keep_order_and_budget(sizes: list[int], budget: int, cached: int) -> None:
    samples = [sample(i, ids(1, 20), 1, size) for i, size in enumerate(sizes)]
    groups = list(micro_batches(samples, budget, cached))
    assert [s.episode_id for g in groups for s in g] == [s.episode_id for s in samples]
    assert all(len(g) == 1 or sum(s.reads(cached) for s in g) <= budget for g in groups)
    for group, after in pairwise(groups):  # none could have been larger
        assert sum(s.reads(cached) for s in group) + after[0].reads(cached) > budget


def test_a_cached_prefix_takes_no_room_in_a_micro_batch() -> None:
    torch.manual_seed(4)
    teacher = FrozenTeacher(Backbone(llama().eval()))
    samples = [sample(i, ids(7, 100), 4, 6) for i in range(5)]
    cached = teacher.prepare([s.teacher_prompt for s in samples])
    assert cached == 100
    assert len(list(micro_batches(samples, 60, cached))) == 1
    assert len(list(micro_batches(samples, 60, 0))) == 5


def test_the_prefix_is_cached_also_while_the_student_trains_with_gradient_checkpointing() -> None:
    torch.manual_seed(4)
    student = add_lora(llama().eval(), LoraSettings(rank=4), seed=0)
    samples = [sample(i, ids(999, 30), 4, 6) for i in range(3)]
    plain = FrozenTeacher(Backbone(student), use_cache=False).hidden(samples)
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    student.enable_input_require_grads()
    student.train()
    teacher = FrozenTeacher(Backbone(student))
    student.train()
    teacher.prepare([s.teacher_prompt for s in samples])
    assert teacher.cache is not None
    assert teacher.cache.bytes > 0
    torch.testing.assert_close(teacher.hidden(samples), plain, rtol=1e-4, atol=1e-4)
    assert student.training
