"""Which world, and who plays: asked when the command line does not say."""

from __future__ import annotations

import sys

from engrain.cli.play_input import Keyboard
from envs import registry
from envs.errors import UsageError

#: The built-in worlds in a player's words.
_WORLDS = {
    "math": "one question, one answer",
    "textworld": "a text adventure: find the ingredients and cook",
    "frozenlake": "cross the ice to the goal; nobody tells the rules",
    "sokoban": "push the box to its place; nobody tells the rules",
}

_SEATS = (
    ("watch", "the agent plays"),
    ("play", "you play"),
    ("both", "the agent suggests, you decide"),
)


def pick_world(keyboard: Keyboard) -> str:
    """The world's name.

    Raises:
        UsageError: nobody is there to ask.
        LeftError: the person leaves.
    """
    names = [*_WORLDS, *(name for name in registry.names() if name not in _WORLDS)]
    if not sys.stdin.isatty():
        raise UsageError(f"no world was named: write for instance `engrain play math`; there are {', '.join(names)}")
    return names[keyboard.choose("Which world?", [(name, _about(name)) for name in names])]


def _about(name: str) -> str:
    """What a world is, in few words: the first line of its class's own description."""
    if name in _WORLDS:
        return _WORLDS[name]
    try:
        world = registry.WORLDS.find(name)
    except Exception:  # whatever is wrong with it, the others can be picked
        return "does not load"
    return next(iter((world.__doc__ or "").strip().splitlines()), "")


def pick_seat(keyboard: Keyboard) -> str:
    """`watch`, `play` or `both`.

    Raises:
        LeftError: the person leaves.
    """
    return _SEATS[keyboard.choose("Who plays?", _SEATS)][0]
