"""Boards of the grid games as rows of text, made from a seed alone, and their shortest solutions.

TextArena draws FrozenLake's holes from Python's global generator, and its Sokoban maker keeps its search in module
state. Here the first is drawn from a generator of its own, the same board for the same seed, and the second is run
by one thread at a time, so a board never depends on what else runs.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import combinations
from math import comb
from typing import TypeVar

Board = tuple[str, ...]
Cell = tuple[int, int]
_State = TypeVar("_State", bound=Hashable)

MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))
_SOKOBAN_LOCK = threading.Lock()
_TRIES = 100


def lake(seed: int, size: int, holes: int, *, random_corners: bool = False) -> Board | None:
    """The FrozenLake board that TextArena makes of `seed`: `P` start, `G` goal, `H` holes, spaces.

    The start is the top left corner or, with `random_corners`, any; the goal is the corner opposite. None where no
    board with a way through is found.
    """
    generator = random.Random(seed)  # noqa: S311 - a game, not a secret
    start = generator.choice(_corners(size)) if random_corners else (0, 0)
    for _ in range(_TRIES):
        board = _lake_with(size, start, generator.sample(_lake_cells(size, start), holes))
        if lake_moves(board) is not None:
            return board
    return None


def all_lakes(size: int, holes: int, *, random_corners: bool = False) -> Iterator[Board]:
    """Every FrozenLake board with a way through, out of `lake_count` placements for each start."""
    for start in _corners(size) if random_corners else [(0, 0)]:
        for placed in combinations(_lake_cells(size, start), holes):
            board = _lake_with(size, start, placed)
            if lake_moves(board) is not None:
                yield board


def lake_count(size: int, holes: int) -> int:
    """How many ways there are to place the holes, passable or not."""
    return comb(size * size - 2, holes)


def lake_moves(board: Board) -> int | None:
    """Moves of the shortest way from `P` to `G`, None where there is none."""
    goal, solid = _cells(board, "G"), _cells(board, "H")

    def next_states(at: Cell) -> Iterator[Cell]:
        for row, column in MOVES:
            to = (at[0] + row, at[1] + column)
            if 0 <= to[0] < len(board) and 0 <= to[1] < len(board) and to not in solid:
                yield to

    return _shortest(next(iter(_cells(board, "P"))), next_states, lambda at: at in goal)


def sokoban(seed: int, size: int, boxes: int) -> Board | None:
    """The Sokoban room that TextArena makes of `seed`.

    `#` wall, `_` floor, `O` target, `X` box, `*` box on a target, `P` player, `S` player on a target. None where it
    makes none.
    """
    from textarena.envs.Sokoban.utils import generate_room

    with _SOKOBAN_LOCK:
        try:
            fixed, state, _ = generate_room(dim=(size, size), num_steps=int(1.7 * 2 * size), num_boxes=boxes, seed=seed)
        except (RuntimeError, RuntimeWarning):
            return None
    signs = {(2, 4): "*", (2, 3): "*", (2, 5): "S"}
    plain = {0: "#", 1: "_", 2: "O", 3: "*", 4: "X", 5: "P"}
    return tuple(
        "".join(signs.get((int(under), int(on)), plain[int(on)]) for under, on in zip(below, row, strict=True))
        for below, row in zip(fixed, state, strict=True)
    )


def sokoban_moves(board: Board) -> int | None:
    """Moves (pushes included) of the shortest solution, None where there is none."""
    walls = _cells(board, "#")
    targets = _cells(board, "O*S")
    start = (next(iter(_cells(board, "PS"))), _cells(board, "X*"))

    def next_states(state: tuple[Cell, frozenset[Cell]]) -> Iterator[tuple[Cell, frozenset[Cell]]]:
        at, boxes = state
        for row, column in MOVES:
            to = (at[0] + row, at[1] + column)
            beyond = (to[0] + row, to[1] + column)
            if to in walls:
                continue
            if to not in boxes:
                yield to, boxes
            elif beyond not in walls and beyond not in boxes:
                yield to, (boxes - {to}) | {beyond}

    return _shortest(start, next_states, lambda state: state[1] <= targets)


def _corners(size: int) -> list[Cell]:
    return [(0, 0), (0, size - 1), (size - 1, 0), (size - 1, size - 1)]


def _opposite(size: int, corner: Cell) -> Cell:
    return (size - 1 - corner[0], size - 1 - corner[1])


def _lake_cells(size: int, start: Cell) -> list[Cell]:
    kept = {start, _opposite(size, start)}
    return [(i, j) for i in range(size) for j in range(size) if (i, j) not in kept]


def _lake_with(size: int, start: Cell, holes: Iterable[Cell]) -> Board:
    signs = dict.fromkeys(holes, "H") | {start: "P", _opposite(size, start): "G"}
    return tuple("".join(signs.get((i, j), " ") for j in range(size)) for i in range(size))


def _cells(board: Board, signs: str) -> frozenset[Cell]:
    return frozenset((i, j) for i, row in enumerate(board) for j, sign in enumerate(row) if sign in signs)


def _shortest(
    start: _State, next_states: Callable[[_State], Iterable[_State]], solved: Callable[[_State], bool]
) -> int | None:
    seen, queue = {start}, deque([(start, 0)])
    while queue:
        state, moves = queue.popleft()
        if solved(state):
            return moves
        for following in next_states(state):
            if following not in seen:
                seen.add(following)
                queue.append((following, moves + 1))
    return None
