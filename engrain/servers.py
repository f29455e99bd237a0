"""Engines on servers, with what the environment says about key, patience and time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from agent.engines.server import ServerEngine
from agent.errors import ModelLoadError, ServerRefusedError, load_fault
from agent.models.resolve import resolve
from engrain.settings import Settings


def _without_weights(model: str) -> Path:
    return resolve(model, weights=False)


def connect(
    model: str, urls: Sequence[str], find: Callable[[str], Path] = _without_weights, *, trainable: bool = False
) -> ServerEngine:
    """An engine that samples `model` on servers.

    Args:
        model: short name, folder or hub id; its tokenizer is read here, its weights are not.
        urls: base URLs of OpenAI-compatible servers that serve it.
        find: the model's folder; fetches it where needed.
        trainable: refuse servers that do not return token ids, because what they play cannot be trained on.

    Raises:
        UsageError: there is no such model, or a server cannot be used.
        ServerFailedError: no server answers.
    """
    from transformers import AutoTokenizer

    settings = Settings()
    folder = find(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # tokenizers raises nothing narrower over a file of another form
        raise ModelLoadError(f"the tokenizer of {model} cannot be loaded from {folder}: {load_fault(error)}") from error
    engine = ServerEngine(
        urls,
        tokenizer,
        name=model,
        aliases=[str(folder)],
        api_key=settings.api_key.get_secret_value(),
        timeout=settings.server_timeout,
        patience=settings.server_patience,
    )
    if trainable and not engine.exact:
        engine.close()
        raise ServerRefusedError(
            f"{', '.join(urls)}: a server does not return token ids, and training needs them; use `vllm serve`"
        )
    return engine
