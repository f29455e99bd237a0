"""What `evidence.py` compares: the worlds, the settings of a world and seed, the arms, and the placebo texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import helpdesk
import instructions
import torch
from torch import Tensor

from agent.episode import SamplingParams
from distill.config import DistillConfig
from distill.objective import forward_kl, reverse_kl
from engrain import register_objective
from engrain.config import ImproveConfig, OodSpec, WorldSpec
from engrain.demo import MODEL, demo_config
from envs.base import Split
from memory.render import render_knowledge

__all__ = [
    "ARMS",
    "COACH",
    "PLACEBOS",
    "WORLDS",
    "Arm",
    "arms_of",
    "helpdesk",
    "instructions",
    "planned",
    "settings_of",
]

COACH = "qwen2.5-coder-1.5b"


@dataclass(frozen=True)
class Place:
    """A world of the evidence."""

    world: WorldSpec
    max_tokens: int  # of one reply
    written: str | None = None  # the prompt that is distilled; None: knowledge is extracted from play
    budget_tokens: int = 128
    admissible: bool = False  # each reply is one of the commands that the world lists
    without: tuple[str, ...] = ()  # texts whose arms are not planned here
    extra: bool = False  # run only when it is named: for a GPU, or one more of its kind
    seeds: tuple[int, ...] = (0, 1, 2)


_MATH_SEEDS = (3, 4, 5)  # figures of test tasks of 0 to 2 were seen while objectives were chosen

WORLDS: dict[str, Place] = {
    "sums": Place(WorldSpec(env="math", options={"convention": "answer_tag"}), 32, seeds=_MATH_SEEDS),
    "products": Place(
        WorldSpec(
            env="math",
            options={"generators": "products", "convention": "json", "ood_generators": "sums,differences,chains"},
        ),
        32,
        seeds=_MATH_SEEDS,
    ),
    "chains": Place(
        WorldSpec(
            env="math",
            options={"generators": "chains", "convention": "boxed", "ood_generators": "sums,differences,products"},
        ),
        32,
        seeds=_MATH_SEEDS,
        extra=True,
    ),
    "helpdesk": Place(WorldSpec(env="helpdesk"), 12, written=helpdesk.PROMPT),
    # The shortest game: with every ingredient at hand the meal must be prepared and eaten. Measuring one
    # student takes 20 to 60 minutes on one core, so placebos and the larger model stay with the other worlds.
    "cooking": Place(
        WorldSpec(env="textworld", options={"game": "cooking", "take": "0", "max_turns": "4"}),
        16,
        budget_tokens=256,
        admissible=True,
        without=("irrelevant", "wrong", "coach"),
    ),
    # The paper's 3 x 3 lake has a dozen boards for tests; 128 need a larger one.
    "frozenlake": Place(
        WorldSpec(env="frozenlake", options={"size": "4", "holes": "3", "random_corners": "true", "max_turns": "8"}),
        64,
        budget_tokens=256,
        extra=True,
    ),
    "sokoban": Place(
        WorldSpec(env="sokoban", options={"max_turns": "8"}),
        64,
        budget_tokens=256,
        extra=True,
    ),
}

#: Fluent texts that cannot help: one is about something else, one is wrong.
PLACEBOS = {
    "irrelevant": render_knowledge(
        [
            "Water boils at a lower temperature on high mountains than at the sea.",
            "A good map shows where north is before it shows anything else.",
        ]
    ),
    "wrong": render_knowledge(
        [
            "Answers count only when they are written as words in a sentence that begins with 'Perhaps'.",
            "Always add seven to the result before you say it.",
        ]
    ),
}

#: Overlap of student and teacher, sum_v min(s, t), from which on the crossing objective takes reverse KL.
_CROSSED = 0.5


def crossing(logp_s_PV: Tensor, logp_t_PV: Tensor) -> tuple[Tensor, Tensor]:
    """Forward KL at positions where student and teacher hardly overlap, reverse KL where they do.

    The candidate for an `auto` objective: the pull of forward KL where reverse KL has none, the paper's elsewhere.
    """
    overlap_P = torch.minimum(logp_s_PV, logp_t_PV).exp().sum(-1)
    crossed_P = overlap_P >= _CROSSED
    d_forward_P, g_forward_PV = forward_kl(logp_s_PV, logp_t_PV)
    d_reverse_P, g_reverse_PV = reverse_kl(logp_s_PV, logp_t_PV)
    return (
        torch.where(crossed_P, d_reverse_P, d_forward_P),
        torch.where(crossed_P[:, None], g_reverse_PV, g_forward_PV),
    )


register_objective("crossing", crossing)


@dataclass(frozen=True)
class Arm:
    """One way to use a knowledge text. Without `distill` nothing is trained."""

    title: str
    text: str | None = "filtered"  # filtered, unfiltered, traces, irrelevant, wrong or coach; None: no knowledge
    in_context: bool = False  # whether the text stands in the context when it is measured
    distill: Mapping[str, Any] | None = None
    extra: bool = False  # run only when it is named: `recovery.py` has measured it with three seeds
    tokens_of: str | None = None  # ends with the step in which it has sampled as many tokens as that arm


def _opcd(objective: str, **more: Any) -> Mapping[str, Any]:
    return {"method": "opcd", "objective": objective, **more}


ARMS: dict[str, Arm] = {
    "bare": Arm("bare", text=None),
    "in-context": Arm("knowledge in context", in_context=True),
    "in-context-unfiltered": Arm("unfiltered knowledge in context", "unfiltered", in_context=True),
    "in-context-traces": Arm("raw traces in context", "traces", in_context=True),
    "in-context-irrelevant": Arm("placebo in context: irrelevant", "irrelevant", in_context=True),
    "in-context-wrong": Arm("placebo in context: wrong", "wrong", in_context=True),
    "opcd-forward_kl": Arm("OPCD, forward KL", distill=_opcd("forward_kl")),
    "opcd-crossing": Arm("OPCD, forward KL first, reverse KL once they overlap", distill=_opcd("crossing"), extra=True),
    "off_policy": Arm("off-policy context distillation", distill={"method": "off_policy", "objective": "forward_kl"}),
    "opcd-tokens": Arm(
        "OPCD, forward KL, stopped at off-policy's tokens",
        distill=_opcd("forward_kl"),
        tokens_of="off_policy",
    ),
    "sft": Arm("SFT on the teacher's replies", distill={"method": "sft", "objective": "cross_entropy"}),
    "opcd-reverse_kl": Arm("OPCD, reverse KL (the paper's)", distill=_opcd("reverse_kl")),
    "opcd-jsd": Arm("OPCD, JSD 0.5", distill=_opcd("jsd")),
    "opcd-skew_kl": Arm("OPCD, skew KL 0.1", distill=_opcd("skew_kl"), extra=True),
    "opcd-topk": Arm("OPCD, top-256 reverse KL with tail", distill=_opcd("topk"), extra=True),
    "opcd-live": Arm(
        "OPCD, forward KL, the teacher learns too", distill=_opcd("forward_kl", teacher_kind="ema", ema_rate=1.0)
    ),
    "opcd-unfiltered": Arm("OPCD, forward KL, unfiltered knowledge", "unfiltered", distill=_opcd("forward_kl")),
    "opcd-irrelevant": Arm("OPCD by force, irrelevant placebo", "irrelevant", distill=_opcd("forward_kl")),
    "opcd-wrong": Arm("OPCD by force, wrong placebo", "wrong", distill=_opcd("forward_kl")),
    "in-context-coach": Arm("the larger model's knowledge in context", "coach", in_context=True),
    "cross-size": Arm(
        "OPCD, forward KL, the larger model with its text teaches", "coach", distill=_opcd("forward_kl", teacher=COACH)
    ),
}


def arms_of(place: str) -> list[str]:
    """Names of the arms that make sense on a world: a written prompt is nobody's own, unfiltered or as traces."""
    played = WORLDS[place].written is None
    return [
        name
        for name, arm in ARMS.items()
        if played or not (arm.text in ("unfiltered", "traces") or name == "in-context-coach")
    ]


