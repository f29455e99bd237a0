"""Worlds by name: the built-in ones and those that other distributions register under `engrain.envs`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from envs.base import Env, Task, World
from envs.errors import EnvFailedError, UnknownEnvError

GROUP = "engrain.envs"

#: Built-ins stand here too, so that a plain checkout that was never installed finds them. Imported on first use.
BUILT_IN = {
    "math": "envs.math:MathWorld",
    "textworld": "envs.textworld:TextWorldWorld",
    "frozenlake": "envs.grid:FrozenLakeWorld",
    "sokoban": "envs.grid:SokobanWorld",
}


@cache
def _targets() -> dict[str, str]:
    others = {point.name: point.value for point in entry_points(group=GROUP)}
    return {**others, **BUILT_IN}


def names() -> list[str]:
    """Names of all worlds, sorted."""
    return sorted(_targets())


@cache
def _world_class(name: str) -> type[World]:
    target = _targets().get(name)
    if target is None:
        raise UnknownEnvError(f"unknown env {name!r}; known envs: {', '.join(names())}")
    module, _, attribute = target.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise EnvFailedError(f"env {name!r} does not load from {target!r}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, World)):
        raise EnvFailedError(f"env {name!r}: {target!r} is not a World")
    return found


def world(name: str, options: Mapping[str, Any] | None = None) -> World:
    """Configure the world of that name.

    Raises:
        UnknownEnvError: there is none; the message lists the known names.
        UsageError: an option is unknown or out of range.
        EnvFailedError: another distribution's world does not import.
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
    return _world_class(task.env).isolated
