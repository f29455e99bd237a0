"""Stage 5: put together student, teacher, source and trainer on one copy of the base weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from agent.engines.transformers import TransformersEngine
from agent.episode import Episode
from distill.adapters import continue_lora
from distill.backbone import Backbone
from distill.config import DistillConfig
from distill.monitor import StepMetrics
from distill.source import OnPolicySource
from distill.teacher import FrozenTeacher
from distill.trainer import FitResult, Trainer
from engrain.errors import EngineCannotTrainError
from envs.base import Task
from memory.records import CheckpointRecord, Knowledge


def consolidate(
    engine: TransformersEngine,
    tasks: Sequence[Task],
    knowledge: Knowledge,
    config: DistillConfig,
    folder: Path,
    *,
    parent: CheckpointRecord | None = None,
    on_step: Callable[[StepMetrics], None] | None = None,
    validate: Callable[[TransformersEngine, int], float] | None = None,
    on_episode: Callable[[Episode], None] | None = None,
) -> FitResult:
    """Distil `knowledge` into an adapter on the engine's base model, resuming what `folder` holds.

    The teacher is the parent checkpoint (the base model in the first round) with the knowledge in its context; the
    student starts from the same weights. The engine is left with the base model loaded.

    Args:
        engine: gives its base weights for the time of the training.
        tasks: the training pool.
        knowledge: what to distil.
        config: settings of the job.
        folder: the run's folder.
        parent: the checkpoint to go on from.
        on_step: told every step.
        validate: scores the student, by an engine that samples from it, after a number of steps.
        on_episode: told every episode the student plays.

    Raises:
        EngineCannotTrainError: full weights were asked for; that needs a second copy and a plain model.
    """
    if config.lora is None:
        raise EngineCannotTrainError(
            "lora=None: `engrain improve` trains adapters; use the distill.Trainer API for full weights"
        )
    engine.load(None)
    student = continue_lora(engine.network, config.lora, config.seed, Path(parent.path) if parent else None)
    try:
        sampler = TransformersEngine.wrap(student, engine.tokenizer, name=engine.model)
        source = OnPolicySource(
            tasks,
            sampler,
            knowledge.text,
            batch_size=config.batch_size,
            sampling=config.sampling,
            seed=config.seed,
            namespace=f"{folder.name}/opcd",
            on_episode=on_episode,
        )
        teacher = FrozenTeacher(Backbone(student))
        trainer = Trainer(
            student,
            teacher,
            source,
            config,
            folder,
            base_model=engine.model,
            parent=parent.id if parent else None,
            knowledge=knowledge.id,
            decode=source.renderer.decode,
        )
        return trainer.fit(validate=(lambda step: validate(sampler, step)) if validate else None, on_step=on_step)
    finally:
        student.unload()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
