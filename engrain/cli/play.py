"""`engrain play`: watch the agent, play yourself, decide together, or compare; see what the knowledge would change."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from agent.episode import SamplingParams
from engrain.cli.common import (
    DEFAULT_MODEL,
    AdmissibleOption,
    BaseUrlOption,
    EngineName,
    EngineOption,
    JsonOption,
    ModelOption,
    OptionsOption,
    StoreOption,
    check_room,
    find_checkpoint,
    find_knowledge,
    open_sampler,
    open_store,
    world_options,
)
from engrain.cli.play_input import Keyboard
from engrain.cli.play_looks import Closer
from engrain.cli.play_menu import pick_seat, pick_world
from engrain.cli.play_screen import Labelled, Plain, Screen
from engrain.cli.play_sitting import Sitting
from engrain.cli.play_web import check_web, serve_games
from engrain.cli.serving import HostOption, PortOption
from engrain.compare import Arm, arms_of, newest_checkpoint, newest_knowledge, parent_of
from engrain.match import AgentMatch
from engrain.play import LeftError, any_seed, draw_tasks, load
from envs.base import Split, Task
from envs.errors import UsageError
from memory.errors import UnknownIdError
from memory.records import CheckpointRecord, Knowledge
from memory.store import Store


@dataclass(frozen=True)
class _Asked:
    """What the command line says about the agent, in its own words."""

    model: str
    env: str
    options: dict[str, str]
    checkpoint: str | None
    knowledge: str | None
    against: str | None
    gap: bool
    why: bool


def command(
    env: Annotated[
        str | None,
        typer.Argument(metavar="[ENV]", help="World: math, textworld, frozenlake, sokoban, or a registered one."),
    ] = None,
    option: OptionsOption = None,
    human: Annotated[bool, typer.Option("--human", help="Play yourself, without a model.")] = False,
    co: Annotated[
        bool, typer.Option("--co", help="The agent suggests each reply; Enter takes it, or type your own.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="The same games bare, with the knowledge, and distilled.")
    ] = False,
    gap: Annotated[
        bool, typer.Option("--gap", help="How much likelier the knowledge makes each token of a reply.")
    ] = False,
    why: Annotated[bool, typer.Option("--why", help="Which items of the knowledge moved a reply.")] = False,
    model: ModelOption = DEFAULT_MODEL,
    checkpoint: Annotated[str | None, typer.Option(help="Checkpoint id from the store, or a folder.")] = None,
    knowledge: Annotated[
        str | None, typer.Option("--knowledge", "-k", help="The agent reads it: a version, its id, or a text file.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="What --gap and --why ask about. Default: --knowledge, else the last round's of this world."),
    ] = None,
    split: Annotated[
        Split | None, typer.Option(help="Which tasks. Default: train, which the next round learns from.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", min=0, max=2**63 - 1, help="Fixes tasks and sampling. Default: 0; with a person a new one."
        ),
    ] = None,
    episodes: Annotated[int, typer.Option("--episodes", "-n", min=1, help="How many tasks to play.")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens a turn.")] = 256,
    admissible: AdmissibleOption = False,
    engine: EngineOption = EngineName.TRANSFORMERS,
    base_url: BaseUrlOption = None,
    plain: Annotated[
        bool,
        typer.Option("--plain", envvar="ENGRAIN_PLAIN", help="One fact a line, nothing else: for screen readers."),
    ] = False,
    web: Annotated[
        bool, typer.Option("--web", help="In the browser: prints an address. You play; with --co the agent suggests.")
    ] = False,
    host: HostOption = None,
    port: PortOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Watch the agent play, play yourself, or decide together. Every game is stored for the next round to learn from.

    Without ENV a menu asks. While you play, /help lists what else can be typed; Ctrl-C leaves, and what was played is
    kept. With --web and without ENV the page lists the worlds, with the options that rounds of the store had.
    """
    _check(
        human,
        co,
        compare,
        gap or why,
        against,
        checkpoint if knowledge is None else knowledge,
        engine,
        base_url,
        as_json,
    )
    if web:
        check_web(env, option, None if co else knowledge or checkpoint, compare or gap or why, episodes, as_json)
    elif host is not None or port is not None:
        raise UsageError("--host and --port are where --web listens: add it, or leave them out")
    screen = _screen(plain, as_json)
    keyboard = Keyboard(screen, editing=not plain)
    with _hang_up():
        try:
            if env is None and not web:
                if as_json:
                    raise UsageError("--json asks nothing: name the world, for instance `engrain play math --json`")
                env = pick_world(keyboard)
                if not (human or co or compare or gap or why or knowledge or checkpoint):
                    seat = pick_seat(keyboard)
                    human, co = seat == "play", seat == "both"
        except (LeftError, KeyboardInterrupt):
            raise typer.Exit from None
        asked = _Asked(model, env or "", world_options(option), checkpoint, knowledge, against, gap, why)
        sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens, admissible_only=admissible)
        if web:
            with open_store(store) as opened, ExitStack() as entered:
                agent = None
                if co:
                    text, weights = _found(opened, asked, newest=False)
                    sampler = entered.enter_context(open_sampler(model, engine, base_url))
                    check_room(sampler, text)
                    load(sampler, weights)
                    arm = Arm(_player(text, knowledge, weights), text, weights)

                    def agent(task: Task, seed: int) -> AgentMatch:
                        return Sitting(opened, screen, seed).match(task, sampler, arm, sampling)

                serve_games(opened, env, asked.options, seed, split, agent, host, port)
            return
        if seed is None:
            seed = any_seed() if human or co else 0
        tasks = draw_tasks(asked.env, asked.options, split, episodes, seed)
        with open_store(store) as opened:
            sitting = Sitting(opened, screen, seed)
            if human:
                sitting.by_hand(tasks, keyboard)
            else:
                text, weights = _found(opened, asked, newest=compare)
                parent = parent_of(opened, weights)
                arms = arms_of(text, weights, parent) if compare else []
                looked_at = _looked_at(opened, asked, text) if gap or why else None
                with open_sampler(model, engine, base_url) as sampler:
                    check_room(sampler, text)
                    closer = _closer(asked, looked_at, sampler) if looked_at else None
                    if compare:
                        sitting.compare(tasks, sampler, arms, sampling, closer)
                    else:
                        arm = Arm(_player(text, knowledge, weights), text, weights)
                        sitting.with_agent(tasks, sampler, arm, sampling, keyboard if co else None, closer, parent)
    if as_json:
        typer.echo(json.dumps(sitting.facts, indent=2))
    if sitting.left and not (human or co):
        raise typer.Exit(130)


