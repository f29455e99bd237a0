"""`engrain play --web`: the same games in the browser, for one person or several."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing

from engrain.cli.serving import check_extra, serve
from engrain.match import AgentMatch
from engrain.play import any_seed, draw_tasks
from envs import registry
from envs.base import Split, Task
from envs.errors import UsageError
from memory.store import Store


def check_web(
    env: str | None, options: Sequence[str] | None, agent: str | None, looks: bool, episodes: int, as_json: bool
) -> None:
    """Refuse what the browser does not show, and a missing extra.

    Raises:
        UsageError: naming it.
        MissingPackageError: the extra is not installed.
    """
    if looks:
        raise UsageError("--web plays games: leave out --compare, --gap and --why, which look at them in the terminal")
    if agent is not None:
        raise UsageError(
            "without --co no agent plays in the browser: add it, or leave out --knowledge and --checkpoint"
        )
    if as_json or episodes != 1:
        raise UsageError("--web plays as many games as people begin there: leave out --episodes and --json")
    if env is None and options:
        raise UsageError(f"-o {options[0]} is an option of a world: name it, as in `engrain play math -o {options[0]}`")
    check_extra()


def serve_games(
    store: Store,
    env: str | None,
    options: Mapping[str, str],
    seed: int | None,
    split: Split | None,
    agent: Callable[[Task, int], AgentMatch] | None,
    host: str | None,
    port: int | None,
) -> None:
    """Serve the pages until Ctrl-C; games that are under way then are kept as left.

    Raises:
        UsageError: there is no such world, it has no task, or nobody can listen there.
    """
    from engrain.ui.games import Games, Place, places_of

    if env is not None:
        draw_tasks(env, options, split, 1, seed or 0)
    places = [Place(env, dict(options))] if env is not None else places_of(store, registry.names())
    seeds = iter(any_seed, None) if seed is None else itertools.count(seed)
    with closing(Games(store, places, seeds, split, agent)) as games:
        serve(store, host, port, "games to play are", "/play", games)