def planned(place: str) -> list[str]:
    """Names of the arms that a world is asked for when none are named."""
    return [name for name in arms_of(place) if not ARMS[name].extra and ARMS[name].text not in WORLDS[place].without]


def settings_of(place: str, seed: int, model: str = MODEL, *, coach: str | None = None) -> ImproveConfig:
    """The demo's settings on a world, with 128 test tasks and other worlds; the model or a coach reads the episodes."""
    found, base = WORLDS[place], demo_config(seed=seed)
    plain = OodSpec(env="math", options=found.world.options if found.world.env == "math" else {}, tasks=48)
    replies = {"max_tokens": found.max_tokens, "admissible_only": found.admissible}
    distill = {
        **base.distill.model_dump(),
        "sampling": {"temperature": 1.0, **replies},
    }
    return base.model_copy(
        update={
            "model": model,
            "world": found.world,
            "play": base.play.model_copy(
                update={"sampling": SamplingParams(temperature=0.7, **replies)}
            ),
            "extract": base.extract.model_copy(
                update={
                    "embeddings": "none", "budget_tokens": found.budget_tokens, "coach": coach
                }
            ),
            "evaluation": base.evaluation.model_copy(
                update={
                    "test_tasks": 128,
                    "sampling": SamplingParams(temperature=0.0, **replies),
                    "ood": (
                        plain,
                        OodSpec(env="instructions", split=Split.TEST, tasks=100),
                    ),
                }
            ),
            "distill": DistillConfig.model_validate(distill),
        }
    )  # fmt: skip
