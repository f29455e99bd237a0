"""Games one after another: who chooses, what is stored, and what is looked at afterwards."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agent.engines.base import Completion, Engine
from agent.episode import Episode, SamplingParams, StopReason
from agent.game import Plan
from agent.renderer import Renderer
from engrain.cli.common import fingerprint
from engrain.cli.play_input import Keyboard
from engrain.cli.play_looks import Closer, Look
from engrain.cli.play_screen import Screen
from engrain.cli.play_views import show_comparison, show_totals
from engrain.compare import Arm
from engrain.match import AgentMatch, HumanMatch, Match
from engrain.play import load, play_match, solved
from envs.base import Step, Task
from memory.records import CheckpointRecord
from memory.store import Store

if TYPE_CHECKING:
    from agent.episode import Turn


@dataclass
class Sitting:
    """One run of `engrain play`.

    `facts` is what `--json` prints; `left` says that the person went away in the middle.
    """

    store: Store
    screen: Screen
    seed: int
    facts: list[dict[str, Any]] = field(default_factory=list)
    left: bool = False

    # -- ways to play -----------------------------------------------------------------------------------------------

    def by_hand(self, tasks: Sequence[Task], keyboard: Keyboard) -> None:
        """A person plays, without a model."""

        def choose(match: Match) -> str:
            return keyboard.reply(match) or ""

        played = []
        self.screen.seated = True
        for task in tasks:
            self.screen.opening(task, self.seed, "you play")
            episode = self._play(HumanMatch(task), choose, self.screen)
            if episode is None or self.left:
                break
            played.append(episode)
        self._total(played)

    def with_agent(
        self,
        tasks: Sequence[Task],
        engine: Engine,
        arm: Arm,
        sampling: SamplingParams,
        keyboard: Keyboard | None = None,
        closer: Closer | None = None,
        teacher: CheckpointRecord | None = None,
    ) -> None:
        """The agent plays; with a keyboard it suggests and a person decides."""
        load(engine, arm.checkpoint)
        self.screen.seated = keyboard is not None
        who = "the agent suggests, you decide" if keyboard else "the agent plays"
        played = []
        for task in tasks:
            self.screen.opening(task, self.seed, f"{who} ({engine.model}, {arm.name})")
            match = self.match(task, engine, arm, sampling)
            look = closer.following(self.screen, arm, teacher) if closer and not self.screen.quiet else None
            episode = self._play(match, self._chooser(keyboard, look=look), self.screen)
            if episode is None:
                break
            found = closer.look(self.screen, episode, arm, teacher) if closer and not (self.left or look) else {}
            self.facts.append({**episode.model_dump(mode="json"), **found})
            played.append(episode)
            if self.left:
                break
        self._total(played)

    def compare(
        self,
        tasks: Sequence[Task],
        engine: Engine,
        arms: Sequence[Arm],
        sampling: SamplingParams,
        closer: Closer | None = None,
    ) -> None:
        """Every task by all arms."""
        shown: list[list[tuple[str, Episode]]] = []
        for task in tasks:
            self.screen.opening(task, self.seed, f"{' / '.join(arm.name for arm in arms)} ({engine.model})")
            self.screen.facts(*(fact for arm in arms[1:] for fact in _what(arm)), style="dim")
            found: list[tuple[str, Episode]] = []
            more: dict[str, dict[str, Any]] = {}
            for arm in arms:
                with self.screen.waiting(f"loading the weights of {arm.name}"):
                    load(engine, arm.checkpoint)
                match = self.match(task, engine, arm, sampling)
                watcher = _Quietly(self.screen, first=arm is arms[0])
                episode = self._play(match, self._chooser(None, arm.name), watcher)
                if episode is None or self.left:
                    break
                found.append((arm.name, episode))
            if found:
                show_comparison(self.screen, found)
            for arm, (name, episode) in zip(arms, found, strict=False):
                if self.left or closer is None:
                    break
                load(engine, arm.checkpoint)
                try:  # which items moved it is asked of the one that read them
                    moved = arm.knowledge is not None
                    more[name] = closer.look(self.screen, episode, arm, arms[0].checkpoint, who=name, why=moved)
                except KeyboardInterrupt:
                    self.left = True
            arms_facts = {name: {**e.model_dump(mode="json"), **more.get(name, {})} for name, e in found}
            self.facts.append({"task": task.id, "seed": self.seed, "arms": arms_facts})
            if self.left:
                break
            shown.append(found)
        show_totals(self.screen, shown)

    def match(self, task: Task, engine: Engine, arm: Arm, sampling: SamplingParams) -> AgentMatch:
        """A game with the agent and the weights that are loaded. The same game again is the same episode."""
        plan = Plan(
            engine=engine,
            renderer=Renderer(engine.tokenizer),
            sampling=sampling.model_copy(update={"seed": self.seed}),
            knowledge=arm.knowledge.text if arm.knowledge else None,
            knowledge_id=arm.knowledge.id if arm.knowledge else None,
        )
        known = arm.knowledge.id if arm.knowledge else None
        settings = (fingerprint(engine.model), engine.checkpoint, known, sampling.model_dump(), self.seed)
        return AgentMatch(task, plan, f"play\0{json.dumps(settings)}")

    # -- parts ------------------------------------------------------------------------------------------------------

    def _play(self, match: Match, choose: Callable[[Match], str | Completion], watcher: Any) -> Episode | None:
        new = 0

        def keep(episode: Episode) -> None:
            nonlocal new
            new = self.store.add_episodes([episode], stage="play")

        episode = play_match(match, choose, watcher, keep)
        self.left = self.left or episode is None or episode.stop_reason is StopReason.INTERRUPTED
        if episode is None:
            self.screen.facts("left before a word was said", "nothing to store", style="dim")
        elif watcher is self.screen or self.left:
            self.screen.over(episode, bool(new))
        return episode

    def _total(self, played: Sequence[Episode]) -> None:
        if len(played) > 1:
            self.screen.heading(f"{solved(played)} of {len(played)} solved")

    def _chooser(
        self, keyboard: Keyboard | None, name: str = "the agent", look: Look | None = None
    ) -> Callable[[Match], str | Completion]:
        self.screen.told = look is not None

        def choose(match: Match) -> str | Completion:
            assert isinstance(match, AgentMatch)  # noqa: S101 - made above
            before = time.perf_counter()
            with self.screen.waiting(f"{name} thinks, turn {len(match.turns) + 1} of {match.max_turns}"):
                suggestion = match.suggest()
            if look is not None:
                if keyboard is None:
                    seconds = time.perf_counter() - before
                    self.screen.thought(match.text_of(suggestion), seconds, len(suggestion.token_ids))
                with match.aside():
                    look(match.supposing(suggestion))
            if keyboard is None:
                return suggestion
            own = keyboard.reply(match, match.text_of(suggestion))
            return suggestion if own is None else own

        return choose


def _what(arm: Arm) -> list[str]:
    """Which text and weights an arm stands for."""
    if arm.knowledge is not None:
        version = arm.knowledge.version
        return [f"{arm.name}: {'a text file' if version is None else f'version {version}'}"]
    if arm.checkpoint is not None:
        return [f"{arm.name}: checkpoint {arm.checkpoint.id[:10]} ({arm.checkpoint.status.value})"]
    return []


class _Quietly:
    """Shows only how a game begins, and that if it is the first of several on one task."""

    def __init__(self, screen: Screen, *, first: bool) -> None:
        self._screen, self._first = screen, first
        self.waiting = screen.waiting

    def begun(self, match: Match) -> None:
        if self._first:
            self._screen.say("rules", match.system)
            self._screen.say("world", match.observation.text)

    def moved(self, match: Match, turn: Turn, step: Step, seconds: float, human: bool) -> None:
        """Shown when all have played."""
