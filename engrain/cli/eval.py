"""`engrain eval`: how well a model does on a world, bare, with knowledge, or with a checkpoint."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from engrain.cli.common import (
    DEFAULT_MODEL,
    AdmissibleOption,
    BaseUrlOption,
    EngineName,
    EngineOption,
    EnvArgument,
    JsonOption,
    ModelOption,
    OptionsOption,
    RayOption,
    SeedOption,
    StoreOption,
    check_engines,
    check_room,
    find_checkpoint,
    find_knowledge,
    fingerprint,
    load_checkpoint,
    open_players,
    open_sampler,
    open_store,
    printable,
    world_options,
)
from envs.base import Split
from envs.errors import EnvFailedError
from memory.records import CheckpointRecord, EvaluationRecord, Knowledge


def command(
    env: EnvArgument,
    option: OptionsOption = None,
    model: ModelOption = DEFAULT_MODEL,
    knowledge: Annotated[str | None, typer.Option(help="Knowledge version, its id, or a text file.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Checkpoint id from the store, or a folder.")] = None,
    paired: Annotated[
        bool, typer.Option("--paired", help="Also play the bare base model, and compare task by task.")
    ] = False,
    split: Annotated[Split, typer.Option(help="Which tasks.")] = Split.TEST,
    tasks: Annotated[int, typer.Option("--tasks", "-n", min=1, help="How many tasks.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens a turn.")] = 256,
    admissible: AdmissibleOption = False,
    engine: EngineOption = EngineName.TRANSFORMERS,
    base_url: BaseUrlOption = None,
    ray: RayOption = None,
    seed: SeedOption = 0,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Accuracy with its 95% Wilson interval.

    What the store already holds is not played again, but for episodes that an error ended.
    """
    from agent.episode import SamplingParams
    from engrain.console import ConsoleListener
    from engrain.evaluate import failures, measure, outcomes, play_stored
    from engrain.gate import paired_gain
    from envs import registry

    check_engines(engine, base_url, ray=ray)
    chosen = registry.world(env, world_options(option)).tasks(split, tasks, seed)
    sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens, admissible_only=admissible)
    records: dict[str, EvaluationRecord] = {}
    broken: dict[str, str] = {}
    with open_store(store) as memory:
        text = find_knowledge(knowledge, memory) if knowledge is not None else None
        weights = find_checkpoint(checkpoint, memory, model) if checkpoint is not None else None
        arms: dict[str, tuple[Knowledge | None, CheckpointRecord | None]] = {}
        if paired or (text is None and weights is None):
            arms["base model"] = (None, None)
        if text is not None or weights is not None:
            arms[" + ".join(["checkpoint"] * (weights is not None) + ["knowledge"] * (text is not None))] = (
                text,
                weights,
            )
        with (
            open_sampler(model, engine, base_url) if ray is None else open_players(model, ray, engine) as sampler,
            ConsoleListener(Console(stderr=True), quiet=as_json) as listener,
        ):
            check_room(sampler, text)
            for name, (with_text, with_weights) in arms.items():
                load_checkpoint(sampler, with_weights)
                settings = [
                    fingerprint(model),
                    with_text and with_text.id,
                    with_weights and with_weights.id,
                    sampling.model_dump(),
                    seed,
                    *(["server"] if base_url else [engine] if engine is not EngineName.TRANSFORMERS else []),
                ]
                episodes = play_stored(
                    memory,
                    chosen,
                    sampler,
                    sampling=sampling,
                    namespace=f"eval\0{json.dumps(settings)}",
                    stage="eval",
                    knowledge=with_text,
                    seed=seed,
                    progress=lambda stats, name=name: listener.rollout(name, stats),  # type: ignore[misc]
                    again=True,
                )
                if failed := failures(episodes):
                    if len(failed) == len(episodes):
                        for episode in failed:  # nothing was measured, and nothing shall look as if it had been
                            memory.forget("episode", episode.id, "engrain", "its world did not work")
                        raise EnvFailedError(f"{name}: no episode was played to its end, the first: {failed[0].error}")
                    broken[name] = f"{len(failed)} of {len(episodes)} episodes broke off, the first: {failed[0].error}"
                weights_id = with_weights.id if with_weights else None
                text_id = with_text.id if with_text else None
                records[name] = memory.add_evaluation(
                    measure("eval", episodes, checkpoint=weights_id, knowledge=text_id)
                )
    for name, fault in broken.items():
        Console(stderr=True, soft_wrap=True, highlight=False).print(
            f"warning: {name}: {printable(fault)}", markup=False
        )
    found = [outcomes(record) for record in records.values()]
    gain = paired_gain(found[0], found[1]) if len(found) == 2 else None
    if as_json:
        facts = {name: record.model_dump(mode="json") for name, record in records.items()}
        typer.echo(json.dumps({"evaluations": facts, "gain": gain and gain.model_dump()}, indent=2))
        return
    view = Table("student", "accuracy", "95% interval", "n", "mean score")
    for name, record in records.items():
        interval = f"{record.low:.2f} - {record.high:.2f}"
        view.add_row(name, f"{record.accuracy:.2f}", interval, str(record.n), f"{record.mean_score:.2f}")
    console = Console(highlight=False)
    console.print(view)
    if gain is not None:
        console.print(f"paired gain {gain}", markup=False)
