"""Games that people play in the browser: each in a thread of its own, which waits there for the next reply.

A game goes as one in the terminal does (`engrain.play.play_match`), so that what is kept of it, and when, is the same.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from queue import SimpleQueue
from typing import Any

from agent.engines.base import Completion
from agent.episode import Episode, StopReason, Turn
from engrain.match import AgentMatch, HumanMatch, Match
from engrain.play import LeftError, draw_tasks, play_match
from envs.base import Observation, Split, Step, Task
from envs.errors import EngrainError, UsageError
from memory.errors import UnknownIdError
from memory.store import Store

#: Most games that are under way at once; each holds a world, and a process for worlds that may crash.
LIMIT = 8
#: Seconds without a look after which a game may be left to make room for another.
IDLE = 600.0
#: Games that are over and can still be looked at here; the store keeps them all.
_OVER = 32


@dataclass(frozen=True)
class Place:
    """A world with its options, as people choose it."""

    env: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return ", ".join([self.env, *(f"{key}={value}" for key, value in self.options.items())])


class Seat(StrEnum):
    """Who chooses the replies."""

    HUMAN = "human"
    CO = "co"  # the agent suggests, a person decides


class Phase(StrEnum):
    """What a game waits for."""

    BUSY = "busy"  # the world or the agent
    TURN = "turn"  # the person
    OVER = "over"


@dataclass(frozen=True)
class View:
    """A game at one moment. `turns` are those that were answered, each with whether a person chose its words."""

    phase: Phase
    what: str
    begun: bool
    turns: list[tuple[Turn, bool]]
    observation: Observation
    suggestion: str | None
    episode: Episode | None
    new: bool
    error: str | None

    @property
    def turn(self) -> int:
        """The number of the turn that is to come, from 1."""
        return len(self.turns) + 1


class WebGame:
    """One game: what there is to see of it, and the next reply. An `engrain.play.Watcher`.

    Args:
        number: stands in its address.
        place: what is played.
        seed: drew its task.
        match: the game itself.
        thinking: held while the agent thinks, since its engine is one for all games.
        ending: is set when the server ends: nobody waits any longer then.
    """

    def __init__(
        self, number: str, place: Place, seed: int, match: Match, thinking: threading.Lock, ending: threading.Event
    ) -> None:
        self.number, self.place, self.seed, self.match = number, place, seed, match
        self.phase = Phase.BUSY
        self.touched = time.monotonic()
        self._what, self._begun = "starting the world", False
        self._suggestion: str | None = None
        self._hands: list[bool] = []  # for each turn whether a person chose its words
        self._episode: Episode | None = None
        self._new = False
        self._error: str | None = None
        self._thinking, self._ending = thinking, ending
        self._alone = False  # the agent plays on without asking
        self._changed = threading.Condition()
        self._replies: SimpleQueue[str | Completion | None] = SimpleQueue()
        self._suggested: Completion | None = None

    # -- the person -------------------------------------------------------------------------------------------------

    @property
    def seat(self) -> Seat:
        """Who chooses the replies."""
        return Seat.CO if isinstance(self.match, AgentMatch) else Seat.HUMAN

    def view(self) -> View:
        """All that there is to see."""
        with self._changed:
            turns = list(zip(self.match.turns, self._hands, strict=False))
            return View(
                self.phase, self._what, self._begun, turns, self.match.observation, self._suggestion,
                self._episode, self._new, self._error,
            )  # fmt: skip

    def say(self, turn: int, text: str) -> None:
        """Reply in a person's own words. What was written for another turn is dropped."""
        self._answer(turn, text)

    def pick(self, turn: int, place: int) -> None:
        """Reply with one of the actions that the world lists, by its place from 0.

        Raises:
            UsageError: it lists none there.
        """
        with self._changed:
            listed = self.match.observation.admissible or ()
            if self._asked(turn) and not 0 <= place < len(listed):
                raise UsageError(f"the world lists no action number {place + 1}")
            self._answer(turn, listed[place] if place < len(listed) else None)

    def take(self, turn: int, *, on: bool = False) -> None:
        """Reply what the agent suggested; with `on` it plays the rest alone.

        Raises:
            UsageError: it is the person's turn, and there is no suggestion.
        """
        with self._changed:
            if self._asked(turn) and self._suggested is None:
                raise UsageError("the reply is empty: go back and type one")
            self._alone = self._alone or (on and self._asked(turn))
            self._answer(turn, self._suggested)

    def leave(self) -> None:
        """Leave the game; what was played is kept."""
        with self._changed:
            self._alone = False
            if self.phase is not Phase.OVER:
                self._show(Phase.BUSY, "leaving")
                self._replies.put(None)

    def wait(self, seconds: float, seen: int | None = None) -> None:
        """Until it is the person's turn, or the game is over, or more turns than `seen` were answered; so long at most.

        Looking at a game counts as being there.
        """
        self.touched = time.monotonic()
        with self._changed:
            before, deadline = len(self._hands) if seen is None else seen, time.monotonic() + seconds
            while self.phase is Phase.BUSY and not self._ending.is_set() and (left := deadline - time.monotonic()) > 0:
                if self._alone and len(self._hands) > before:
                    break
                self._changed.wait(min(left, 0.5))

    def _asked(self, turn: int) -> bool:
        return self.phase is Phase.TURN and turn == len(self._hands) + 1

    def _answer(self, turn: int, reply: str | Completion | None) -> None:
        with self._changed:
            if self._asked(turn) and reply is not None:
                self._show(Phase.BUSY, "the world answers")
                self._replies.put(reply)

    # -- the game's own thread --------------------------------------------------------------------------------------

    def run(self, store: Store) -> None:
        """Play to the end."""
        try:
            play_match(self.match, self._choose, self, lambda episode: self.keep(store, episode))
        except EngrainError as error:
            self._error = str(error)
        except BaseException:
            self._error = "this server failed; its log says why"
            raise
        finally:
            self._show(Phase.OVER, "over")

    def keep(self, store: Store, episode: Episode) -> None:
        """Store the episode. The same one again changes nothing."""
        self._new = bool(store.add_episodes([episode], stage="play"))
        self._episode = episode

    def _choose(self, match: Match) -> str | Completion:
        if isinstance(match, AgentMatch):
            with self._thinking:
                if self._replies.empty():  # else the person left while others had the agent's attention
                    self._suggested = match.suggest()
                    self._suggestion = match.text_of(self._suggested)
            if self._alone and self._replies.empty() and self._suggested is not None:
                return self._suggested
        with self._changed:
            if self._replies.empty():
                self._show(Phase.TURN, "your turn")
        reply = self._replies.get()
        if reply is None:
            raise LeftError
        return reply

    def _show(self, phase: Phase, what: str) -> None:
        with self._changed:
            self.phase, self._what = phase, what
            self._changed.notify_all()

    def begun(self, match: Match) -> None:
        """The world has spoken first."""
        with self._changed:
            self._begun, self._what = True, "the agent thinks"

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """A time in which nobody can do anything."""
        self._what = what
        yield

    def moved(self, match: Match, turn: Turn, step: Step, seconds: float, human: bool) -> None:
        """A reply was answered."""
        with self._changed:
            self._hands.append(human)
            self._suggestion = self._suggested = None
            self._what = "the agent thinks"
            self._changed.notify_all()


