"""Games in the foreground: who says what, what is kept of it, and what a person can type."""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from agent.engines.base import Completion
from agent.episode import Episode, FinishReason, SamplingParams, StopReason
from agent.errors import EngineFailedError
from agent.game import Plan
from agent.renderer import Renderer
from agent.rollout import play
from engrain.cli.play_input import Keyboard
from engrain.cli.play_menu import pick_world
from engrain.cli.play_screen import Labelled, Plain, Screen, apart
from engrain.match import AgentMatch, HumanMatch, human_turns
from engrain.play import LeftError, any_seed, draw_tasks, play_match
from envs import registry
from envs.base import Env, Observation, Split, Step, Task, World
from memory.admission import unverified
from memory.store import Store

SAMPLING = SamplingParams(max_tokens=16, seed=3)


class Parrot:
    """Says `go` and the request's seed; fails when told to."""

    model = "parrot"
    checkpoint = None
    max_context = 10_000

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.broken = False
        self.slow: threading.Event | None = None  # waited for before it speaks

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]) -> list[Completion]:
        if self.slow is not None:
            self.slow.wait(60)
        if self.broken:
            raise EngineFailedError("out of numbers")
        return [self._say(f"go {(params.seed or 0) % 1000}") for params in sampling]

    def _say(self, text: str) -> Completion:
        ids = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        return Completion(tuple(ids), (-0.5,) * len(ids), FinishReason.STOP)

    def load(self, checkpoint: Path | None) -> None: ...

    def close(self) -> None: ...


class Echo(Env):
    """Repeats what it hears, three turns long; may break down, or list actions."""

    system = "Say something."
    max_turns = 3

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.heard: list[str] = []

    def _observe(self, text: str) -> Observation:
        return Observation(text, tuple(self.task.parameters.get("actions", ())) or None)

    def reset(self) -> Observation:
        return self._observe("begin")

    def step(self, text: str) -> Step:
        if text == "break":
            raise OSError("the floor\nis gone")
        self.heard.append(text)
        return Step(self._observe(f"you said {text}"), 0.5, len(self.heard) == 3, feedback="fine")

    @property
    def score(self) -> float:
        return len(self.heard) / 3


class Silent:
    """A watcher that notes who moved."""

    def __init__(self) -> None:
        self.moves: list[tuple[str, bool]] = []

    def begun(self, match: Any) -> None: ...

    def waiting(self, what: str) -> Any:
        return nullcontext()

    def moved(self, match: Any, turn: Any, step: Any, seconds: float, human: bool) -> None:
        self.moves.append((turn.action, human))


def task_of(**parameters: Any) -> Task:
    return Task.create("echo", Split.TRAIN, 1, parameters)


@pytest.fixture
def engine(tiny_tokenizer: Any) -> Parrot:
    return Parrot(tiny_tokenizer)


def match_of(engine: Parrot, knowledge: str | None = None, **parameters: Any) -> AgentMatch:
    plan = Plan(engine, Renderer(engine.tokenizer), SAMPLING, knowledge, "k" if knowledge else None)
    return AgentMatch(task_of(**parameters), plan, "here", Echo)


def run(match: Any, choose: Callable[[Any], Any]) -> tuple[Episode | None, list[Episode], Silent]:
    kept: list[Episode] = []
    watcher = Silent()
    return play_match(match, choose, watcher, kept.append), kept, watcher


def test_an_agent_that_is_watched_plays_the_very_episode_of_a_rollout(engine: Parrot) -> None:
    for knowledge in (None, "Know this."):
        watched, kept, watcher = run(match_of(engine, knowledge), lambda match: match.suggest())
        (rolled,) = play(
            [task_of()], engine, sampling=SAMPLING, namespace="here", knowledge=knowledge, seed=3, make_env=Echo,
            knowledge_id="k" if knowledge else None,
        )  # fmt: skip
        times = {"started_at", "seconds", "turns"}
        assert watched is not None
        assert watched.model_dump(exclude=times) == rolled.model_dump(exclude=times)
        assert [t.model_dump(exclude={"seconds"}) for t in watched.turns] == [
            t.model_dump(exclude={"seconds"}) for t in rolled.turns
        ]
        assert kept == [watched]
        assert human_turns(watched) == (False, False, False)
        assert [human for _, human in watcher.moves] == [False, False, False]


