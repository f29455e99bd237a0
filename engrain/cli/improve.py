"""`engrain improve`: one round of self-improvement, from play to a judged checkpoint."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from engrain.cli.common import (
    DEFAULT_MODEL,
    EngineName,
    EngineOption,
    JsonOption,
    OptionsOption,
    SeedOption,
    StoreOption,
    open_engine,
    open_sampler,
    open_store,
)
from engrain.cli.common import world_options as parse_options
from engrain.cli.launched import TrackOption, joined
from engrain.errors import RoundConflictError
from envs.errors import UsageError

_SAMPLER_SHARE = 0.45  # of a GPU's memory, while training and sampling share it


def command(
    env: Annotated[str | None, typer.Argument(metavar="[ENV]", help="World to learn; not with --demo.")] = None,
    option: OptionsOption = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Short name, model folder or hub id.")] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="The demo's world and settings: about ten minutes, 2 cores.")
    ] = False,
    config: Annotated[Path | None, typer.Option("--config", help="JSON file with all settings of the round.")] = None,
    extraction: Annotated[
        str | None, typer.Option(help="How episodes are read: examples, paper or contrastive.")
    ] = None,
    coach: Annotated[
        str | None,
        typer.Option(metavar="MODEL[@URL]", help="Another model that reads the episodes, here or on a server."),
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="reverse_kl (the paper), forward_kl, jsd, skew_kl or topk; on-policy, exact.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Episodes a training step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the LoRA adapter.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens a turn.")] = None,
    train_tasks: Annotated[int | None, typer.Option(min=1, help="Tasks that training draws from.")] = None,
    validation_tasks: Annotated[
        int | None, typer.Option(min=1, help="Tasks that choose knowledge and checkpoint.")
    ] = None,
    test_tasks: Annotated[int | None, typer.Option(min=1, help="Held-out tasks that judge the result.")] = None,
    engine: EngineOption = EngineName.TRANSFORMERS,
    seed: SeedOption = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Give up an unfinished round instead of going on.")] = False,
    store: StoreOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.json and curve.png; the round's own if not given.")
    ] = None,
    track: TrackOption = None,
    as_json: JsonOption = False,
) -> None:
    """Play, extract experience, distil it into the weights, and keep the result only if it is better.

    A round that was interrupted goes on where it stopped when the same command is run again.
    """
    from filelock import FileLock, Timeout

    from engrain.cli.model import resolve_with_bar
    from engrain.coach import parts
    from engrain.config import ImproveConfig
    from engrain.console import ConsoleListener
    from engrain.consolidate import dismiss
    from engrain.demo import demo_config
    from engrain.loop import Round
    from engrain.report import summary, table, write
    from engrain.rounds import RoundTasks, open_round
    from engrain.settings import runs_dir

    if sum((env is not None, demo, config is not None)) != 1:
        raise UsageError(
            "say what to learn: a world (engrain improve math -o convention=json), --demo, or --config FILE"
        )
    if config is not None and (model is not None or option or seed):
        raise UsageError("--config holds model, seed and world options: change them there, or leave out --config")
    if demo and option:
        raise UsageError("--demo has a world of its own: leave out -o, or name a world instead of --demo")
    if config is not None:
        settings = _read(config)
    elif demo:
        settings = demo_config(model=model or DEFAULT_MODEL, seed=seed).model_dump(mode="json")
    else:
        world = {"env": env, "options": parse_options(option)}
        base = ImproveConfig.model_validate({"model": model or DEFAULT_MODEL, "world": world, "seed": seed})
        settings = base.model_dump(mode="json")
        settings["evaluation"]["ood"] = [{**world, "split": "ood"}]
        settings["distill"]["seed"] = seed
    _override(settings, objective=objective, steps=steps, batch_size=batch_size, learning_rate=learning_rate)
    settings["extract"] |= {k: v for k, v in (("mode", extraction), ("coach", coach)) if v is not None}
    if max_tokens is not None:
        for part in (settings["play"], settings["evaluation"], settings["distill"]):
            part["sampling"]["max_tokens"] = max_tokens
    if train_tasks is not None:
        settings["play"]["tasks"] = train_tasks
        settings["play"]["episodes"] = min(train_tasks, settings["play"]["episodes"])
    for name, count in (("validation_tasks", validation_tasks), ("test_tasks", test_tasks)):
        if count is not None:
            settings["evaluation"][name] = count
    chosen = ImproveConfig.model_validate(settings)
    RoundTasks.draw(chosen)  # before a round is opened or a model is loaded
    if joined(chosen.model, chosen.distill.teacher, track):
        return
    if chosen.extract.coach:
        resolve_with_bar(parts(chosen.extract.coach)[0])

    console = Console(stderr=True)
    with open_store(store) as memory:
        record = open_round(memory, chosen, fresh=fresh)
        folder = runs_dir() / f"round-{record.id}"
        runs_dir().mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise RoundConflictError(
                f"round {record.number} of {chosen.model} is being played by another process; wait for it, or stop it"
            ) from None
        with ExitStack() as stack:
            stack.enter_context(lock)
            trained, sampler = stack.enter_context(open_engine(chosen.model)), None
            if engine is not EngineName.TRANSFORMERS:
                sampler = stack.enter_context(open_sampler(chosen.model, engine, memory_share=_SAMPLER_SHARE))
            listener = stack.enter_context(ConsoleListener(console, quiet=as_json))
            result = Round(memory, trained, chosen, record, folder, listener, sampler=sampler, track=track or ()).run()
        dismiss()
        target = out or folder
        report = write(result, chosen, target)
        if as_json:
            typer.echo(json.dumps(summary(result, chosen), indent=2, ensure_ascii=False))
            return
        _print(Console(highlight=False), result, table(result), summary(result, chosen), chosen)
        places = {"report": report, "curve": target / "curve.png", "weights": folder}
        for name, place in places.items():
            if place.exists():
                console.print(f"[dim]{name:<8}{place}[/]", soft_wrap=True)
        console.print(f"[dim]store   {memory.url}[/]", soft_wrap=True)


def _print(console: Console, result: Any, view: Any, facts: dict[str, Any], config: Any) -> None:
    console.print()
    if result.evaluations:
        console.print(view)
    if result.knowledge is not None:
        console.print("\n[bold]Knowledge, as the model wrote it and validation chose it[/]")
        console.print(result.knowledge.text, markup=False)
    if facts["recovery"] is not None:
        console.print(f"\nrecovery of the in-context gap: [bold]{facts['recovery']:.0%}[/]")
    if config.distill.objective != "reverse_kl":
        console.print(
            f"objective: {config.distill.objective}, on-policy; the paper's on the same budget: --objective reverse_kl"
        )
    word = "[green]promoted[/]" if facts["promoted"] else f"[yellow]{result.status}, not promoted[/]"
    console.print(f"{word}: {result.reason}")
    console.print(f"{result.seconds:.0f} s")


def _override(settings: dict[str, Any], **given: Any) -> None:
    settings["distill"] |= {key: value for key, value in given.items() if value is not None}


def _read(path: Path) -> dict[str, Any]:
    from engrain.config import ImproveConfig

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} cannot be read: {error}") from error
    return ImproveConfig.model_validate_json(text).model_dump(mode="json")