class Games:
    """The games of one server.

    Args:
        store: keeps the episodes.
        places: what can be played.
        seeds: where tasks come from, one a game.
        split: which tasks; None: training tasks where the world has them.
        agent: makes the match in which the agent suggests; None: there is no agent.
    """

    def __init__(
        self,
        store: Store,
        places: Sequence[Place],
        seeds: Iterator[int],
        split: Split | None = None,
        agent: Callable[[Task, int], AgentMatch] | None = None,
    ) -> None:
        self.places, self.agent = list(places), agent
        self.ending = threading.Event()
        self._store, self._seeds, self._split = store, seeds, split
        self._games: dict[str, tuple[WebGame, threading.Thread]] = {}
        self._forms: dict[str, WebGame] = {}  # which form began which game
        self._lock, self._thinking = threading.Lock(), threading.Lock()

    def start(self, place: int, seat: Seat, form: str = "") -> WebGame:
        """Begin a game; the same form sent twice begins one.

        Raises:
            UsageError: there is no such place or no agent, the world has no tasks, or too many games are under way.
        """
        if not 0 <= place < len(self.places):
            raise UsageError(f"there is no world number {place}; choose one of the list")
        if seat is Seat.CO and self.agent is None:
            raise UsageError("no agent plays here: start the server with --co")
        with self._lock:
            if form and form in self._forms:
                return self._forms[form]
            self._make_room()
            chosen, seed = self.places[place], next(self._seeds)
            task = draw_tasks(chosen.env, chosen.options, self._split, 1, seed)[0]
            match: Match = self.agent(task, seed) if seat is Seat.CO and self.agent else HumanMatch(task)
            game = WebGame(secrets.token_hex(4), chosen, seed, match, self._thinking, self.ending)
            thread = threading.Thread(target=game.run, args=(self._store,), name=f"game-{game.number}", daemon=True)
            self._games[game.number] = game, thread
            if form:
                self._forms[form] = game
        thread.start()
        return game

    def find(self, number: str) -> WebGame:
        """A game by its number.

        Raises:
            UnknownIdError: there is none any more.
        """
        found = self._games.get(number)
        if found is None:
            raise UnknownIdError(f"game {number} is not known to this server; finished games stand under Episodes")
        return found[0]

    def all(self) -> list[WebGame]:
        """The games that are known, latest first."""
        return [game for game, _ in reversed(list(self._games.values()))]

    def close(self, seconds: float = 8.0) -> None:
        """Leave all games, and keep them; an agent that thinks on is not waited for longer than `seconds`."""
        self.ending.set()
        deadline = time.monotonic() + seconds
        with self._lock:
            known = list(self._games.values())
        for game, _ in known:
            game.leave()
        for game, thread in known:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive() and game.match.begun:
                game.keep(self._store, game.match.episode(StopReason.INTERRUPTED))

    def _make_room(self) -> None:
        """Of too many games, leave the one that nobody has looked at for longest, if that is long.

        Raises:
            UsageError: people are at all of them.
        """
        going = [pair for pair in self._games.values() if pair[0].phase is not Phase.OVER]
        if len(going) >= LIMIT:
            game, thread = min(going, key=lambda pair: pair[0].touched)
            if time.monotonic() - game.touched < IDLE:
                raise UsageError(f"{LIMIT} games are under way here: leave one of them, or come back later")
            game.leave()
            thread.join(5.0)
        over = [game for game, _ in self._games.values() if game.phase is Phase.OVER]
        for game in over[: max(0, len(over) - _OVER)]:
            del self._games[game.number]
            self._forms = {form: kept for form, kept in self._forms.items() if kept is not game}


def places_of(store: Store, names: Sequence[str]) -> list[Place]:
    """What can be played where nothing was asked for: worlds of the store's rounds, latest first, then all by name."""
    found: dict[str, Place] = {}
    for record in sorted(store.rounds(), key=lambda record: record.number, reverse=True):
        world = record.config.get("world")
        if isinstance(world, Mapping) and world.get("env") in names and isinstance(world.get("options", {}), Mapping):
            place = Place(world["env"], dict(world.get("options", {})))
            found.setdefault(str(place), place)
    for name in names:
        found.setdefault(name, Place(name))
    return list(found.values())