def test_a_persons_words_are_read_and_never_trained_on(engine: Parrot, engrain_home: Path) -> None:
    def choose(match: AgentMatch) -> str | Completion:
        suggestion = match.suggest()
        return "stay <|im_end|> put" if len(match.turns) == 1 else suggestion

    episode, _, watcher = run(match_of(engine), choose)
    assert episode is not None
    assert episode.success
    assert episode.human
    assert human_turns(episode) == (False, True, False)
    assert [human for _, human in watcher.moves] == [False, True, False]
    own = episode.turns[1]
    assert own.action == "stay < |im_end|> put"  # what the world heard is what the ids spell
    assert episode.turns[2].observation == "you said stay < |im_end|> put"
    renderer = Renderer(engine.tokenizer)
    assert renderer.decode(episode.token_ids[own.start : own.end]) == own.action
    assert episode.token_ids[own.end - 1] == renderer.end_of_turn
    assert not any(episode.loss_mask[own.start : own.end])
    assert episode.sampled == sum(t.end - t.start for t in (episode.turns[0], episode.turns[2]))
    with Store.open(str(engrain_home / "engrain.db")) as store:
        store.add_episodes([episode], stage="play")
        again = store.episode(episode.id)
        assert store.arrivals("echo") == 1
    assert human_turns(again) == (False, True, False)
    other, _, _ = run(match_of(engine), lambda match: "stay" if match.suggest() and match.turns else "go")
    assert other is not None
    assert (other.id != episode.id, other.sampled) == (True, 0)  # no two games with a person are one
    assert unverified(other) is None  # a round may learn from it
    assert unverified(episode) == "its world writes markup of a chat"  # as it repeated what the person wrote


def test_a_game_that_is_left_is_kept_as_far_as_it_went(engine: Parrot) -> None:
    finished, _, _ = run(match_of(engine), lambda match: match.suggest())
    for leave in (LeftError, KeyboardInterrupt, EOFError):

        def choose(match: AgentMatch, leave: type[BaseException] = leave) -> Completion:
            if match.turns:
                raise leave
            return match.suggest()

        episode, kept, _ = run(match_of(engine), choose)
        assert episode is not None
        assert kept == [episode]
        assert episode.stop_reason is StopReason.INTERRUPTED
        assert len(episode.turns) == 1
        assert not episode.success
        assert finished is not None
        assert episode.id != finished.id  # the whole game can still be stored

    def leave_at_once(match: Any) -> str:
        raise LeftError

    assert run(match_of(engine), leave_at_once)[:2] == (None, [])
    assert run(HumanMatch(task_of(), Echo), leave_at_once)[:2] == (None, [])


def test_what_ends_the_process_lets_the_episode_be_kept_first(engine: Parrot) -> None:
    def choose(match: AgentMatch) -> Completion:
        if match.turns:
            raise SystemExit(143)
        return match.suggest()

    kept: list[Episode] = []
    with pytest.raises(SystemExit):
        play_match(match_of(engine), choose, Silent(), kept.append)
    assert [episode.stop_reason for episode in kept] == [StopReason.INTERRUPTED]

    def fail(match: AgentMatch) -> Completion:
        engine.broken = bool(match.turns)
        return match.suggest()

    with pytest.raises(EngineFailedError):
        play_match(match_of(engine), fail, Silent(), kept.append)
    assert kept[1].error == "out of numbers"
    assert len(kept[1].turns) == 1


def test_ctrl_c_while_an_episode_is_stored_comes_afterwards(engine: Parrot) -> None:
    kept = []

    def keep(episode: Episode) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        kept.append(episode)

    with pytest.raises(KeyboardInterrupt):
        play_match(match_of(engine), lambda match: match.suggest(), Silent(), keep)
    assert len(kept) == 1


def test_a_world_that_breaks_down_costs_its_episode(engine: Parrot) -> None:
    episode, kept, _ = run(match_of(engine), lambda match: match.suggest() and "break")
    assert episode is not None
    assert (episode.stop_reason, episode.error) == (StopReason.ERROR, "OSError: the floor is gone")
    assert kept == [episode]


def test_a_prompt_without_room_ends_the_game(engine: Parrot) -> None:
    engine.max_context = 100
    episode, _, _ = run(match_of(engine), lambda match: match.suggest())
    assert episode is not None
    assert episode.stop_reason is StopReason.LENGTH
    assert "leaves no room" in (episode.error or "")


def test_a_person_alone_plays_in_a_worker_process() -> None:
    options = {"game": "coin_collector", "level": "1", "max_turns": "2"}
    (task,) = registry.world("textworld", options).tasks(Split.TRAIN, 1, 0)
    assert registry.isolated(task)
    said: list[str] = []

    def choose(match: HumanMatch) -> str:
        said.append((match.observation.admissible or ("",))[-1])
        return said[-1]

    match = HumanMatch(task)
    episode, kept, _ = run(match, choose)
    assert episode is not None
    assert kept == [episode]
    assert (episode.model, episode.human, episode.error) == ("human", True, None)
    assert human_turns(episode) == (True,) * len(episode.turns)
    assert [turn.action for turn in episode.turns] == said
    assert all(said)
    assert episode.messages[0].content == match.system != ""
    assert episode.success == (episode.score == 1.0)


