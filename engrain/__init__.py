"""The application: the round, its gate, its settings and its command line.

What a program of your own needs stands here by name and is imported when it is first used, so that `import engrain`
costs nothing. Everything else may move between versions.

`agent.rollout.play` and `engrain.consolidate.consolidate` belong here too and do not stand here, since modules of these
names do.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agent.engines.base import Completion as Completion
    from agent.engines.base import Engine as Engine
    from agent.engines.transformers import TransformersEngine as TransformersEngine
    from agent.episode import Episode as Episode
    from agent.episode import Message as Message
    from agent.episode import SamplingParams as SamplingParams
    from agent.models.resolve import resolve as resolve
    from distill.config import DistillConfig as DistillConfig
    from distill.config import LoraSettings as LoraSettings
    from distill.registered import from_value as from_value
    from distill.registered import register_objective as register_objective
    from engrain.config import EvaluationConfig as EvaluationConfig
    from engrain.config import ExtractConfig as ExtractConfig
    from engrain.config import ImproveConfig as ImproveConfig
    from engrain.config import OodSpec as OodSpec
    from engrain.config import PlayConfig as PlayConfig
    from engrain.config import WorldSpec as WorldSpec
    from engrain.console import ConsoleListener as ConsoleListener
    from engrain.gate import Gain as Gain
    from engrain.gate import Rate as Rate
    from engrain.gate import Verdict as Verdict
    from engrain.gate import paired_gain as paired_gain
    from engrain.gate import wilson as wilson
    from engrain.judge import Judged as Judged
    from engrain.judge import Student as Student
    from engrain.loop import Round as Round
    from engrain.rounds import Listener as Listener
    from engrain.rounds import RoundResult as RoundResult
    from engrain.rounds import open_round as open_round
    from envs.base import Env as Env
    from envs.base import Observation as Observation
    from envs.base import Split as Split
    from envs.base import Step as Step
    from envs.base import Task as Task
    from envs.base import World as World
    from envs.errors import EngrainError as EngrainError
    from envs.errors import UsageError as UsageError
    from envs.options import Options as Options
    from envs.registry import register_world as register_world
    from envs.registry import world as world
    from memory.extract import Extractor as Extractor
    from memory.prompts import MARKER as MARKER
    from memory.prompts import fence as fence
    from memory.prompts import register_prompt as register_prompt
    from memory.records import Knowledge as Knowledge
    from memory.render import render_knowledge as render_knowledge
    from memory.store import Store as Store

_PLACES = {
    "agent.engines.base": ("Completion", "Engine"),
    "agent.engines.transformers": ("TransformersEngine",),
    "agent.episode": ("Episode", "Message", "SamplingParams"),
    "agent.models.resolve": ("resolve",),
    "distill.config": ("DistillConfig", "LoraSettings"),
    "distill.registered": ("from_value", "register_objective"),
    "engrain.config": ("EvaluationConfig", "ExtractConfig", "ImproveConfig", "OodSpec", "PlayConfig", "WorldSpec"),
    "engrain.console": ("ConsoleListener",),
    "engrain.gate": ("Gain", "Rate", "Verdict", "paired_gain", "wilson"),
    "engrain.judge": ("Judged", "Student"),
    "engrain.loop": ("Round",),
    "engrain.rounds": ("Listener", "RoundResult", "open_round"),
    "envs.base": ("Env", "Observation", "Split", "Step", "Task", "World"),
    "envs.errors": ("EngrainError", "UsageError"),
    "envs.options": ("Options",),
    "envs.registry": ("register_world", "world"),
    "memory.extract": ("Extractor",),
    "memory.prompts": ("MARKER", "fence", "register_prompt"),
    "memory.records": ("Knowledge",),
    "memory.render": ("render_knowledge",),
    "memory.store": ("Store",),
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    """Import one public name on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
