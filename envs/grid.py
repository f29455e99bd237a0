"""TextArena's FrozenLake and Sokoban with the rules taken out of the prompt, as in the paper: play teaches them.

A board's content decides its split; boards that cannot be solved within the turns are not tasks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from itertools import count as count_up
from typing import Any, ClassVar, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from envs import layouts
from envs.base import Env, Observation, Split, Step, Task, World
from envs.errors import BadTaskError, EnvFailedError, UsageError
from envs.layouts import Board
from envs.options import Options
from envs.splits import content_number, split_of

#: Boards up to this number are counted one by one, so that an exhausted split is known without a search.
_COUNTED = 20_000
#: Seeds tried without a new board of the split after which it counts as exhausted.
_PATIENCE = 3000
#: Turns added on the larger out-of-distribution boards.
_OOD_EXTRA_TURNS = 2


class FrozenLakeOptions(Options):
    """Options of the `frozenlake` world."""

    size: int = Field(3, ge=2, le=12)
    """Rows and columns. The paper's 3."""
    holes: int = Field(2, ge=0)
    """Holes on the board. The paper's 2."""
    random_corners: bool = False
    """Start in any corner (the goal opposite), as TextArena's `-random` game: four times as many boards."""
    max_turns: int = Field(5, ge=1)
    """Replies per episode. The paper's 5."""

    @model_validator(mode="after")
    def _room(self) -> Self:
        if self.holes > self.size * self.size - 3:
            raise ValueError(f"holes={self.holes} leave no way across a board of size {self.size}")
        return self


class SokobanOptions(Options):
    """Options of the `sokoban` world."""

    size: int = Field(6, ge=5, le=12)
    """Rows and columns, walls included. The paper's 6."""
    boxes: int = Field(1, ge=1, le=4)
    """Boxes to push. The paper's 1."""
    max_turns: int = Field(5, ge=1)
    """Replies per episode. The paper's 5."""


class _Parameters(BaseModel):
    """What a grid task holds: its board, which its seed made, and the turns."""

    board: tuple[str, ...] = Field(min_length=2)
    max_turns: int = Field(ge=1)

    @model_validator(mode="after")
    def _square(self) -> Self:
        if any(len(row) != len(self.board) for row in self.board):
            raise ValueError("the board is not square")
        return self