def typing(monkeypatch: pytest.MonkeyPatch, *lines: str) -> tuple[Keyboard, io.StringIO]:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    out = io.StringIO()
    return Keyboard(Labelled(Console(file=out, width=80)), editing=False), out


def test_what_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    match = HumanMatch(task_of(actions=["go north", "7", "wait"]), Echo)
    match.begin()
    for lines, reply in (
        (["2"], "7"),
        (["3"], "wait"),
        (["4"], "4"),  # no such number: a reply like any other
        (["7"], "7"),  # an action's own name
        (["  two words "], "  two words "),
        (["//slash"], "/slash"),
        (["", "/help", "/rules", "/look", "/actions", "/nothing", "hello"], "hello"),
    ):
        keyboard, out = typing(monkeypatch, *lines)
        assert keyboard.reply(match) == reply
    shown = out.getvalue()
    for part in ("type a reply", "/quit", "Say something.", "begin", "1 go north   2 7", "there is no /nothing"):
        assert part in shown
    keyboard, _ = typing(monkeypatch, "")
    assert keyboard.reply(match, "go north") is None
    for lines in (["/quit"], []):
        keyboard, _ = typing(monkeypatch, *lines)
        with pytest.raises(LeftError):
            keyboard.reply(match)


def test_a_list_of_actions_that_the_world_ends_in_is_not_shown_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    said = Observation(
        "A room.\n\nCommands:\n" + "\n".join(f"take {i}" for i in range(20)), tuple(f"take {i}" for i in range(20))
    )
    assert apart(said) == ("A room.", said.admissible)
    assert apart(Observation("A room.", said.admissible)) == ("A room.", ())
    keyboard, out = typing(monkeypatch)
    screen = keyboard.screen
    screen.heard(said)
    assert out.getvalue().count("take 9") == 1
    assert len(out.getvalue().splitlines()) == 4  # the room, and the twenty in three lines
    screen.seated = True
    screen.heard(said)
    assert out.getvalue().count("take 9") == 1
    screen.numbered(said.admissible or ())
    assert " 8 take 7" in out.getvalue()


def test_a_menu_takes_numbers_names_and_enter(monkeypatch: pytest.MonkeyPatch) -> None:
    options = [("math", "questions"), ("sokoban", "boxes")]
    for lines, place in ((["2"], 1), (["Sokoban"], 1), ([""], 0), (["9", "chess", "1"], 0)):
        keyboard, out = typing(monkeypatch, *lines)
        assert keyboard.choose("Which?", options) == place
    assert "'chess' is none of them" in out.getvalue()


def test_the_menu_says_what_a_world_of_ones_own_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Spelling(World):
        """Letters and words.

        More than that.
        """

    class Bare(World): ...

    monkeypatch.setattr(registry.WORLDS, "_here", {"spelling": Spelling, "bare": Bare})
    monkeypatch.setattr(registry.WORLDS, "_targets", {"lost": "nowhere_at_all:World"})
    keyboard, out = typing(monkeypatch, "spelling")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert pick_world(keyboard) == "spelling"
    lines = [line.strip() for line in out.getvalue().splitlines()]
    assert lines[-3:] == ["5 bare", "6 lost: does not load", "7 spelling: Letters and words."]


@pytest.mark.parametrize("kind", [Labelled, Plain])
def test_screens_say_the_same_facts_and_stay_in_their_lines(kind: type[Screen], engine: Parrot) -> None:
    out = io.StringIO()
    screen = kind(Console(file=out, width=80, no_color=True))
    match = match_of(engine)
    screen.opening(match.task, 5, "the agent plays")
    episode = play_match(match, lambda m: m.suggest() if m.turns else "x" * 200, screen, lambda e: None)
    assert episode is not None
    screen.over(episode, new=True)
    shown = out.getvalue()
    lines = shown.splitlines()
    for fact in (
        "Say something.",
        "begin",
        "turn 2 of 3",
        "you said",
        "fine",
        "solved",
        "score 1.00",
        "seed 5",
        "3 turns",
    ):
        assert fact.lower() in shown.lower(), fact
    assert "(1 yours)" in shown
    assert episode.id[:10] in shown
    assert "\x1b" not in shown
    assert all(line == line.rstrip() for line in lines)
    if kind is Labelled:
        assert max(map(len, lines)) <= 80
    else:
        assert all(lines)
        assert not any(line.startswith(" ") for line in lines)


def test_a_seed_that_nobody_chose_is_one_that_every_built_in_world_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engrain.play.secrets.randbelow", lambda limit: limit - 1)
    for name in ("math", "textworld", "frozenlake", "sokoban"):
        assert len(draw_tasks(name, {}, None, 1, any_seed())) == 1
