"""An engine in this process: any causal language model that transformers loads, on a CPU or a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from agent.constraint import Vocabulary
from agent.engines.base import Completion, check_length
from agent.engines.cache import PastStore
from agent.engines.decode import Decoder, Limits
from agent.engines.folders import check_folder, identity, is_adapter
from agent.engines.lora import merged
from agent.episode import SamplingParams
from agent.errors import CheckpointError, ModelLoadError, load_fault
from agent.renderer import Renderer

_FALLBACK_CONTEXT = 4096
_REUSE_TOKENS = 65_536
_CPU_PREFILL = 1_024  # from here on a CPU's matrix products get no faster
#: What transformers, PEFT and safetensors raise over files that are missing, broken, of another model or contradictory.
_BAD_FILES = (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError, StrictDataclassError)


class TransformersEngine:
    """Samples with a transformers model. See `agent.engines.base.Engine` for the contract.

    Args:
        model: a Hugging Face folder or id, or a causal language model that is loaded already.
        tokenizer: its tokenizer; None loads it from the same folder.
        name: the base model's name as the user gave it.
        device: "auto" is the first GPU, or the CPU.
        dtype: "auto" is bfloat16 where the device computes in it, else float32.
        max_batch: the most rows decoded together.
        batch_tokens: the most tokens (rows times the longest row) whose keys and values are held together.
        reuse_tokens: how many tokens' keys and values are kept between calls, so that the next turn of an
            episode costs only its new tokens. 0 keeps none.
        merge: "auto" merges a LoRA adapter into the weights while sampling; False never does.

    Raises:
        ModelLoadError: the folder's configuration, weights or tokenizer are missing, broken or incomplete.
        ChatTemplateError: the tokenizer has no usable chat template.
    """

    def __init__(
        self,
        model: str | Path | torch.nn.Module,
        tokenizer: Any = None,
        *,
        name: str,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        max_batch: int = 64,
        batch_tokens: int = 131_072,
        reuse_tokens: int = _REUSE_TOKENS,
        merge: Literal["auto"] | bool = "auto",
    ) -> None:
        self.model = name
        self.checkpoint: str | None = None
        self._source = None if isinstance(model, torch.nn.Module) else str(model)
        self._device = pick_device(device)
        self._dtype = pick_dtype(dtype, self._device)
        self._merge = merge is not False
        self._wrapped = False
        self._steady = False  # inside `steady`
        self._stack = ExitStack()
        try:
            self._base: Any = model if isinstance(model, torch.nn.Module) else self._load_weights(str(model))
            if tokenizer is None:
                source = self._source or getattr(self._base.config, "_name_or_path", "")
                tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except Exception as error:  # tokenizers raises nothing narrower over a file of another form
            raise ModelLoadError(f"model {name} cannot be loaded from {self._source}: {load_fault(error)}") from error
        self.network: Any = self._base  # what is sampled from: the base model, or an adapter around it
        self.tokenizer = tokenizer
        self.renderer = Renderer(tokenizer)
        prefill_tokens = _CPU_PREFILL if self._device.type == "cpu" else Limits.prefill_tokens
        self.limits = Limits(max_batch=max_batch, batch_tokens=batch_tokens, prefill_tokens=prefill_tokens)
        self._reuse_tokens = reuse_tokens
        self._store = self._new_store()

    @classmethod
    def wrap(cls, model: torch.nn.Module, tokenizer: Any, *, name: str, **options: Any) -> TransformersEngine:
        """An engine around a model that is being trained, a PEFT model for one: samples from its current weights.

        Every call sees the weights as they are then, leaves them bitwise unchanged, and leaves the model in the
        mode (train or eval) it was in. Keys and values are kept inside `steady` only. `load` is refused.
        """
        engine = cls(model, tokenizer, name=name, **options)
        engine._wrapped, engine._store = True, None
        return engine

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Inside, a model that is being trained stays as it is, from one call to the next.

        Its adapter is merged once, not at every call, and keys and values are kept between calls. Afterwards every
        weight is bitwise what it was. Not for training, nor for switching adapters.
        """
        if not self._wrapped or self._steady:
            yield
            return
        with merged(self.network) if self._merge else nullcontext():
            self._store, self._steady = self._new_store(), True
            try:
                yield
            finally:
                self._store, self._steady = None, False

    @property
    def max_context(self) -> int:
        """Longest prompt plus completion, in tokens."""
        config = self.network.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or _FALLBACK_CONTEXT)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]) -> list[Completion]:
        """Continue every prompt; results in the order of the prompts.

        Raises:
            ContextLengthError: a prompt plus its max_tokens exceeds max_context.
            ConstraintError: a prompt's choices cannot be written with the model's tokens.
            EngineFailedError: the model's logits are not numbers.
        """
        for prompt, params in zip(prompts, sampling, strict=True):
            check_length(self, prompt, params.max_tokens)
        if not prompts:
            return []
        with self._sampling():
            vocabulary = self._vocabulary if any(params.choices for params in sampling) else None
            return Decoder(self.network, self._stop_ids, self.limits, self._store, vocabulary).run(prompts, sampling)

    def load(self, checkpoint: Path | None) -> None:
        """Sample from this checkpoint folder from now on; None is the base model.

        A folder with `adapter_config.json` is a LoRA adapter of the base model; one with `config.json` is a whole
        model. Both in safetensors. `checkpoint` becomes the id in its manifest, or the folder's name without one.

        Raises:
            CheckpointError: the folder holds neither, or does not fit, or this engine wraps a model in training.
        """
        if self._wrapped:
            raise CheckpointError(
                "this engine samples from a model that is being trained and cannot load a checkpoint; "
                "make an engine from the base model instead"
            )
        if checkpoint is not None:
            check_folder(checkpoint)
        self._unload()
        if checkpoint is None:
            return
        try:
            if is_adapter(checkpoint):
                self.network = PeftModel.from_pretrained(self._base, str(checkpoint)).eval()
                if self._merge:
                    self._stack.enter_context(merged(self.network))
            else:
                if self._source is not None:
                    self._base = None  # two whole models may not fit; the base is loaded again when asked for
                self.network = self._load_weights(str(checkpoint))
        except _BAD_FILES as error:
            self._unload()
            raise CheckpointError(f"checkpoint {checkpoint} does not fit {self.model}: {error}") from error
        self.checkpoint = identity(checkpoint)

    def close(self) -> None:
        """Free the model's memory. A model that was handed in is left as it was."""
        self._stack.close()
        if self._store is not None:
            self._store.clear()
        if isinstance(self.network, PeftModel) and not self._wrapped and self._base is not self.network:
            self.network.unload()
        self.network = self._base = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _unload(self) -> None:
        self._stack.close()
        self._stack = ExitStack()
        if self._store is not None:
            self._store.clear()
        if self.network is not self._base and isinstance(self.network, PeftModel):
            self._base = self.network.unload()
        self.network = None
        if self._base is None:
            self._base = self._load_weights(str(self._source))
        self.network = self._base
        self.checkpoint = None

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self.tokenizer)

    @property
    def _stop_ids(self) -> frozenset[int]:
        generation = getattr(self.network, "generation_config", None)
        eos = getattr(generation, "eos_token_id", None)
        extra = eos if isinstance(eos, list) else [] if eos is None else [eos]
        return self.renderer.stop_ids | frozenset(extra)

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """Eval mode, no gradients, a wrapped adapter merged; everything as before afterwards."""
        training = [module for module in self.network.modules() if module.training]
        with ExitStack() as stack:
            if self._wrapped and self._merge and not self._steady:
                stack.enter_context(merged(self.network))
            for module in training:
                module.training = False
            try:
                with torch.inference_mode():
                    yield
            finally:
                for module in training:
                    module.training = True

    def _new_store(self) -> PastStore | None:
        return PastStore(self._reuse_tokens) if self._reuse_tokens else None

    def _load_weights(self, source: str) -> Any:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=self._dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        model, report = loaded
        if missing := sorted(report["missing_keys"]):  # transformers would go on with random numbers in their place
            raise ValueError(f"{len(missing)} weights are missing, {missing[0]} for one")
        return model.to(self._device).eval()


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """The first GPU where there is one, else the CPU; anything but "auto" is taken as it is."""
    if device != "auto":
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """bfloat16 where `device` computes in it (GPU, AVX512-BF16, AMX), else float32, unless a dtype is named."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype):
            raise CheckpointError(f"unknown dtype {dtype!r}; use auto, bfloat16, float16 or float32")
        return found
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32
