"""`engrain play`: watch the agent play a world turn by turn, or play it yourself."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from agent.episode import Episode, FinishReason, Message, SamplingParams, StopReason, Turn, episode_id
from envs.base import Env, Observation, Split, Step, Task
from envs.errors import UsageError
from envs.registry import make, world
from memory.store import Store


@dataclass(frozen=True)
class _Knowledge:
    text: str | None = None
    id: str | None = None


def command(
    env: Annotated[str, typer.Argument(help="World: math, textworld, frozenlake, sokoban, or a registered one.")],
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="World option, key=value.")] = None,
    model: Annotated[str, typer.Option(help="Short name, model folder or hub id.")] = "qwen2.5-coder-0.5b",
    checkpoint: Annotated[str | None, typer.Option(help="Checkpoint id from the store, or a folder.")] = None,
    knowledge: Annotated[str | None, typer.Option(help="Knowledge id or version, or a text file.")] = None,
    split: Annotated[Split, typer.Option(help="Which tasks.")] = Split.TEST,
    seed: Annotated[int, typer.Option(help="Order of the tasks, and sampling.")] = 0,
    episodes: Annotated[int, typer.Option("--episodes", "-n", min=1, help="How many tasks to play.")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens a turn.")] = 256,
    human: Annotated[bool, typer.Option("--human", help="Play yourself.")] = False,
    store: Annotated[
        str | None, typer.Option("--store", envvar="ENGRAIN_STORE", help="Store: a file or a postgresql:// URL.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the episodes as JSON, nothing else.")] = False,
) -> None:
    """Watch the agent play, turn by turn, or play yourself with --human. Episodes go to the store."""
    if human and as_json:
        raise UsageError("--human and --json exclude each other: a player needs to see the game")
    if human and (knowledge or checkpoint):
        raise UsageError("--human plays without a model: leave out --knowledge and --checkpoint")
    tasks = world(env, _options(option or [])).tasks(split, episodes, seed)
    console = Console(quiet=as_json, highlight=False)
    if store is None:
        from engrain.settings import default_store_url

        store = default_store_url()
    with Store.open(store) as opened:
        if human:
            played = _play_human(tasks, console, opened)
        else:
            known = _knowledge(knowledge, opened)
            sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens)
            played = _play_agent(tasks, console, opened, model, checkpoint, known, sampling, seed)
    if as_json:
        typer.echo(json.dumps([episode.model_dump(mode="json") for episode in played], indent=2))
    elif len(played) > 1:
        solved = sum(episode.success for episode in played)
        console.print(f"[bold]{solved} of {len(played)} solved[/]")


def _play_agent(
    tasks: Sequence[Task],
    console: Console,
    store: Store,
    model: str,
    checkpoint: str | None,
    knowledge: _Knowledge,
    sampling: SamplingParams,
    seed: int,
) -> list[Episode]:
    from agent.engines.transformers import TransformersEngine
    from agent.rollout import play
    from engrain.cli.model import resolve_with_bar

    weights = None if checkpoint is None else _checkpoint(checkpoint, store, model)
    path = resolve_with_bar(model)
    with console.status(f"loading {model} …"):
        engine = TransformersEngine(path, name=model)
        if weights is not None:
            engine.load(weights[1])
            engine.checkpoint = weights[0]
    settings = (model, engine.checkpoint, knowledge.id or knowledge.text, sampling.model_dump(), seed)

    def keep(episode: Episode) -> None:
        store.add_episodes([episode], stage="play")
        _show_outcome(console, episode)

    try:
        return play(
            tasks,
            engine,
            sampling=sampling,
            namespace=f"play\0{json.dumps(settings)}",
            knowledge=knowledge.text,
            knowledge_id=knowledge.id,
            seed=seed,
            batch=1,  # one game after another, so that it can be followed
            workers=1,
            make_env=lambda task: _Shown(make(task), console),
            on_episode=keep,
        )
    finally:
        engine.close()


class _Shown(Env):
    """An env that prints what is said on both sides."""

    def __init__(self, env: Env, console: Console) -> None:
        super().__init__(env.task)
        self.env = env
        self.console = console
        self.system = env.system
        self.max_turns = env.max_turns

    def reset(self) -> Observation:
        observation = self.env.reset()
        self.system, self.max_turns = self.env.system, self.env.max_turns
        _show_start(self.console, self.env, observation)
        return observation

    def step(self, text: str) -> Step:
        _show(self.console, "agent", text, "green")
        step = self.env.step(text)
        _show(self.console, "world", step.observation.text, "cyan")
        return step

    @property
    def score(self) -> float:
        return self.env.score

    @property
    def success(self) -> bool:
        return self.env.success

    def close(self) -> None:
        self.env.close()


def _play_human(tasks: Sequence[Task], console: Console, store: Store) -> list[Episode]:
    played = []
    for task in tasks:
        episode = _human_episode(task, console)
        store.add_episodes([episode], stage="play")
        _show_outcome(console, episode)
        played.append(episode)
        if episode.stop_reason is StopReason.INTERRUPTED:
            break
    return played


def _human_episode(task: Task, console: Console) -> Episode:
    """One episode played at the keyboard: no token ids. Ctrl-D or Ctrl-C ends it."""
    started, clock = datetime.now(UTC), time.perf_counter()
    env = make(task)
    turns: list[Turn] = []
    reason = StopReason.MAX_TURNS
    try:
        observation = env.reset()
        _show_start(console, env, observation)
        messages = [Message(role="system", content=env.system)] if env.system else []
        messages.append(Message(role="user", content=observation.text))
        while len(turns) < env.max_turns:
            if observation.admissible:
                console.print(Text("you may: " + " | ".join(observation.admissible), style="dim"))
            try:
                text = console.input("[bold green]you>[/] ")
            except (EOFError, KeyboardInterrupt):
                console.print()
                reason = StopReason.INTERRUPTED
                break
            before = time.perf_counter()
            step = env.step(text)
            turns.append(
                Turn(
                    observation=observation.text,
                    action=text,
                    start=0,
                    end=0,
                    finish_reason=FinishReason.STOP,
                    reward=step.reward,
                    feedback=step.feedback,
                    seconds=time.perf_counter() - before,
                )
            )
            observation = step.observation
            messages.append(Message(role="assistant", content=text))
            if observation.text:
                messages.append(Message(role="user", content=observation.text))
            _show(console, "world", observation.text, "cyan")
            if step.done:
                reason = StopReason.DONE
                break
        return Episode(
            id=episode_id(f"human\0{started.isoformat()}", task),
            task=task,
            messages=tuple(messages),
            turns=tuple(turns),
            token_ids=(),
            prompt_length=0,
            loss_mask=(),
            logprobs=(),
            reward=sum(turn.reward for turn in turns),
            score=env.score,
            success=env.success,
            feedback="\n".join(dict.fromkeys(turn.feedback for turn in turns if turn.feedback)),
            stop_reason=reason,
            model="human",
            sampling=SamplingParams(),
            started_at=started,
            seconds=time.perf_counter() - clock,
            human=True,
        )
    finally:
        env.close()


def _options(pairs: Sequence[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"option {pair!r} is not key=value, as in -o recipe=1")
        options[key] = value
    return options


def _knowledge(given: str | None, store: Store) -> _Knowledge:
    """A text file, or a knowledge version of the store."""
    if given is None:
        return _Knowledge()
    file = Path(given).expanduser()
    if file.is_file():
        try:
            text = file.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError as error:
            raise UsageError(f"knowledge file {given!r} is not UTF-8 text: {error}") from error
        if not text:
            raise UsageError(f"knowledge file {given!r} is empty")
        return _Knowledge(text)
    found = store.knowledge(given if given.isdigit() else store.full_id("knowledge", given))
    return _Knowledge(found.text, found.id)


def _checkpoint(given: str, store: Store, model: str) -> tuple[str, Path]:
    """Id and folder of a checkpoint: a folder as it is, or one of the store, which must be of this model."""
    folder = Path(given).expanduser()
    if folder.is_dir():
        return folder.name, folder
    found = store.checkpoint(store.full_id("checkpoint", given))
    if found.model != model:
        raise UsageError(f"checkpoint {given!r} belongs to {found.model!r}: add --model {found.model}")
    return found.id, Path(found.path)


def _printable(text: str) -> str:
    """Foreign text without what a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _show(console: Console, who: str, text: str, colour: str) -> None:
    if text:
        console.print(Panel(Text(_printable(text)), title=who, title_align="left", border_style=colour))


def _show_start(console: Console, env: Env, observation: Observation) -> None:
    console.rule(f"{env.task.env} {env.task.id[-8:]} ({env.task.split})")
    _show(console, "rules", env.system, "dim")
    _show(console, "world", observation.text, "cyan")


def _show_outcome(console: Console, episode: Episode) -> None:
    _show(console, "feedback", episode.feedback, "yellow")
    if episode.error:
        console.print(Text(f"{episode.stop_reason}: {_printable(episode.error)}", style="red"))
    verdict = "[bold green]solved[/]" if episode.success else "[bold red]not solved[/]"
    console.print(
        f"{verdict}  score {episode.score:.2f}  {len(episode.turns)} turns  {episode.seconds:.1f} s  "
        f"[dim]{episode.id[:10]}[/]"
    )
