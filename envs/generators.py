"""Questions drawn without end from reasoning-gym's generators.

Only generators whose answer is one number, expression or word can be judged by comparing answers; puzzles with many
right answers cannot.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from envs.errors import UsageError
from envs.splits import content_number

_TWO_BY_TWO = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}
#: Where reasoning-gym's own defaults are too hard for models small enough to run anywhere.
_EASIER: dict[str, dict[str, Any]] = {
    "basic_arithmetic": {**_TWO_BY_TWO, "allow_parentheses": False, "allow_negation": False},
    "chain_sum": _TWO_BY_TWO,
    "products": {**_TWO_BY_TWO, "min_digits": 1},
}
#: Generators whose question is one expression, asked here in few words: fewer tokens to read and to train on.
_EXPRESSIONS = frozenset(_EASIER)
#: Items taken from one dataset object; some generators lay out that many in advance.
_CHUNK = 500
#: Expressions in a row that a preset may leave out; with more the parameters leave it (almost) nothing.
_LEFT_OUT = 20_000


@dataclass(frozen=True)
class Preset:
    """A name of ours for a reasoning-gym dataset with parameters, kept to expressions without `without`."""

    dataset: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    without: str = ""


PRESETS = {
    "sums": Preset("chain_sum", without="-"),
    "differences": Preset("chain_sum", without="+"),
    "chains": Preset("chain_sum", {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}),
}


@dataclass(frozen=True)
class Question:
    """One question, its right answer and where it came from (a generator's name or a file's)."""

    text: str
    answer: str
    source: str


def draw(names: Sequence[str], difficulty: Mapping[str, Mapping[str, Any]], seed: int) -> Iterator[Question]:
    """Questions of the named generators in turn, for ever, possibly repeating; the order is fixed by `seed`.

    Raises:
        UsageError: a generator or one of its parameters is unknown, or a value is refused by it.
    """
    streams = [_draw_one(name, difficulty.get(name, {}), seed) for name in names]
    while True:
        for stream in streams:
            yield next(stream)


def _draw_one(name: str, difficulty: Mapping[str, Any], seed: int) -> Iterator[Question]:
    preset = PRESETS.get(name, Preset(name))
    parameters = {**_EASIER.get(preset.dataset, {}), **preset.parameters}
    parameters |= _typed(name, preset.dataset, difficulty)
    start = content_number(f"{name}/{seed}")
    left_out = 0
    while True:
        for entry in _entries(name, preset.dataset, {**parameters, "seed": start, "size": _CHUNK}):
            expression = entry["metadata"].get("expression") if preset.dataset in _EXPRESSIONS else None
            if preset.without and expression and preset.without in expression:
                left_out += 1
                if left_out == _LEFT_OUT:
                    raise UsageError(
                        f"generator {name!r} with these parameters makes hardly an expression without "
                        f"{preset.without!r}; ask for fewer terms or use {preset.dataset!r} itself"
                    )
                continue
            left_out = 0
            text = f"What is {expression}?" if expression else str(entry["question"]).strip()
            yield Question(text, str(entry["answer"]), name)
        start += _CHUNK


def _entries(name: str, dataset_name: str, parameters: Mapping[str, Any]) -> Iterator[Any]:
    from reasoning_gym.factory import create_dataset

    try:
        yield from create_dataset(dataset_name, **parameters)
    except Exception as error:  # generators check some parameters and stumble over others
        raise UsageError(f"generator {name!r} refuses its parameters: {error}") from error


def _typed(name: str, dataset_name: str, difficulty: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters in the types of the generator's own defaults; strings come from the command line."""
    import reasoning_gym  # noqa: F401 - fills the factory's table
    from reasoning_gym.factory import DATASETS

    if dataset_name not in DATASETS:
        near = difflib.get_close_matches(name, [*PRESETS, *DATASETS], n=5, cutoff=0.4)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise UsageError(f"unknown generator {name!r}{hint}; presets: {', '.join(PRESETS)}")
    defaults = {item.name: item.default for item in fields(DATASETS[dataset_name][1])}
    unknown = sorted(set(difficulty) - set(defaults))
    if unknown:
        raise UsageError(f"generator {name!r} has no parameter {unknown[0]!r}; it has: {', '.join(defaults)}")
    try:
        return {key: _cast(value, defaults[key]) for key, value in difficulty.items()}
    except ValueError as error:
        raise UsageError(f"difficulty of generator {name!r}: {error}") from error


def _cast(value: Any, default: Any) -> Any:
    if not isinstance(value, str) or isinstance(default, str):
        return value
    if isinstance(default, bool):
        if value.lower() not in {"true", "false", "1", "0"}:
            raise ValueError(f"{value!r} is neither true nor false")
        return value.lower() in {"true", "1"}
    if isinstance(default, int | float):
        return type(default)(value)
    if isinstance(default, tuple | list):
        return [part.strip() for part in value.split("|")]
    return value
