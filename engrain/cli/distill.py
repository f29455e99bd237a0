"""`engrain distill`: bake a knowledge text, stored or written by hand, into an adapter; no gate, no other stage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from agent.episode import Episode, SamplingParams
from engrain.cli.common import (
    DEFAULT_MODEL,
    SAMPLER_SHARE,
    BaseUrlOption,
    EngineName,
    EngineOption,
    EnvArgument,
    JsonOption,
    ModelOption,
    OptionsOption,
    SeedOption,
    StoreOption,
    by_number,
    check_engines,
    find_checkpoint,
    find_knowledge,
    open_engine,
    open_sampler,
    open_store,
    world_options,
)
from engrain.cli.launched import TrackOption, joined
from envs.base import Split, Task
from envs.errors import UsageError
from memory.records import RunRecord, digest
from memory.render import count_tokens
from memory.store import Store


def command(
    env: EnvArgument,
    knowledge: Annotated[str, typer.Option("--knowledge", "-k", help="Knowledge version, its id, or a text file.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; an interrupted run there goes on.")],
    option: OptionsOption = None,
    model: ModelOption = DEFAULT_MODEL,
    parent: Annotated[str | None, typer.Option(help="Checkpoint to go on from.")] = None,
    method: Annotated[str, typer.Option(help="opcd, off_policy, sft (both on the teacher's play) or mixed.")] = "opcd",
    on_policy_fraction: Annotated[
        float | None, typer.Option(help="mixed: share of a batch that the student samples. Default: 0.5.")
    ] = None,
    from_episodes: Annotated[
        bool,
        typer.Option("--from-episodes", help="The student replies anew in stored training episodes of ENV; none made."),
    ] = False,
    round_: Annotated[
        str | None, typer.Option("--round", help="--from-episodes: only of this round (number or id).")
    ] = None,
    stage: Annotated[str | None, typer.Option(help="--from-episodes: only of this stage of a round.")] = None,
    success: Annotated[bool | None, typer.Option("--solved/--failed", help="--from-episodes: only these.")] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="forward_kl, reverse_kl (the paper), jsd, skew_kl or topk. Default: forward_kl."),
    ] = None,
    normalize: Annotated[str, typer.Option(help="sequence (each response alike) or token.")] = "sequence",
    teacher: Annotated[
        str | None, typer.Option(help="Another model that teaches, of the same vocabulary; default: the model itself.")
    ] = None,
    teacher_kind: Annotated[
        str, typer.Option(help="previous_checkpoint (--parent, or the base model), frozen (the base model) or ema.")
    ] = "previous_checkpoint",
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 50,
    batch_size: Annotated[int, typer.Option(min=1, help="Episodes a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Of the adapter.")] = 2e-4,
    rank: Annotated[int, typer.Option(min=1, help="Of the LoRA adapter; its alpha is twice that.")] = 16,
    tasks: Annotated[int, typer.Option("--tasks", "-n", min=1, help="Training tasks to draw from.")] = 256,
    validation: Annotated[
        int, typer.Option(min=0, help="Validation tasks that choose the checkpoint; 0 for none.")
    ] = 32,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the student's samples.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens a turn.")] = 256,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 10,
    engine: EngineOption = EngineName.TRANSFORMERS,
    base_url: BaseUrlOption = None,
    sync_every: Annotated[
        int | None,
        typer.Option(
            "--sync-every", min=1, metavar="STEPS", help="How often --engine or --base-url get the weights. Default: 1."
        ),
    ] = None,
    seed: SeedOption = 0,
    store: StoreOption = None,
    track: TrackOption = None,
    as_json: JsonOption = False,
) -> None:
    """Distil one text into an adapter, by OPCD or a baseline. Prints the chosen checkpoint's folder.

    The store keeps the text, the run with its episodes, and the checkpoint: `engrain memory lineage` shows them.
    """
    from agent.engines.base import Engine
    from agent.rollout import play
    from distill.config import DistillConfig, LoraSettings
    from distill.monitor import StepMetrics
    from distill.replicas import dismiss
    from engrain.console import ConsoleListener
    from engrain.consolidate import consolidate
    from engrain.runs import begin_run, finish_run, keep_episode
    from envs import registry

    picked = {"--round": round_, "--stage": stage, "--solved/--failed": success}
    if not from_episodes and (needless := [name for name, value in picked.items() if value is not None]):
        raise UsageError(f"{needless[0]} picks stored episodes: add --from-episodes, or leave it out")
    check_engines(engine, base_url, sync_every=sync_every)
    if on_policy_fraction is not None and method != "mixed":
        raise UsageError(f"--on-policy-fraction {on_policy_fraction:g} is for --method mixed, not {method}")
    config = DistillConfig.model_validate(
        {
            "method": method,
            **({} if on_policy_fraction is None else {"on_policy_fraction": on_policy_fraction}),
            "objective": objective,
            "normalize": normalize,
            "teacher": teacher,
            "teacher_kind": teacher_kind,
            "steps": steps,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "lora": LoraSettings(rank=rank, alpha=2 * rank),
            "sampling": SamplingParams(temperature=temperature, max_tokens=max_tokens),
            "save_every": save_every,
            **({} if sync_every is None else {"sync_every": sync_every}),
            "seed": seed,
        }
    )
    if joined(model, teacher, track):
        return
    elsewhere = bool(base_url) or engine is not EngineName.TRANSFORMERS
    for name, given in (("--from-episodes is", from_episodes), ("--engine and --base-url are", elsewhere)):
        if given and not config.on_policy_samples:
            raise UsageError(f"{name} for what the student samples, and with --method {method} it samples none")
    played = not from_episodes or config.on_policy_samples < batch_size  # whether an env is needed to train
    world = registry.world(env, world_options(option)) if played or validation else None
    pool = world.tasks(Split.TRAIN, tasks, seed) if world and played else []
    held_out = world.tasks(Split.VALIDATION, validation, seed) if world and validation else []
    with open_store(store) as memory:
        text = find_knowledge(knowledge, memory)
        start = find_checkpoint(parent, memory, model) if parent else None
        stored = _stored(memory, env, model, round_, stage, success) if from_episodes else None
        job = _claim(out, env, pool, held_out, start.id if start else None, stored)
        with (
            open_engine(teacher) if teacher else nullcontext() as other,
            open_engine(model) as trained,
            (
                open_sampler(model, engine, base_url, trainable=True, memory_share=SAMPLER_SHARE)
                if elsewhere
                else nullcontext()
            ) as other_sampler,
            ConsoleListener(Console(stderr=True), quiet=as_json) as listener,
        ):

            def validate(sampler: Engine, step: int) -> float:
                greedy = SamplingParams(temperature=0.0, max_tokens=max_tokens)
                episodes = play(held_out, sampler, sampling=greedy, namespace=f"validate/{step}", seed=seed)
                accuracy = sum(e.success for e in episodes) / len(episodes)
                listener.note(f"validation after {step} steps: {accuracy:.2f}")
                return accuracy

            @cache
            def run() -> RunRecord:
                """The run, from the first episode on: a job that is refused leaves none."""
                tokens = text.tokens or count_tokens(text.text, trained.tokenizer)  # nobody counted a file's yet
                kept = memory.add_knowledge(text.model_copy(update={"tokens": tokens}))
                identity = digest("run", str(out.resolve()), text.id, json.dumps([job, config.model_dump(mode="json")]))
                return begin_run(
                    memory, identity, config, model=model, knowledge=kept, folder=out, parent=start, given=job
                )

            def step_over(metrics: StepMetrics) -> None:
                memory.settle()  # before a checkpoint of this step is: no weights without their episodes
                listener.step(metrics, steps)

            what = "episodes" if stored is None else f"replies in {len(stored)} stored episodes"
            listener.stage("consolidate", f"{method}, {config.objective}, {steps} steps of {batch_size} {what}")
            fit = consolidate(
                trained,
                pool,
                text,
                config,
                out,
                parent=start,
                on_step=step_over,
                validate=validate if held_out else None,
                # With stored episodes none is added: what a run learns from must not change when it is taken up again.
                on_episode=(lambda episode: keep_episode(memory, run(), episode)) if stored is None else None,
                teacher=other,
                sampler=other_sampler,
                track=track or (),
                episodes=stored,
            )
            record = finish_run(memory, run(), fit)
    dismiss()
    facts = {
        "checkpoint": str(fit.best),
        "id": record.id,
        "run": run().id,
        "step": fit.best_step,
        "validation": fit.validation,
        "stopped": fit.stopped,
        "history": [metrics.model_dump() for metrics in fit.history],
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    if fit.stopped:
        Console(stderr=True).print(f"stopped early: {fit.stopped}", markup=False)
    typer.echo(str(fit.best))


def _stored(
    memory: Store, env: str, model: str, round_: str | None, stage: str | None, success: bool | None
) -> list[Episode]:
    """The training episodes of a world that this model played and that the filters let pass.

    Raises:
        UsageError: there is none.
    """
    round_id = (by_number(memory.rounds(), "number", round_) or memory.full_id("round", round_)) if round_ else None
    found = memory.episodes(env=env, split=Split.TRAIN.value, round_id=round_id, stage=stage, success=success)
    if own := [episode for episode in found if episode.model == model and episode.sampled]:
        return own
    others = f" ({len(found)} by other models or without a reply)" if found else ""
    raise UsageError(
        f"the store has no training episodes of {env} by {model} that match{others}; "
        "let `engrain improve` play some, or drop a filter"
    )


def _claim(
    folder: Path,
    env: str,
    training: Sequence[Task],
    validation: Sequence[Task],
    parent: str | None,
    stored: Sequence[Episode] | None,
) -> dict[str, str | None]:
    """Note in the run's folder what it learns from, and return it; the trainer itself compares settings, model and
    knowledge.

    Raises:
        UsageError: the folder cannot be one, or what was trained there learned from other tasks or episodes, or from
            another parent.
    """
    job = {
        "env": env,
        "training": digest(*(task.id for task in training)),
        "validation": digest(*(task.id for task in validation)),
        "parent": parent,
        **({} if stored is None else {"episodes": digest(*(episode.id for episode in stored))}),
    }
    note = folder / "job.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if note.exists() and json.loads(note.read_text()) != job and any(folder.glob("step-*")):
            raise UsageError(
                f"--out {folder} holds a run on other tasks or episodes, or from another parent; "
                "give this run another folder"
            )
        note.write_text(json.dumps(job, indent=2) + "\n")
    except (OSError, ValueError) as error:
        raise UsageError(f"--out {folder} cannot be used: {error}") from error
    return job
