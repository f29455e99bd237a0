"""Attention sequence by sequence gives what a block mask over the whole row gives, gradients included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from distill.adapters import add_lora
from distill.attention import IMPLEMENTATION, Layout, packed_attention
from distill.backbone import Backbone
from distill.chunked import chunked_divergence
from distill.config import LoraSettings
from distill.objective import forward_kl
from distill.packing import Packed, Sample, attention_mask, pack
from distill.teacher import FrozenTeacher

CONFIG = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()


def packed(lengths: list[int], offset: int = 0) -> Packed:
    samples = [Sample(str(i), (1,), (1,), (2,) * (n - 1), (True,) * (n - 1)) for i, n in enumerate(lengths)]
    return pack([(1,)] * len(samples), samples, offset=offset)


def layer(number: int) -> torch.nn.Module:
    module = torch.nn.Module()
    module.layer_idx = number
    return module


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    prefix=st.sampled_from([0, 1, 7]),
    seed=st.integers(0, 99),
    grad=st.booleans(),
    apart=st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_it_equals_attention_under_the_block_mask(
    lengths: list[int], prefix: int, seed: int, grad: bool, apart: bool
) -> None:
    torch.manual_seed(seed)
    row = sum(lengths)
    query = torch.randn(1, 4, row, 8, requires_grad=grad)
    key, value = (torch.randn(1, 2, prefix + row, 8, requires_grad=grad) for _ in range(2))
    if apart:  # the prefix comes with the layout, or stands before the layer's own keys and values
        other = (torch.zeros(1, 2, prefix, 8),) * 2
        layout = Layout(tuple(lengths), states=[other, (key[:, :, :prefix], value[:, :, :prefix])])
        handed = (key[:, :, prefix:], value[:, :, prefix:])
    else:
        layout, handed = Layout(tuple(lengths), grown=prefix), (key, value)
    got, _ = packed_attention(layer(1), query, *handed, None, layout=layout, scaling=0.3)
    mask = attention_mask(packed(lengths, prefix), prefix=prefix)
    wide = [t.repeat_interleave(2, dim=1) for t in (key, value)]
    want = scaled_dot_product_attention(query, *wide, attn_mask=mask, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    if grad:
        weights = torch.randn_like(want)
        ours = torch.autograd.grad((got * weights).sum(), (query, key, value))
        theirs = torch.autograd.grad((want * weights).sum(), (query, key, value))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_in_bfloat16_the_joined_parts_err_no_more_than_one_softmax() -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 4, 20, 64)
    key, value = torch.randn(1, 2, 320, 64), torch.randn(1, 2, 320, 64)
    layout = Layout((12, 8), grown=300)
    exact, _ = packed_attention(torch.nn.Module(), query, key, value, None, layout=layout)
    half = [t.bfloat16() for t in (query, key, value)]
    joined, _ = packed_attention(torch.nn.Module(), *half, None, layout=layout)
    mask = attention_mask(packed([12, 8], 300), prefix=300)
    one = scaled_dot_product_attention(half[0], *(t.repeat_interleave(2, 1) for t in half[1:]), attn_mask=mask)
    error = (joined.float() - exact).abs().max()
    usual = (one.transpose(1, 2).float() - exact).abs().max()
    assert error <= 1.5 * usual


def test_under_autocast_a_cached_and_packed_step_is_the_plain_one_in_lower_precision() -> None:
    backbone = Backbone(llama())
    teacher = FrozenTeacher(backbone)
    samples = [Sample(str(i), (3, i + 1), (9,) * 20 + (3, i + 1), (5, 6, 7), (True,) * 3) for i in range(3)]
    row = pack([s.student_prompt for s in samples], samples)

    def loss() -> torch.Tensor:
        teacher.cache.clear()
        teacher.prepare([s.teacher_prompt for s in samples])
        hidden_RD = teacher.hidden(samples)
        student_RD = backbone.hidden(row)[row.predict_R]
        return chunked_divergence(student_RD, backbone.head_VD, hidden_RD, teacher.head_VD, forward_kl)[0].mean()

    plain = loss()
    with torch.autocast("cpu", torch.bfloat16):
        low = loss()
    assert low != plain
    torch.testing.assert_close(low, plain, rtol=0.05, atol=1e-4)
    low.backward()
    assert backbone.head_VD.grad is not None
    assert backbone.head_VD.grad.dtype == torch.float32


def test_without_a_layout_the_model_is_as_with_sdpa() -> None:
    model, ids = llama(), torch.arange(12).reshape(2, 6)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        want = model(ids, attention_mask=mask).logits
        Backbone(model)
        assert model.config._attn_implementation == IMPLEMENTATION
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, want, rtol=0, atol=0)
        generated = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        model.config._attn_implementation = "sdpa"
        assert torch.equal(generated, model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False))


def test_gradient_checkpointing_carries_the_layout_into_its_second_forward() -> None:
    model = llama().train()
    backbone, row = Backbone(model), packed([5, 4, 6])

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        backbone.hidden(row).square().sum().backward()
        return [p.grad.clone() for p in model.model.layers.parameters()]

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(gradients(), plain)


def test_a_model_that_keeps_the_layout_to_itself_gets_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LlamaAttention.forward

    def deaf(self, *args, layout=None, **kwargs):
        return forward(self, *args, **kwargs)

    model, row = llama(), packed([5, 4])
    want = Backbone(model).hidden(row)
    monkeypatch.setattr(LlamaAttention, "forward", deaf)
    model.config._attn_implementation = "sdpa"
    backbone = Backbone(model)
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(backbone.hidden(row), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_beside_weights_in_bfloat16_an_adapter_multiplies_in_bfloat16_and_learns_in_float32(
    checkpointing: bool,
) -> None:
    student = add_lora(llama().bfloat16(), LoraSettings(rank=4, alpha=8), 0).train()
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    if checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        student.enable_input_require_grads()
    row, trained = packed([5, 4, 6]), [p for p in student.parameters() if p.requires_grad]
    probe = torch.randn(15, 32)
    saved: list[torch.Tensor] = []

    def gradients(backbone: Backbone) -> list[torch.Tensor]:
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            loss = (backbone.hidden(row).float() * probe).sum()
        return list(torch.autograd.grad(loss, trained))

    backbone = Backbone(student)
    mixed = gradients(backbone)
    bytes_mixed = sum(t.nbytes for t in saved)
    backbone._mixed = False  # PEFT's own way
    plain = gradients(backbone)
    assert {g.dtype for g in mixed} == {torch.float32}
    ours, theirs = torch.cat([g.flatten() for g in mixed]), torch.cat([g.flatten() for g in plain])
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.99
    assert torch.linalg.vector_norm(ours - theirs) < 0.1 * torch.linalg.vector_norm(theirs)
    if not checkpointing:
        assert bytes_mixed < 0.9 * sum(t.nbytes for t in saved)
