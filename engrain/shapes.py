"""What a model's configuration says of its size, without its weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from agent.models.catalog import CATALOG
from agent.models.errors import ModelNotCachedError, UnknownModelError
from agent.models.resolve import resolve

_SECONDS = 5.0  # that the hub gets for a configuration


class Shape(BaseModel):
    """Sizes of a decoder-only transformer with a gated feed-forward and grouped key-value heads."""

    model_config = ConfigDict(frozen=True)

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head: int  # dimensions of a head
    inner: int  # of the feed-forward
    vocabulary: int
    tied: bool
    context: int

    @property
    def linear(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of a layer's linear maps: q, k, v, o, gate, up, down."""
        d, q, kv, i = self.hidden, self.heads * self.head, self.kv_heads * self.head, self.inner
        return ((d, q), (d, kv), (d, kv), (q, d), (d, i), (d, i), (i, d))

    @property
    def parameters(self) -> int:
        """All weights: embeddings, the head unless tied, L layers of linear maps and two norms."""
        layer = sum(a * b for a, b in self.linear) + 2 * self.hidden
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.layers * layer + self.hidden

    @property
    def worked(self) -> int:
        """Weights that a token is multiplied with: all but the embeddings that it is looked up in."""
        return self.parameters - (0 if self.tied else self.vocabulary * self.hidden)

    def adapter(self, rank: int) -> int:
        """Weights of a LoRA adapter on all linear maps but the head: rank (in + out) each."""
        return self.layers * rank * sum(a + b for a, b in self.linear)


def _shape(*numbers: int, tied: bool) -> Shape:
    names = ("layers", "hidden", "heads", "kv_heads", "head", "inner", "vocabulary", "context")
    return Shape(**dict(zip(names, numbers, strict=True)), tied=tied)


#: For when a configuration cannot be had from here; each stands in the model's own config.json.
KNOWN: Mapping[str, Shape] = {
    "Qwen/Qwen3-1.7B": _shape(28, 2048, 16, 8, 128, 6144, 151936, 40960, tied=True),
    "Qwen/Qwen3-4B-Instruct-2507": _shape(36, 2560, 32, 8, 128, 9728, 151936, 262144, tied=True),
    "Qwen/Qwen3-8B": _shape(36, 4096, 32, 8, 128, 12288, 151936, 40960, tied=False),
    "Qwen/Qwen2.5-7B-Instruct": _shape(28, 3584, 28, 4, 128, 18944, 152064, 32768, tied=False),
    "meta-llama/Llama-3.2-3B-Instruct": _shape(28, 3072, 24, 8, 128, 8192, 128256, 131072, tied=True),
    "meta-llama/Llama-3.1-8B-Instruct": _shape(32, 4096, 32, 8, 128, 14336, 128256, 131072, tied=False),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _shape(30, 576, 9, 3, 64, 1536, 49152, 8192, tied=True),
    "Qwen/Qwen2.5-Coder-0.5B-Instruct": _shape(24, 896, 14, 2, 64, 4864, 151936, 32768, tied=True),
    "Qwen/Qwen2.5-Coder-1.5B-Instruct": _shape(28, 1536, 12, 2, 128, 8960, 151936, 32768, tied=True),
}


def shape_of(model: str) -> tuple[Shape | None, str]:
    """A model's sizes and where they come from; None where nothing here knows them.

    Looks into a folder or the cache, asks the hub for `config.json` (never for weights) unless HF_HUB_OFFLINE is set,
    and falls back on `KNOWN`.

    Raises:
        UnknownModelError: `model` is no short name, folder or hub id.
    """
    hub_id = CATALOG[model].hub_id if model in CATALOG else model
    try:
        return _read((resolve(model, fetch=False, weights=False) / "config.json").read_text()), "the model's own config"
    except UnknownModelError:
        raise
    except (ModelNotCachedError, OSError, ValueError, KeyError):
        pass
    text = None if model in CATALOG else fetch_config(hub_id)
    if text is not None:
        try:
            return _read(text), "config.json of the hub"
        except (ValueError, KeyError, TypeError):
            return None, "its configuration is of no form that is known here"
    if hub_id in KNOWN:
        return KNOWN[hub_id], "numbers kept here; its config.json could not be fetched"
    return None, "its config.json could not be fetched, and its sizes are not kept here"


def fetch_config(hub_id: str) -> str | None:
    """`config.json` from the hub; None where it cannot be had."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in {"1", "true", "yes", "on"}:
        return None
    import httpx2
    from huggingface_hub import get_token, hf_hub_url

    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        url = hf_hub_url(hub_id, "config.json")
        answer = httpx2.get(url, headers=headers, timeout=_SECONDS, follow_redirects=True)
    except (httpx2.HTTPError, OSError, ValueError):
        return None
    return answer.text if answer.status_code == 200 else None


def _read(text: str) -> Shape:
    given: dict[str, Any] = json.loads(text)
    given = {**given, **(given.get("text_config") or {})}
    heads, hidden = int(given["num_attention_heads"]), int(given["hidden_size"])
    return Shape(
        layers=given["num_hidden_layers"],
        hidden=hidden,
        heads=heads,
        kv_heads=given.get("num_key_value_heads") or heads,
        head=given.get("head_dim") or hidden // heads,
        inner=given["intermediate_size"],
        vocabulary=given["vocab_size"],
        tied=bool(given.get("tie_word_embeddings", False)),
        context=given["max_position_embeddings"],
    )
