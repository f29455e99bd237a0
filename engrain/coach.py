"""The coach: another model that reads the episodes and writes down what they teach, here or on a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.engines.base import Engine
from agent.models.resolve import resolve


def parts(coach: str) -> tuple[str, str | None]:
    """`MODEL` or `MODEL@URL` as model and URL. The model names the tokenizer, so it is needed with a URL too."""
    model, at, url = coach.partition("@http")
    return model, f"http{url}" if at else None


@contextmanager
def open_coach(coach: str, find: Callable[[str], Path] = resolve) -> Iterator[Engine]:
    """An engine for `MODEL` (in this process) or `MODEL@URL` (an OpenAI-compatible server), closed at the end.

    Args:
        coach: short name, folder or hub id; with `@http...` the base URL of a server that serves it.
        find: the model's folder; fetches it where needed.

    Raises:
        EngrainError: there is no such model, it does not load, or its server cannot be used.
    """
    model, url = parts(coach)
    engine: Engine
    if url is None:
        from agent.engines.transformers import TransformersEngine

        engine = TransformersEngine(find(model), name=model)
    else:
        from engrain.servers import connect

        engine = connect(model, [url], find)
    try:
        yield engine
    finally:
        engine.close()
