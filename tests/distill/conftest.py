"""A trainer around the tiny model and the real math world, as every test of training wants it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from agent.engines.transformers import TransformersEngine
from agent.episode import SamplingParams
from distill.adapters import continue_lora
from distill.backbone import Backbone
from distill.config import DistillConfig, LoraSettings
from distill.monitor import GuardConfig
from distill.source import OnPolicySource
from distill.teacher import EmaTeacher, FrozenTeacher
from distill.trainer import Trainer
from envs import registry
from envs.base import Split

KNOWLEDGE = "Experience from earlier tasks. Follow it:\n- Reply with one digit."


@pytest.fixture
def knowledge() -> str:
    return KNOWLEDGE


@pytest.fixture
def tasks() -> list[Any]:
    return registry.world("math", {"convention": "answer_tag"}).tasks(Split.TRAIN, 12, 0)


@pytest.fixture
def weights() -> Callable[[Trainer], dict[str, torch.Tensor]]:
    """A copy of all weights of a trainer's student, the teacher's adapter included."""
    return lambda trainer: {name: w.detach().clone() for name, w in trainer.student.model.named_parameters()}


@pytest.fixture
def make_trainer(tiny_model: Any, tiny_tokenizer: Any, tasks: Any, tmp_path: Path) -> Callable[..., Trainer]:
    """`make_trainer(folder, lora=True, parent=None, source=None, teacher=None, lineage=None, **config)`.

    `source(engine, config)` replaces the student's own play, `teacher` the student's own base; `lineage` is the id of
    the checkpoint that the run is said to start from, `parent` its folder.
    """

    def make(folder="run", *, lora=True, parent=None, source=None, teacher=None, lineage=None, **settings):
        defaults = {"steps": 4, "batch_size": 3, "learning_rate": 1e-2, "save_every": 2, "micro_batch_tokens": 200}
        config = DistillConfig(
            **defaults | settings,
            sampling=SamplingParams(max_tokens=6),
            lora=LoraSettings(rank=4) if lora else None,
            guard=GuardConfig(rising_steps=None, min_entropy_ratio=None, min_distinct_ratio=None),
        )
        model = tiny_model(initializer_range=0.2)
        student = continue_lora(model, config.lora, 0, parent, config.teacher_kind) if lora else model
        engine = TransformersEngine.wrap(student, tiny_tokenizer, name="tiny")
        if source is None:
            made = OnPolicySource(
                tasks, engine, KNOWLEDGE, batch_size=config.batch_size, sampling=config.sampling, seed=0
            )
        else:
            made = source(engine, config)
        if teacher is None:
            own = Backbone(student if lora else tiny_model(initializer_range=0.2))
            teacher = EmaTeacher(own, config.ema_rate) if config.teacher_kind == "ema" else FrozenTeacher(own)
        return Trainer(
            student,
            teacher,
            made,
            config,
            tmp_path / folder,
            base_model="tiny",
            parent=lineage,
            knowledge="k",
            decode=engine.renderer.decode,
        )

    return make
