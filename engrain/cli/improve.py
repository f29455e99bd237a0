"""`engrain improve`: one round of self-improvement, from play to a judged checkpoint."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from engrain.cli.checkpoints import KEEP, BudgetOption
from engrain.cli.common import (
    DEFAULT_MODEL,
    SAMPLER_SHARE,
    BaseUrlOption,
    EngineName,
    EngineOption,
    JsonOption,
    OptionsOption,
    RayOption,
    SeedOption,
    StoreOption,
    SyncOption,
    check_engines,
    check_room,
    find_knowledge,
    open_engine,
    open_players,
    open_sampler,
    open_store,
    printable,
    writable_folder,
)
from engrain.cli.common import world_options as parse_options
from engrain.cli.launched import TrackOption, joined
from engrain.cli.planned import show_plan
from engrain.cli.reporting import HostOption, LogOption, PortOption, news
from envs.errors import UsageError

if TYPE_CHECKING:
    from engrain.config import ImproveConfig
    from engrain.rounds import RoundResult


def command(
    env: Annotated[str | None, typer.Argument(metavar="[ENV]", help="World to learn; not with --demo.")] = None,
    option: OptionsOption = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Short name, model folder or hub id.")] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="The demo's world and settings: 6 to 25 minutes on 2 cores.")
    ] = False,
    config: Annotated[
        Path | None, typer.Option("--config", help="JSON or TOML file with all settings of the round.")
    ] = None,
    knowledge: Annotated[
        str | None,
        typer.Option(
            "--knowledge",
            "-k",
            help="Knowledge version, its id, or a text file to distil as it is; nothing is extracted.",
        ),
    ] = None,
    extraction: Annotated[
        str | None, typer.Option(help="How episodes are read: examples, paper or contrastive.")
    ] = None,
    coach: Annotated[
        str | None,
        typer.Option(metavar="MODEL[@URL]", help="Another model that reads the episodes, here or on a chat server."),
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="forward_kl (default), reverse_kl (the paper), jsd, skew_kl or topk; on-policy.")
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
    looks: Annotated[
        int | None, typer.Option(min=1, max=10, help="Batches of them, with a test after each; 1 plays all of them.")
    ] = None,
    engine: EngineOption = EngineName.TRANSFORMERS,
    base_url: BaseUrlOption = None,
    ray: RayOption = None,
    sync_every: SyncOption = None,
    seed: SeedOption = 0,
    forever: Annotated[bool, typer.Option("--forever", help="Round after round, each on new tasks.")] = False,
    every: Annotated[
        str | None, typer.Option(metavar="TIME", help="With --forever: a round begins this often at most, as in 6h.")
    ] = None,
    min_episodes: Annotated[
        int | None,
        typer.Option(min=1, help="With --forever: wait for so many new episodes of the world from elsewhere."),
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option(min=0, help=f"With --forever: how many checkpoints stay that nothing needs; {KEEP} if not given."),
    ] = None,
    disk_budget: BudgetOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the settings, estimate memory and time, and change nothing.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Give up an unfinished round instead of going on.")] = False,
    store: StoreOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.json and curve.png; the round's own if not given.")
    ] = None,
    track: TrackOption = None,
    log_json: LogOption = False,
    metrics_port: PortOption = None,
    metrics_host: HostOption = "127.0.0.1",
    as_json: JsonOption = False,
) -> None:
    """Play, extract experience, distil it into the weights, and keep the result only if it is better.

    A round that was interrupted goes on where it stopped when the same command is run again. With --forever checkpoints
    that nothing needs are removed after each round, as `engrain checkpoints prune` does it.
    """
    from distill.distributed import world as processes
    from distill.replicas import ReplicatedEngine, dismiss
    from engrain.cli.model import resolve_with_bar
    from engrain.coach import check_coach
    from engrain.config import ImproveConfig
    from engrain.demo import demo_config
    from engrain.forever import Schedule, Series, run_forever, seconds, size
    from engrain.lease import LoopLease
    from engrain.loop import Round
    from engrain.report import write
    from engrain.retention import plan, prune
    from engrain.rounds import RoundTasks, open_round
    from engrain.settings import round_dir, runs_dir
    from engrain.stopping import stopping

    if sum((env is not None, demo, config is not None)) != 1:
        raise UsageError(
            "say what to learn: a world (engrain improve math -o convention=json), --demo, or --config FILE"
        )
    if config is not None and (model is not None or option or seed):
        raise UsageError("--config holds model, seed and world options: change them there, or leave out --config")
    if demo and option:
        raise UsageError("--demo has a world of its own: leave out -o, or name a world instead of --demo")
    if not forever and any(given is not None for given in (every, min_episodes, keep, disk_budget)):
        raise UsageError(
            "--every, --min-episodes, --keep and --disk-budget belong to --forever: add it, or leave them out "
            "(engrain checkpoints prune removes checkpoints by hand)"
        )
    check_engines(engine, base_url, ray=ray, sync_every=sync_every)
    if knowledge is not None and (extraction is not None or coach is not None):
        raise UsageError("--knowledge is distilled as it is, nothing is extracted: leave out --extraction and --coach")
    if forever and out is not None:
        raise UsageError("--out is one round's folder: leave it out with --forever, every round has its own")
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
    _override(settings, sync_every=sync_every or None)
    settings["extract"] |= {k: v for k, v in (("mode", extraction), ("coach", coach)) if v is not None}
    if max_tokens is not None:
        for part in (settings["play"], settings["evaluation"], settings["distill"]):
            part["sampling"]["max_tokens"] = max_tokens
    if train_tasks is not None:
        settings["play"]["tasks"] = train_tasks
        settings["play"]["episodes"] = min(train_tasks, settings["play"]["episodes"])
    for name, count in (("validation_tasks", validation_tasks), ("test_tasks", test_tasks), ("looks", looks)):
        if count is not None:
            settings["evaluation"][name] = count
    if knowledge is not None:
        settings["knowledge"] = knowledge
    chosen = ImproveConfig.model_validate(settings)
    if forever and chosen.knowledge is not None:
        raise UsageError(f"--forever finds its own knowledge: leave it out, or leave out knowledge {chosen.knowledge}")
    if dry_run:
        show_plan(chosen, as_json=as_json)
        return
    RoundTasks.draw(chosen)  # before a round is opened or a model is loaded
    writable_folder(out or runs_dir(), "--out" if out else "ENGRAIN_HOME")
    if joined(chosen.model, track=track):
        return
    if chosen.extract.coach:
        check_coach(chosen.extract.coach, resolve_with_bar)

    rounds = Schedule(every=seconds(every) if every is not None else 0.0, min_episodes=min_episodes or 0)
    budget = size(disk_budget) if disk_budget is not None else None
    checks: list[Callable[[], None]] = []

    def check() -> None:
        for one in checks:
            one()

    with ExitStack() as stack:
        memory = stack.enter_context(open_store(store))
        text = None
        if chosen.knowledge is not None and not memory.unfinished_round(chosen.model):
            text = find_knowledge(chosen.knowledge, memory)
        lease = stack.enter_context(LoopLease(memory, chosen.model))
        checks.append(lease.check)
        told = stack.enter_context(
            news(
                chosen.model,
                quiet=as_json,
                log_json=log_json,
                metrics_host=metrics_host,
                metrics_port=metrics_port,
                check=lease.check,
            )
        )
        if memory.unfinished_round(chosen.model):  # one of other settings is said before a model is loaded
            open_round(memory, Series.of(memory, chosen).next if forever else chosen, fresh=fresh)
            fresh = False
        trained, sampler, players = stack.enter_context(open_engine(chosen.model)), None, None
        check_room(trained, text)
        if ray is not None:
            share = SAMPLER_SHARE if ray == "local" else 0.9
            players = stack.enter_context(open_players(chosen.model, ray, engine, memory_share=share))
        elif base_url or engine is not EngineName.TRANSFORMERS:
            sampler = stack.enter_context(
                open_sampler(chosen.model, engine, base_url, trainable=True, memory_share=SAMPLER_SHARE)
            )
        elif processes() > 1:
            sampler = ReplicatedEngine(trained)
        stop = stack.enter_context(stopping())
        checks.append(stop.check)

        def play(wanted: ImproveConfig, fresh: bool = False) -> RoundResult:
            """One round, from wherever it stands."""
            record = open_round(memory, wanted, fresh=fresh)
            told.begin(record)
            folder = round_dir(record.id)
            listener, target = told.listener(check), out or folder
            result = Round(
                memory,
                trained,
                wanted,
                record,
                folder,
                listener,
                sampler=sampler,
                synced=bool(sync_every),
                players=players,
                track=track or (),
                on_result=lambda found: write(found, wanted, target),
            ).run()
            told.end(result)
            places = {"report": target / "report.json", "curve": target / "curve.png", "weights": folder}
            _show(result, wanted, places, memory.url, as_json=as_json, line=forever, quiet=log_json)
            return result

        if not forever:
            play(chosen, fresh)
            dismiss()
            return

        def clean() -> None:
            retention = plan(memory, keep=KEEP if keep is None else keep, budget=budget)
            prune(memory, retention)
            told.disk(retention.kept_bytes, retention.freed_bytes, retention.over_budget)

        run_forever(memory, chosen, rounds, play, clean, check=check, told=told, fresh=fresh)


def _show(
    result: RoundResult,
    config: ImproveConfig,
    places: dict[str, Path],
    store: str,
    *,
    as_json: bool,
    line: bool,
    quiet: bool,
) -> None:
    from engrain.report import summary, table

    if as_json:
        typer.echo(json.dumps(summary(result, config), indent=None if line else 2, ensure_ascii=False))
        return
    if quiet:
        return
    _print(Console(highlight=False), result, table(result), summary(result, config), config)
    console = Console(stderr=True)
    for name, place in places.items():
        if place.exists():
            console.print(f"[dim]{name:<8}{escape(str(place))}[/]", soft_wrap=True)
    console.print(f"[dim]store   {escape(store)}[/]", soft_wrap=True)


def _print(console: Console, result: Any, view: Any, facts: dict[str, Any], config: Any) -> None:
    console.print()
    if result.evaluations:
        console.print(view)
    if result.knowledge is not None:
        whose = "as the model wrote it and validation chose it" if config.knowledge is None else "as it was given"
        console.print(f"\n[bold]Knowledge, {whose}[/]")
        console.print(printable(result.knowledge.text), markup=False)
    if facts["recovery"] is not None:
        console.print(f"\nrecovery of the in-context gap: [bold]{facts['recovery']:.0%}[/]")
    method, objective = facts["method"], facts["objective"]
    if method != "opcd":
        console.print(f"method: {method}, objective: {objective}")
    elif objective != "reverse_kl":
        console.print(f"objective: {objective}, on-policy; the paper's on the same budget: --objective reverse_kl")
    word = "[green]promoted[/]" if facts["promoted"] else f"[yellow]{result.status}, not promoted[/]"
    console.print(f"{word}: {escape(printable(result.reason))}")
    console.print(f"{result.seconds:.0f} s")


def _override(settings: dict[str, Any], **given: Any) -> None:
    settings["distill"] |= {key: value for key, value in given.items() if value is not None}


def _read(path: Path) -> dict[str, Any]:
    from engrain.config import ImproveConfig

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} cannot be read: {error}") from error
    if path.suffix.lower() == ".toml":
        try:
            return ImproveConfig.model_validate(tomllib.loads(text)).model_dump(mode="json")
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"--config {path} is not TOML: {error}") from error
    return ImproveConfig.model_validate_json(text).model_dump(mode="json")
