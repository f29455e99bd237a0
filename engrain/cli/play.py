"""`engrain play`: watch the agent play a world turn by turn, or play it yourself."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from agent.episode import Episode, FinishReason, Message, SamplingParams, StopReason, Turn, episode_id
from engrain.cli.common import (
    DEFAULT_MODEL,
    AdmissibleOption,
    BaseUrlOption,
    EngineName,
    EngineOption,
    EnvArgument,
    JsonOption,
    ModelOption,
    OptionsOption,
    SeedOption,
    StoreOption,
    find_checkpoint,
    find_knowledge,
    fingerprint,
    load_checkpoint,
    open_sampler,
    open_store,
    printable,
    world_options,
)
from envs.base import Env, Observation, Split, Step, Task
from envs.errors import UsageError
from envs.registry import make, world
from memory.records import Knowledge
from memory.store import Store

if TYPE_CHECKING:
    from agent.engines.base import Engine


def command(
    env: EnvArgument,
    option: OptionsOption = None,
    model: ModelOption = DEFAULT_MODEL,
    checkpoint: Annotated[str | None, typer.Option(help="Checkpoint id from the store, or a folder.")] = None,
    knowledge: Annotated[str | None, typer.Option(help="Knowledge version, its id, or a text file.")] = None,
    split: Annotated[Split, typer.Option(help="Which tasks.")] = Split.TEST,
    seed: SeedOption = 0,
    episodes: Annotated[int, typer.Option("--episodes", "-n", min=1, help="How many tasks to play.")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens a turn.")] = 256,
    admissible: AdmissibleOption = False,
    engine: EngineOption = EngineName.TRANSFORMERS,
    base_url: BaseUrlOption = None,
    human: Annotated[bool, typer.Option("--human", help="Play yourself.")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Watch the agent play, turn by turn, or play yourself with --human. Episodes go to the store."""
    if human and as_json:
        raise UsageError("--human and --json exclude each other: a player needs to see the game")
    if human and (knowledge or checkpoint):
        raise UsageError("--human plays without a model: leave out --knowledge and --checkpoint")
    tasks = world(env, world_options(option)).tasks(split, episodes, seed)
    console = Console(quiet=as_json, highlight=False)
    with open_store(store) as opened:
        if human:
            played = _play_human(tasks, console, opened)
        else:
            text = find_knowledge(knowledge, opened) if knowledge else None
            weights = find_checkpoint(checkpoint, opened, model) if checkpoint else None
            sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens, admissible_only=admissible)
            with open_sampler(model, engine, base_url) as sampler:
                load_checkpoint(sampler, weights)
                played = _play_agent(tasks, console, opened, sampler, text, sampling, seed)
    if as_json:
        typer.echo(json.dumps([episode.model_dump(mode="json") for episode in played], indent=2))
    elif len(played) > 1:
        solved = sum(episode.success for episode in played)
        console.print(f"[bold]{solved} of {len(played)} solved[/]")


def _play_agent(
    tasks: Sequence[Task],
    console: Console,
    store: Store,
    engine: Engine,
    knowledge: Knowledge | None,
    sampling: SamplingParams,
    seed: int,
) -> list[Episode]:
    from agent.rollout import play

    known = knowledge.id if knowledge else None
    settings = (fingerprint(engine.model), engine.checkpoint, known, sampling.model_dump(), seed)

    def keep(episode: Episode) -> None:
        store.add_episodes([episode], stage="play")
        _show_outcome(console, episode)

    return play(
        tasks,
        engine,
        sampling=sampling,
        namespace=f"play\0{json.dumps(settings)}",
        knowledge=knowledge.text if knowledge else None,
        knowledge_id=known,
        seed=seed,
        batch=1,  # one game after another, so that it can be followed
        workers=1,
        make_env=lambda task: _Shown(make(task), console),
        on_episode=keep,
    )


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
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # what is no text is an answer like any other
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


def _show(console: Console, who: str, text: str, colour: str) -> None:
    if text:
        console.print(Panel(Text(printable(text)), title=who, title_align="left", border_style=colour))


def _show_start(console: Console, env: Env, observation: Observation) -> None:
    console.rule(f"{env.task.env} {env.task.id[-8:]} ({env.task.split})")
    _show(console, "rules", env.system, "dim")
    _show(console, "world", observation.text, "cyan")


def _show_outcome(console: Console, episode: Episode) -> None:
    _show(console, "feedback", episode.feedback, "yellow")
    if episode.error:
        console.print(Text(f"{episode.stop_reason}: {printable(episode.error)}", style="red"))
    verdict = "[bold green]solved[/]" if episode.success else "[bold red]not solved[/]"
    console.print(
        f"{verdict}  score {episode.score:.2f}  {len(episode.turns)} turns  {episode.seconds:.1f} s  "
        f"[dim]{episode.id[:10]}[/]"
    )
