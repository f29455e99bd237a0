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
from agent.episode import Episode, Turn
from engrain.match import AgentMatch, HumanMatch, Match
from engrain.play import LeftError, draw_tasks, play_match
from envs.base import Split, Step, Task
from envs.errors import EngrainError, UsageError
from memory.errors import UnknownIdError
from memory.store import Store

#: Most games that are under way at once; each holds a world, and a process for worlds that may crash.
LIMIT = 8
#: Games that are over and can still be looked at here; the store keeps them all.
_OVER = 32


@dataclass(frozen=True)
class Place:
    """A world with its options, as people choose it."""

    env: str
    options: Mapping[str, str] = field(default_factory=dict)

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


class WebGame:
    """One game: what there is to see of it, and the next reply. An `engrain.play.Watcher`.

    Args:
        number: stands in its address.
        place: what is played.
        seed: drew its task.
        match: the game itself.
        thinking: held while the agent thinks, since its engine is one for all games.
    """

    def __init__(self, number: str, place: Place, seed: int, match: Match, thinking: threading.Lock) -> None:
        self.number, self.place, self.seed, self.match = number, place, seed, match
        self.phase, self.what = Phase.BUSY, "starting the world"
        self.suggestion: str | None = None
        self.hands: list[bool] = []  # for each turn whether a person chose its words
        self.episode: Episode | None = None
        self.error: str | None = None
        self.touched = time.monotonic()
        self._thinking = thinking
        self._alone = False  # the agent plays on without asking
        self._changed = threading.Condition()
        self._replies: SimpleQueue[str | Completion | None] = SimpleQueue()
        self._suggested: Completion | None = None

    # -- the person -------------------------------------------------------------------------------------------------

    @property
    def seat(self) -> Seat:
        """Who chooses the replies."""
        return Seat.CO if isinstance(self.match, AgentMatch) else Seat.HUMAN

    @property
    def alone(self) -> bool:
        """Whether the agent plays on without asking."""
        return self._alone

    @property
    def turn(self) -> int:
        """The number of the turn that is to come, from 1."""
        return len(self.hands) + 1

    def say(self, turn: int, text: str) -> None:
        """Reply in a person's own words. What was written for another turn is dropped."""
        self._answer(turn, text)

    def take(self, turn: int, *, on: bool = False) -> None:
        """Reply what the agent suggested; with `on` it plays the rest alone."""
        with self._changed:
            self._alone = self._alone or (on and turn == self.turn)
            self._answer(turn, self._suggested)

    def leave(self) -> None:
        """Leave the game; what was played is kept."""
        with self._changed:
            self._alone = False
            if self.phase is not Phase.OVER:
                self._show(Phase.BUSY, "leaving")
                self._replies.put(None)

    def wait(self, seconds: float) -> None:
        """Until it is the person's turn, or the game is over; at most so long."""
        self.touched = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: self.phase is not Phase.BUSY, seconds)

    def _answer(self, turn: int, reply: str | Completion | None) -> None:
        with self._changed:
            if self.phase is Phase.TURN and turn == self.turn and reply is not None:
                self._show(Phase.BUSY, "the world answers")
                self._replies.put(reply)

    # -- the game's own thread --------------------------------------------------------------------------------------

    def run(self, store: Store) -> None:
        """Play to the end."""

        def keep(episode: Episode) -> None:
            store.add_episodes([episode], stage="play")
            self.episode = episode

        try:
            play_match(self.match, self._choose, self, keep)
        except EngrainError as error:
            self.error = str(error)
        except BaseException:
            self.error = "this server failed; its log says why"
            raise
        finally:
            with self._changed:
                self._show(Phase.OVER, "over")

    def _choose(self, match: Match) -> str | Completion:
        if isinstance(match, AgentMatch):
            with self._thinking:
                self._suggested = match.suggest()
            self.suggestion = match.text_of(self._suggested)
            if self._alone and self._replies.empty():
                return self._suggested
        with self._changed:
            self._show(Phase.TURN, "your turn")
        reply = self._replies.get()
        if reply is None:
            raise LeftError
        return reply

    def _show(self, phase: Phase, what: str) -> None:
        with self._changed:
            self.phase, self.what = phase, what
            self._changed.notify_all()

    def begun(self, match: Match) -> None:
        """The world has spoken first."""
        self.what = "the agent thinks"

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """A time in which nobody can do anything."""
        self.what = what
        yield

    def moved(self, match: Match, turn: Turn, step: Step, seconds: float, human: bool) -> None:
        """A reply was answered."""
        with self._changed:
            self.hands.append(human)
            self.suggestion = self._suggested = None
            self.what = "the agent thinks"


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
        self._store, self._seeds, self._split = store, seeds, split
        self._games: dict[str, tuple[WebGame, threading.Thread]] = {}
        self._lock, self._thinking = threading.Lock(), threading.Lock()

    def start(self, place: int, seat: Seat) -> WebGame:
        """Begin a game; the one that nobody has looked at for longest is left if there are too many.

        Raises:
            UsageError: there is no such place or no agent, or the world has no tasks.
        """
        if not 0 <= place < len(self.places):
            raise UsageError(f"there is no world number {place}; choose one of the list")
        if seat is Seat.CO and self.agent is None:
            raise UsageError("no agent plays here: start the server with --co")
        chosen, seed = self.places[place], next(self._seeds)
        task = draw_tasks(chosen.env, chosen.options, self._split, 1, seed)[0]
        match: Match = self.agent(task, seed) if seat is Seat.CO and self.agent else HumanMatch(task)
        game = WebGame(secrets.token_hex(4), chosen, seed, match, self._thinking)
        thread = threading.Thread(target=game.run, args=(self._store,), name=f"game-{game.number}", daemon=True)
        with self._lock:
            self._games[game.number] = game, thread
            self._make_room()
        thread.start()
        return game

    def find(self, number: str) -> WebGame:
        """A game by its number.

        Raises:
            UnknownIdError: there is none any more.
        """
        if number not in self._games:
            raise UnknownIdError(f"game {number} is not known to this server; finished games stand under Episodes")
        return self._games[number][0]

    def all(self) -> list[WebGame]:
        """The games that are known, latest first."""
        return [game for game, _ in reversed(list(self._games.values()))]

    def close(self, seconds: float = 8.0) -> None:
        """Leave all games, and wait at most so long until they are kept."""
        deadline = time.monotonic() + seconds
        with self._lock:
            known = list(self._games.values())
        for game, _ in known:
            game.leave()
        for _, thread in known:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _make_room(self) -> None:
        going = [game for game, _ in self._games.values() if game.phase is not Phase.OVER]
        for game in sorted(going, key=lambda game: game.touched)[: max(0, len(going) - LIMIT)]:
            game.leave()
        over = [game for game, _ in self._games.values() if game.phase is Phase.OVER]
        for game in over[: max(0, len(over) - _OVER)]:
            del self._games[game.number]


def places_of(store: Store, names: Sequence[str]) -> list[Place]:
    """What can be played where nothing was asked for: worlds of the store's rounds, latest first, then all by name."""
    found: dict[Place | str, Place] = {}
    for record in sorted(store.rounds(), key=lambda record: record.number, reverse=True):
        world: Mapping[str, Any] = record.config.get("world", {})
        if world.get("env") in names:
            place = Place(world["env"], {key: str(value) for key, value in (world.get("options") or {}).items()})
            found.setdefault(str(place), place)
    for name in names:
        found.setdefault(name, Place(name))
    return list(found.values())
