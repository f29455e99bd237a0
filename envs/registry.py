"""Worlds by name: the built-in ones, those of other distributions (entry points `engrain.envs`), this process's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from envs.base import Env, Task, World
from envs.errors import BadPluginError, UnknownEnvError, UsageError
from envs.plugins import Plugins

GROUP = "engrain.envs"

#: Built-ins stand here too, so that a plain checkout that was never installed finds them. Imported on first use.
WORLDS = Plugins(
    GROUP,
    "env",
    {
        "math": "envs.math:MathWorld",
        "textworld": "envs.textworld:TextWorldWorld",
        "frozenlake": "envs.grid:FrozenLakeWorld",
        "sokoban": "envs.grid:SokobanWorld",
    },
)

_W = TypeVar("_W", bound=type[World])


def names() -> list[str]:
    """Names of all worlds, sorted."""
    return WORLDS.names()


def register_world(world_class: _W) -> _W:
    """Add a world to this process under its `name`, and return it: a decorator, or a plain call.

    Its episodes are played in this process, whatever `isolated` says, since no other one knows it. A world that an
    entry point of the group `engrain.envs` names needs no call, and the command line knows it too.

    Raises:
        UsageError: it has no `name`, or that of a built-in world.
    """
    name = getattr(world_class, "name", None)
    if not isinstance(name, str) or not name:
        raise UsageError(f'{world_class.__name__} has no name; set `name = "..."` in the class')
    WORLDS.register(name, world_class)
    return world_class


def _world_class(name: str) -> type[World]:
    found = WORLDS.find(name)
    if found is None:
        raise UnknownEnvError(f"unknown env {name!r}; known envs: {', '.join(names())}")
    if not (isinstance(found, type) and issubclass(found, World)):
        raise BadPluginError(f"env {name!r}: {found!r} is not a World")
    return found


def world(name: str, options: Mapping[str, Any] | None = None) -> World:
    """Configure the world of that name.

    Raises:
        UnknownEnvError: there is none; the message lists the known names.
        UsageError: an option is unknown or out of range.
        BadPluginError: another distribution's world does not import.
    """
    return _world_class(name).configure(options or {})


def make(task: Task) -> Env:
    """Build the env that plays `task`, from the task alone.

    Raises:
        UnknownEnvError: the task's env is not registered here.
        BadTaskError: its parameters do not describe an episode.
    """
    return _world_class(task.env).make(task)


def isolated(task: Task) -> bool:
    """Whether rollouts are to play this task in a worker process, as its world says.

    Raises:
        UnknownEnvError: the task's env is not registered here.
    """
    return _world_class(task.env).isolated and not WORLDS.here(task.env)
