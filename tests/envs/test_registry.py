import os
import subprocess
import sys
from pathlib import Path

import pytest

from envs import registry
from envs.base import Split, Task
from envs.errors import UnknownEnvError, UsageError

WORLDS = {
    "math": [{}, {"convention": "json"}, {"generators": "chain_sum"}],
    "textworld": [{}, {"game": "coin_collector"}, {"game": "custom"}],
    "frozenlake": [{"random_corners": True}, {"size": 4, "holes": 3, "max_turns": 8}],
    "sokoban": [{}],
}
CASES = [(name, options) for name, choices in WORLDS.items() for options in choices]


def content(task):
    """What makes two tasks the same to a player."""
    return str(task.parameters.get("question") or task.parameters.get("board") or task.seed)


def test_names_and_errors():
    assert registry.names() == sorted(registry.names())
    assert set(WORLDS) <= set(registry.names())
    with pytest.raises(UnknownEnvError, match=r"'chess'.*frozenlake, math"):
        registry.world("chess")
    with pytest.raises(UnknownEnvError):
        registry.make(Task.create("chess", Split.TEST, 0, {}))


def test_the_registry_imports_no_game_library():
    code = (
        "import sys; from envs import registry; registry.names();"
        "assert not {'textworld', 'textarena', 'reasoning_gym'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(Path.cwd())})


@pytest.mark.parametrize(("name", "options"), CASES)
def test_splits_share_no_task_whatever_the_seed(name, options):
    world = registry.world(name, options)
    size = 8
    pools = {split: [task for seed in (0, 1, 7) for task in world.tasks(split, size, seed)] for split in Split}
    for split, tasks in pools.items():
        assert all(task.env == name and task.split is split for task in tasks)
        others = [task for other, pool in pools.items() if other is not split for task in pool]
        assert not {task.id for task in tasks} & {task.id for task in others}
        assert not {content(task) for task in tasks} & {content(task) for task in others}


@pytest.mark.parametrize(("name", "options"), CASES)
def test_lists_are_distinct_repeatable_prefixes(name, options):
    world = registry.world(name, options)
    long = world.tasks(Split.TRAIN, 20, seed=3)
    assert len({content(task) for task in long}) == 20
    assert registry.world(name, options).tasks(Split.TRAIN, 8, seed=3) == long[:8]
    assert world.tasks(Split.TRAIN, 8, seed=4) != long[:8]
    assert world.tasks(Split.TRAIN, 0) == []


@pytest.mark.parametrize("name", sorted(WORLDS))
def test_tasks_survive_json_and_unknown_options_are_named(name):
    world = registry.world(name)
    task = world.tasks(Split.VALIDATION, 1)[0]
    again = Task.model_validate_json(task.model_dump_json())
    assert again.id == Task.create(again.env, again.split, again.seed, again.parameters).id == task.id
    assert registry.make(again).max_turns >= 1
    with pytest.raises(UsageError, match=r"'colour'.*known options: "):
        registry.world(name, {"colour": "red"})
