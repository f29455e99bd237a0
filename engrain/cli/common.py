"""What several commands share: options, and how the names a user writes become things."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from envs.errors import UsageError
from memory.records import CheckpointRecord, Knowledge
from memory.store import Store

if TYPE_CHECKING:
    from agent.engines.transformers import TransformersEngine

EnvArgument = Annotated[
    str, typer.Argument(metavar="ENV", help="World: math, textworld, frozenlake, sokoban, or a registered one.")
]
OptionsOption = Annotated[
    list[str] | None, typer.Option("--option", "-o", metavar="KEY=VALUE", help="World option; give several.")
]
ModelOption = Annotated[str, typer.Option("--model", "-m", help="Short name, model folder or hub id.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Fixes tasks, sampling and initial weights.")]
StoreOption = Annotated[
    str | None, typer.Option("--store", envvar="ENGRAIN_STORE", help="Store: a file or a postgresql:// URL.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DEFAULT_MODEL = "qwen2.5-coder-0.5b"


def world_options(given: Sequence[str] | None) -> dict[str, str]:
    """`key=value` words as a mapping.

    Raises:
        UsageError: a word has no `=`.
    """
    options = {}
    for word in given or ():
        key, sign, value = word.partition("=")
        if not sign or not key:
            raise UsageError(f"-o {word!r} is not key=value; write for instance -o convention=answer_tag")
        options[key.strip()] = value
    return options


def open_store(url: str | None, *, create: bool = True) -> Store:
    """The store named on the command line, or the default one."""
    from engrain.settings import default_store_url

    return Store.open(url or default_store_url(), create=create)


@contextmanager
def open_engine(model: str) -> Iterator[TransformersEngine]:
    """The model's engine, fetched and loaded with progress shown, closed at the end."""
    from rich.console import Console

    from agent.engines.transformers import TransformersEngine
    from engrain.cli.model import resolve_with_bar

    path = resolve_with_bar(model)
    with Console(stderr=True).status(f"loading {model} …"):
        engine = TransformersEngine(path, name=model)
    try:
        yield engine
    finally:
        engine.close()


def find_knowledge(given: str, store: Store) -> Knowledge:
    """A stored knowledge version (`3`, or its id), or the text of a file.

    Raises:
        UsageError: it is neither.
    """
    path = Path(given)
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"knowledge file {given} cannot be read: {error}") from error
        if not text:
            raise UsageError(f"knowledge file {given} is empty; write the text that shall stand in the system message")
        from memory.records import digest

        return Knowledge(id=digest(text), items=(), text=text, tokens=0)
    if given.isdigit() and any(version.version == int(given) for version in store.knowledge_versions()):
        return store.knowledge(int(given))
    return store.knowledge(store.full_id("knowledge", given))


def find_checkpoint(given: str, store: Store) -> CheckpointRecord:
    """A stored checkpoint by its id, or by the beginning of one; or a checkpoint folder.

    Raises:
        UsageError: there is none.
    """
    folder = Path(given)
    if not folder.is_dir():
        return store.checkpoint(store.full_id("checkpoint", given))
    from distill.checkpoint import read_manifest

    manifest = read_manifest(folder)
    return CheckpointRecord(id=manifest.id, model=manifest.model, path=str(folder), kind=manifest.kind)


def load_checkpoint(engine: TransformersEngine, checkpoint: CheckpointRecord | None) -> None:
    """Let the engine sample from a checkpoint of its own model.

    Raises:
        UsageError: the checkpoint belongs to another model.
    """
    if checkpoint is None:
        return
    if checkpoint.model != engine.model:
        raise UsageError(f"checkpoint {checkpoint.id} is of {checkpoint.model}, not {engine.model}; pass --model")
    engine.load(Path(checkpoint.path))
    engine.checkpoint = checkpoint.id