class GridEnv(Env):
    """A TextArena game on one board. Score 1 when it is solved, else 0.

    Every reply is a turn, invalid ones too; TextArena ends the game at the second invalid one in a row.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        try:
            parameters = _Parameters.model_validate(dict(task.parameters))
        except ValidationError as error:
            raise BadTaskError(f"task {task.id}: {error.errors()[0]['msg']}") from error
        self.board: Board = parameters.board
        self.max_turns = parameters.max_turns
        self._game: Any = None
        self._turn = 0
        self._over = False
        self._solved = False

    @abstractmethod
    def _start(self, state: Any) -> Any:
        """Put the board into a fresh TextArena game that keeps its record in `state`."""

    @abstractmethod
    def _out_of_turns(self) -> str:
        """What TextArena says when the turns are used up."""

    def reset(self) -> Observation:
        """Show the board."""
        import textarena

        # No seed is given to the state: TextArena would seed Python's global generator with it. One turn more than
        # ours, so that this class alone ends the game, after exactly `max_turns` replies.
        state = textarena.SinglePlayerState(num_players=1, max_turns=self.max_turns + 1)
        try:
            self._game = self._start(state)
        except (IndexError, KeyError, ValueError, StopIteration) as error:
            raise BadTaskError(f"task {self.task.id}: not a board of {self.task.env!r}: {error!r}") from error
        return self._observe()

    def step(self, text: str) -> Step:
        """Play the first move in brackets, such as `[up]`.

        Raises:
            EnvFailedError: the game is not started or over, or TextArena failed.
        """
        if self._game is None or self._over:
            raise EnvFailedError(f"task {self.task.id} is not being played")
        self._turn += 1
        try:
            ended, _ = self._game.step(text)
        except Exception as error:
            self._over = True
            raise EnvFailedError(f"the game of task {self.task.id} crashed: {error!r}") from error
        state = self._game.state
        invalid = state.error_count > 0 or bool(state.game_info[0]["invalid_move"])
        self._solved = bool(ended) and not invalid and float(state.rewards[0]) >= 1.0
        self._over = bool(ended) or self._turn >= self.max_turns
        feedback = ""
        if self._over:
            feedback = str(state.game_info[0]["reason"]) if ended else self._out_of_turns()
        return Step(self._observe(), float(self._solved), self._over, feedback)

    @property
    def score(self) -> float:
        """1 for a solved board, else 0, as the paper counts."""
        return float(self._solved)

    def _observe(self) -> Observation:
        from textarena import ObservationType

        unseen = {ObservationType.PROMPT, ObservationType.PLAYER_ACTION}
        heard = self._game.state.get_current_player_observation()
        texts = [str(message).strip() for _, message, kind in heard if kind not in unseen]
        return Observation("\n\n".join(dict.fromkeys(texts)))


class FrozenLakeEnv(GridEnv):
    """Reach `G` from `P` without stepping on `H`."""

    def _start(self, state: Any) -> Any:
        from textarena.envs.FrozenLake.env import FrozenLakeEnv as Game

        game = Game(size=len(self.board), num_holes=sum(row.count("H") for row in self.board))
        game.player_pos, game.goal_pos = _find(self.board, "P"), _find(self.board, "G")
        content = {
            "grid": [[" " if sign == "P" else sign for sign in row] for row in self.board],
            "player_pos": game.player_pos,
            "goal_pos": game.goal_pos,
        }
        game.state = state
        state.reset(game_state=content, role_mapping={0: "Player"})
        game._observe_current_state()
        return game

    def _out_of_turns(self) -> str:
        done = round(self._game._get_percentage_completion() * 100)
        return f"You reached the turn limit! Game over. You completed {done}% of the journey to the goal."


def _find(board: Board, sign: str) -> tuple[int, int]:
    return next((i, row.index(sign)) for i, row in enumerate(board) if sign in row)


class SokobanEnv(GridEnv):
    """Push every box onto a target."""

    def _start(self, state: Any) -> Any:
        import numpy as np
        from textarena.envs.Sokoban.env import SokobanEnv as Game

        on = {"#": 0, "_": 1, "O": 2, "*": 3, "X": 4, "P": 5, "S": 5}
        under = {"#": 0, "O": 2, "*": 2, "S": 2}
        size = len(self.board)
        boxes = sum(row.count("X") + row.count("*") for row in self.board)
        game = Game(dim_room=(size, size), max_turns=self.max_turns + 1, num_boxes=boxes)
        game.room_state = np.array([[on[sign] for sign in row] for row in self.board])
        game.room_fixed = np.array([[under.get(sign, 1) for sign in row] for row in self.board])
        game.player_position = np.argwhere(game.room_state == on["P"])[0]
        game.box_mapping = {}
        game.state = state
        state.reset(game_state={"board": game.create_board_str(game.room_state)}, role_mapping={0: "Player"})
        game._observe_current_state()
        return game

    def _out_of_turns(self) -> str:
        return "The turn limit has been reached. You did not solve the puzzle."


class GridWorld(World):
    """What the grid worlds share: walking seeds, and splitting by the board."""

    env: ClassVar[type[GridEnv]]
    #: Options that make more boards, in words.
    more: ClassVar[str] = "`size`"

    @abstractmethod
    def _board(self, seed: int, *, larger: bool) -> Board | None:
        """The board of a seed, None where there is none that `max_turns` suffice for."""

    @abstractmethod
    def _turns(self) -> int:
        """Turns on a board of normal size."""

    def _known(self, split: Split) -> int | None:
        """How many boards a split has, where they can be counted."""
        return None

    def tasks(self, split: Split, count: int, seed: int = 0) -> list[Task]:
        """Distinct boards of a split; a board's content alone decides its split.

        Raises:
            UsageError: the split holds fewer boards; the message says how many there are.
        """
        known = self._known(split)
        found: list[Task] = []
        if known is None or count <= known:
            for task in self._walk(split, seed):
                if len(found) == count:
                    break
                found.append(task)
        if len(found) < count:
            there = known if known is not None else len(found)
            raise UsageError(
                f"env {self.name!r} has {there} boards in split {split.value!r}, {count} were asked for; "
                f"ask for fewer or for more boards by {self.more}"
            )
        return found

    def _walk(self, split: Split, seed: int) -> Iterator[Task]:
        ood = split is Split.OOD
        turns = self._turns() + _OOD_EXTRA_TURNS * ood
        taken: set[Board] = set()
        misses = 0
        for board_seed in count_up(content_number(f"{self.name}/{seed}")):
            board = self._board(board_seed, larger=ood)
            fits = board is not None and (ood or split_of("\n".join(board)) is split)
            if board is None or not fits or board in taken:
                misses += 1
                if misses >= _PATIENCE:
                    return
                continue
            misses = 0
            taken.add(board)
            parameters = _Parameters(board=board, max_turns=turns)
            yield Task.create(self.name, split, board_seed, parameters.model_dump(mode="json"))

    @classmethod
    def make(cls, task: Task) -> GridEnv:
        """Build the env of a task.

        Raises:
            BadTaskError: the task holds no board.
        """
        return cls.env(task)


class FrozenLakeWorld(GridWorld):
    """Boards of `FrozenLakeOptions`; `ood` boards have one more row, column and hole, and two more turns."""

    name: ClassVar[str] = "frozenlake"
    isolated: ClassVar[bool] = False
    env = FrozenLakeEnv
    more = "`size` or `random_corners`"

    def __init__(self, options: FrozenLakeOptions) -> None:
        self.options = options

    @classmethod
    def configure(cls, options: Mapping[str, Any]) -> FrozenLakeWorld:
        """Build from options.

        Raises:
            UsageError: an option is unknown or out of range.
        """
        return cls(FrozenLakeOptions.parse(cls.name, options))

    def _turns(self) -> int:
        return self.options.max_turns

    def _board(self, seed: int, *, larger: bool) -> Board | None:
        options = self.options
        board = layouts.lake(seed, options.size + larger, options.holes + larger, random_corners=options.random_corners)
        return board if board is not None and self._solvable(board, larger) else None

    def _solvable(self, board: Board, larger: bool) -> bool:
        moves = layouts.lake_moves(board)
        return moves is not None and moves <= self._turns() + _OOD_EXTRA_TURNS * larger

    def _known(self, split: Split) -> int | None:
        larger = split is Split.OOD
        size, holes = self.options.size + larger, self.options.holes + larger
        if layouts.lake_count(size, holes) > _COUNTED:
            return None
        every = layouts.all_lakes(size, holes, random_corners=self.options.random_corners)
        boards = (board for board in every if self._solvable(board, larger))
        return sum(larger or split_of("\n".join(board)) is split for board in boards)


class SokobanWorld(GridWorld):
    """Rooms of `SokobanOptions`; `ood` rooms have one more row and column, and two more turns."""

    name: ClassVar[str] = "sokoban"
    isolated: ClassVar[bool] = False
    env = SokobanEnv

    def __init__(self, options: SokobanOptions) -> None:
        self.options = options

    @classmethod
    def configure(cls, options: Mapping[str, Any]) -> SokobanWorld:
        """Build from options.

        Raises:
            UsageError: an option is unknown or out of range.
        """
        return cls(SokobanOptions.parse(cls.name, options))

    def _turns(self) -> int:
        return self.options.max_turns

    def _board(self, seed: int, *, larger: bool) -> Board | None:
        board = layouts.sokoban(seed, self.options.size + larger, self.options.boxes)
        moves = layouts.sokoban_moves(board) if board is not None else None
        return board if moves is not None and 0 < moves <= self._turns() + _OOD_EXTRA_TURNS * larger else None
