"""Stage 5: put together student, teacher, source and trainer on one copy of the base weights.

Under `accelerate launch` every process trains. A script may call `consolidate` in each of them; or the main process
alone does all the rest of a command, and the others `join` it, train what it trains, sample what it has them sample
(`distill.replicas`), and leave when it says `dismiss`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from agent.engines.base import Engine, asleep
from agent.engines.transformers import TransformersEngine
from agent.episode import Episode
from distill.adapters import continue_lora
from distill.backbone import Backbone
from distill.baselines import MixedSource, TeacherSource
from distill.config import DistillConfig
from distill.distributed import from_main
from distill.monitor import StepMetrics
from distill.parallel import Sharded, current
from distill.partial import PrefixSource
from distill.refresh import RefreshedSource, drop_syncs
from distill.replicas import replicated, serve
from distill.source import Batch, OnPolicySource, Source
from distill.teacher import EmaTeacher, FrozenTeacher, check_vocabulary
from distill.trackers import open_trackers
from distill.trainer import FitResult, Trainer
from engrain.errors import EngineCannotTrainError
from envs.base import Task
from memory.records import CheckpointRecord, Knowledge


@dataclass(frozen=True)
class _Job:
    """What all processes must know of a training, in a form that can be sent."""

    tasks: Sequence[Task]
    knowledge: Knowledge
    config: DistillConfig
    folder: Path
    parent: CheckpointRecord | None
    episodes: Sequence[Episode] | None
    sampled_elsewhere: bool


def consolidate(
    engine: TransformersEngine,
    tasks: Sequence[Task],
    knowledge: Knowledge,
    config: DistillConfig,
    folder: Path,
    *,
    parent: CheckpointRecord | None = None,
    on_step: Callable[[StepMetrics], None] | None = None,
    validate: Callable[[Engine, int], float] | None = None,
    on_episode: Callable[[Episode], None] | None = None,
    teacher: TransformersEngine | None = None,
    episodes: Sequence[Episode] | None = None,
    sampler: Engine | None = None,
    track: Sequence[str] = (),
) -> FitResult:
    """Distil `knowledge` into an adapter on the engine's base model, resuming what `folder` holds.

    The teacher has the knowledge in its context and the weights that `config.teacher_kind` names; the student starts
    from the parent checkpoint, or from the base model. The engines are left with the base model loaded.

    Args:
        engine: gives its base weights for the time of the training.
        tasks: the training pool.
        knowledge: what to distil.
        config: settings of the job.
        folder: the run's folder.
        parent: the checkpoint to go on from.
        on_step: told every step.
        validate: scores the student, by an engine that samples from it, after a number of steps.
        on_episode: told every episode that is played for training.
        teacher: a second model that teaches, the one that `config.teacher` names.
        episodes: stored ones, whose replies the student gives anew; nothing is played on policy then.
        sampler: another engine that samples for the student, refreshed every `config.sync_every` steps. It sleeps
            in between where it can.
        track: names of trackers to log to (`distill.trackers`); no part of what the run is.

    Of several processes the main one's arguments hold, and only its callbacks are called; `engine`, `teacher` and
    `sampler` are each process's own.

    Raises:
        EngineCannotTrainError: full weights were asked for, which need a second copy and a plain model; the parent is
            of another model; or `teacher` is not the one that the settings name.
        VocabularyMismatchError: the teacher's tokenizer is another one.
    """
    if config.lora is None:
        raise EngineCannotTrainError(
            "lora=None: `engrain improve` trains adapters; use the distill.Trainer API for full weights"
        )
    if parent is not None and parent.model != engine.model:
        raise EngineCannotTrainError(f"checkpoint {parent.id} is of {parent.model}, not {engine.model}; pass --model")
    given = teacher.model if teacher else None
    if config.teacher != given:
        raise EngineCannotTrainError(
            f"the settings name the teacher {config.teacher or 'none'} and this job was given {given or 'none'}; "
            "`engrain distill --teacher MODEL` loads one"
        )
    if teacher is not None:
        check_vocabulary(engine.tokenizer, teacher.tokenizer)
    job = from_main(lambda: _Job(tasks, knowledge, config, folder, parent, episodes, sampler is not None))
    if sampler is None:
        return _train(engine, job, teacher, None, validate, on_step, on_episode, track)
    with asleep(sampler):
        result = _train(engine, job, teacher, sampler, validate, on_step, on_episode, track)
    sampler.load(None)
    from_main(lambda: drop_syncs(folder))
    return result


def join(engine: TransformersEngine, teacher: TransformersEngine | None = None) -> None:
    """In a process that is not the main one: train what that one trains, and sample, until it dismisses this one.

    Raises:
        EngineCannotTrainError: the main process has another engine sample, and this one has none.
    """

    def train(job: _Job) -> None:
        if job.sampled_elsewhere:
            raise EngineCannotTrainError(
                "several processes cannot share one sampling engine on the command line; use engrain.consolidate"
            )
        _train(engine, job, teacher)

    serve(engine, train)


def _train(
    engine: TransformersEngine,
    job: _Job,
    teacher: TransformersEngine | None,
    sampler: Engine | None = None,
    validate: Callable[[Engine, int], float] | None = None,
    on_step: Callable[[StepMetrics], None] | None = None,
    on_episode: Callable[[Episode], None] | None = None,
    track: Sequence[str] = (),
) -> FitResult:
    config, folder, parent = job.config, job.folder, job.parent
    assert config.lora is not None  # noqa: S101 - checked by consolidate
    validated = from_main(lambda: validate is not None)
    parallel = current()
    engine.load(None)
    start = Path(parent.path) if parent else None
    student = continue_lora(engine.network, config.lora, config.seed, start, config.teacher_kind)
    try:
        own = TransformersEngine.wrap(student, engine.tokenizer, name=engine.model)

        def named(step: int) -> str | None:
            """What episodes call the weights of a step."""
            return f"{folder.name}@{step}" if step else (parent.id if parent else None)

        source = _source(own, job, on_episode, teacher, sampler, named)

        def sample(step: int) -> Batch:
            own.checkpoint = named(step)
            return source(step)

        def score(step: int) -> float:
            assert validate is not None  # noqa: S101 - the main process's own
            own.checkpoint = named(step)
            with replicated(own) as everywhere:
                return validate(everywhere, step)

        trainer = Trainer(
            student,
            _teacher(student, config, teacher),
            sample,
            config,
            folder,
            base_model=engine.model,
            parent=parent.id if parent else None,
            knowledge=job.knowledge.id,
            decode=own.renderer.decode,
            parallel=parallel,
        )
        with open_trackers(track, folder, config.model_dump(mode="json")) as tracker:
            return trainer.fit(
                validate=score if validated else None,
                meanwhile=lambda step: serve(own),
                on_step=on_step,
                tracker=tracker,
            )
    finally:
        if isinstance(parallel, Sharded):  # its layers are no plain modules any more
            engine.close()
            engine.load(None)
        else:
            student.unload()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _teacher(student: torch.nn.Module, config: DistillConfig, other: TransformersEngine | None) -> FrozenTeacher:
    if config.teacher_kind == "ema":
        return EmaTeacher(Backbone(student), config.ema_rate)
    return FrozenTeacher(Backbone(student if other is None else other.network))


def _source(
    own: TransformersEngine,
    job: _Job,
    on_episode: Callable[[Episode], None] | None,
    teacher: TransformersEngine | None,
    sampler: Engine | None,
    named: Callable[[int], str | None],
) -> Source:
    """The samples that `config.method` asks for."""
    tasks, knowledge, config, folder, episodes = job.tasks, job.knowledge, job.config, job.folder, job.episodes
    by_student, context = config.on_policy_samples, min(own.max_context, (teacher or own).max_context)
    sources: list[Source] = []
    if by_student:
        source: Source
        if episodes is not None:
            source = PrefixSource(
                episodes,
                sampler or own,
                knowledge.text,
                batch_size=by_student,
                sampling=config.sampling,
                seed=config.seed,
                max_context=context,
            )
        else:
            source = OnPolicySource(
                tasks,
                sampler or own,
                knowledge.text,
                batch_size=by_student,
                sampling=config.sampling,
                seed=config.seed,
                namespace=f"{folder.name}/opcd",
                max_context=context,
                on_episode=on_episode,
            )
        sources.append(
            source
            if sampler is None
            else RefreshedSource(source, sampler, own.network, folder, config.sync_every, named)
        )
    if by_student < config.batch_size:
        sources.append(
            TeacherSource(
                tasks,
                teacher or own,
                knowledge.text,
                knowledge_id=knowledge.id,
                model=own.network if teacher is None else None,
                batch_size=config.batch_size - by_student,
                sampling=config.sampling,
                seed=config.seed + by_student,  # in a mixed batch the two play other tasks
                only_successes=config.only_successes,
                renderer=own.renderer,
                namespace=f"{folder.name}/teacher",
                max_context=context,
                on_episode=on_episode,
            )
        )
    return sources[0] if len(sources) == 1 else MixedSource(*sources)