def _check(
    human: bool,
    co: bool,
    compare: bool,
    looks: bool,
    against: str | None,
    agent: str | None,
    engine: EngineName,
    base_url: list[str] | None,
    as_json: bool,
) -> None:
    """Refuse what does not go together.

    Raises:
        UsageError: naming the two.
    """
    ways = [name for name, given in (("--human", human), ("--co", co), ("--compare", compare)) if given]
    if len(ways) > 1:
        raise UsageError(f"{ways[0]} and {ways[1]} exclude each other: pick one way to play")
    if as_json and (human or co):
        raise UsageError(f"{ways[0]} and --json exclude each other: a player needs to see the game")
    if human and agent is not None:
        raise UsageError("--human plays without a model: leave out --knowledge and --checkpoint")
    if human and looks:
        raise UsageError("--gap and --why look at what a model sampled, and --human plays without one: try --co")
    if against is not None and not looks:
        raise UsageError(f"--against {against} is what --gap and --why ask about: add one of them, or leave it out")
    if looks and (base_url or engine is not EngineName.TRANSFORMERS):
        raise UsageError("--gap and --why need the model in this process: leave out --engine and --base-url")


def _screen(plain: bool, as_json: bool) -> Screen:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot write a character still shows the rest
    if plain:
        os.environ["TERM"] = "dumb"  # for all that draws: no spinner, no bar, no line editing
    console = Console(quiet=as_json, highlight=False, no_color=True if plain else None)
    return Plain(console) if plain else Labelled(console)


def _taught(store: Store, checkpoint: CheckpointRecord | None) -> Knowledge | None:
    """What a checkpoint was taught, if that is still known."""
    if checkpoint is None or checkpoint.knowledge is None:
        return None
    try:
        return store.knowledge(checkpoint.knowledge)
    except UnknownIdError:
        return None


def _found(store: Store, asked: _Asked, *, newest: bool) -> tuple[Knowledge | None, CheckpointRecord | None]:
    """The text that is read and the weights that play; `newest` takes the last round's where none are named."""
    weights = find_checkpoint(asked.checkpoint, store, asked.model) if asked.checkpoint is not None else None
    text = find_knowledge(asked.knowledge, store) if asked.knowledge is not None else None
    if newest:
        weights = weights or newest_checkpoint(store, asked.model, asked.env, asked.options)
        text = text or _taught(store, weights) or newest_knowledge(store, asked.model, asked.env, asked.options)
    return text, weights


def _looked_at(store: Store, asked: _Asked, read: Knowledge | None) -> tuple[Knowledge, str]:
    """What --gap and --why ask about, and what people call it."""
    if asked.against is not None:
        found = find_knowledge(asked.against, store)
        return found, _named(found, asked.against)
    newest = read or newest_knowledge(store, asked.model, asked.env, asked.options)
    if newest is None:
        raise UsageError(
            f"--gap and --why compare with a knowledge, and no round of {asked.model} has chosen one for {asked.env} "
            "with these -o options: pass --knowledge FILE (the agent reads it) or --against FILE (it does not)"
        )
    return newest, _named(newest, asked.knowledge)


def _closer(asked: _Asked, looked_at: tuple[Knowledge, str], engine: Any) -> Closer:
    from engrain.scoring import Scorer

    return Closer(Scorer(engine), *looked_at, gap=asked.gap, why=asked.why)


def _named(knowledge: Knowledge, given: str | None) -> str:
    """What people call a text."""
    if knowledge.version is not None:
        return f"knowledge {knowledge.version}"
    return Path(given).name if given else "the knowledge"


def _player(knowledge: Knowledge | None, given: str | None, checkpoint: CheckpointRecord | None) -> str:
    parts = [f"checkpoint {checkpoint.id[:10]}"] if checkpoint else []
    parts += [f"with {_named(knowledge, given)}"] if knowledge else []
    return ", ".join(parts) or "bare"


@contextmanager
def _hang_up() -> Iterator[None]:
    """A time in which a connection that breaks (SIGHUP) ends the process by unwinding, so that the game is kept."""

    def ended(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGHUP, ended)
    except (AttributeError, ValueError):  # no such signal here, or not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)
