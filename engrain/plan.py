"""What a round would do and roughly what it would take, before anything is loaded: `engrain improve --dry-run`.

Everything here is an estimate from sizes alone, and an upper one where replies may be shorter than their limit and
judging may end early. Other worlds are counted with the turns of the one that is learned. Notation: P weights
(`Shape.worked` in products), L layers, D hidden, H and K heads of queries and keys, h their sizes, F inner, r rank.

Memory of one device, bytes:

- weights: 2 P (bfloat16). The teacher is the student with its adapter off, so there is no second copy.
- adapter: 16 for each of its L r sum(in + out) weights: float32 weight, gradient and two AdamW moments.
- cache: 4 L K h a token (keys and values, bfloat16), for the tokens that are sampled side by side, and the teacher's
  prefix. A bound: places are taken as they fill.
- activations: 2 L (6 D + 2 H h + 2 K h + 4 F) a token of one forward that is differentiated, or 2 L D a token plus one
  layer's with gradient checkpointing. A forward holds `micro_batch_tokens`, or the longest sequence if that is longer.

Work, floating-point operations: 2 P + 2 L H h n for each token of a sequence of n in a forward. In training the
student's forward and backward are twice that (weights are frozen: no gradient of theirs) or three times with
checkpointing, and the teacher's forward once.

Time on a device: work of training over `UTILISATION` of its peak; sampling is bound by reading the weights once for
each step of a batch, over `UTILISATION` of its memory's rate, and never faster than its work. More devices, under
`accelerate launch`, share work without loss. Where reading the weights is the bound they gain only as long as there is
more to sample side by side than one of them takes: each reads all weights for its share. vLLM, servers and Ray are not
estimated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from rich.table import Table

from engrain.config import ImproveConfig
from engrain.errors import EngineCannotTrainError
from engrain.rounds import RoundTasks
from engrain.shapes import Shape, shape_of
from envs import registry
from envs.errors import EngrainError
from envs.options import is_file

UTILISATION = 0.3  # of the peak; a guess, not a measurement
ROWS, ROW_TOKENS = 64, 131_072  # that the transformers engine samples side by side
PROMPT, ANSWER = 256, 128  # tokens assumed of a task's prompt and of a world's answer
READING = 512  # most tokens of an extraction

#: Peak bfloat16 operations a second without sparsity, bytes a second of memory, and bytes of memory, by data sheet.
DEVICES = {"A100 80GB": (312e12, 2.04e12, 80e9), "H100 SXM": (989e12, 3.35e12, 80e9)}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Part(_Frozen):
    """A part of the round: sequences, how many are asked for in one go, and the tokens in them at most."""

    name: str
    episodes: int
    together: int
    sampled: int
    read: int  # prompts, knowledge and answers


class Memory(_Frozen):
    """Bytes on one device."""

    weights: int
    adapter: int
    cache: int
    activations: int

    @property
    def total(self) -> int:
        """While it trains. Cache and activations do not stand side by side; the larger one counts."""
        return self.weights + self.adapter + max(self.cache, self.activations)


class Seconds(_Frozen):
    """Time on so many devices of a kind."""

    device: str
    devices: int
    sampling: float
    training: float
    fits: bool


class Plan(_Frozen):
    """The whole plan; `unchecked` says what could not be looked at from here."""

    estimate: bool = True
    model: str
    parameters: int | None
    sizes_from: str
    world: str
    turns: int
    sequence_tokens: int
    parts: tuple[Part, ...]
    operations: float | None
    memory: Memory | None
    seconds: tuple[Seconds, ...]
    unchecked: tuple[str, ...]
    settings: dict[str, Any]


def plan(config: ImproveConfig) -> Plan:
    """Resolve what the settings name, and estimate.

    Raises:
        UsageError: an env, an option or the model's name is unknown, a split holds too few tasks, or all weights are
            to be trained.
    """
    if config.distill.lora is None:
        raise EngineCannotTrainError("lora=None: `engrain improve` trains adapters; leave lora out, or give it a rank")
    unchecked: list[str] = []
    turns = _turns(config, unchecked)
    shape, source = shape_of(config.model)
    if shape is None:
        unchecked.append(f"{config.model}: {source}; no memory and no time are estimated")
    if config.extract.coach:
        unchecked.append("the coach is not asked")
    if config.knowledge is not None:
        counted = f"knowledge {config.knowledge} is not read; it counts with {config.extract.budget_tokens} tokens"
        unchecked.append(f"{counted} (extract.budget_tokens)")
    longest = PROMPT + turns * config.distill.sampling.max_tokens + (turns - 1) * ANSWER
    taught = longest + config.extract.budget_tokens
    if shape is not None and taught > shape.context:
        unchecked.append(f"a full episode with its knowledge takes {taught} tokens, the context holds {shape.context}")
    parts = tuple(_parts(config, turns))
    memory = _memory(config, shape, longest) if shape else None
    return Plan(
        model=config.model,
        parameters=shape.parameters if shape else None,
        sizes_from=source,
        world=config.world.env,
        turns=turns,
        sequence_tokens=longest,
        parts=parts,
        operations=sum(_operations(config, shape, parts, longest)) if shape else None,
        memory=memory,
        seconds=tuple(_seconds(config, shape, parts, longest, memory)) if shape and memory else (),
        unchecked=tuple(unchecked),
        settings=config.model_dump(mode="json"),
    )


def _turns(config: ImproveConfig, unchecked: list[str]) -> int:
    """Most replies of an episode; tasks are drawn where the world's files are here."""
    specs = [config.world, *config.evaluation.ood]
    named = {str(spec.options["data"]) for spec in specs if "data" in spec.options}
    absent = {name for name in named if not is_file(Path(name))}
    if not absent:
        tasks = RoundTasks.draw(config)
        try:
            return registry.make(tasks.play[0]).max_turns
        except EngrainError as error:
            unchecked.append(f"{config.world.env} cannot be played here: {error}")
            return 1
    for spec in specs:
        registry.world(spec.env, {key: value for key, value in spec.options.items() if key != "data"})
    unchecked.extend(f"{name} is not here: no task was drawn from it" for name in sorted(absent))
    return int(config.world.options.get("max_turns", 1))


def _parts(config: ImproveConfig, turns: int) -> Iterator[Part]:
    """What is played in each stage; leave-one-out adds a pass over the validation tasks for each chosen item."""
    settings, distill, budget = config.evaluation, config.distill, config.extract.budget_tokens

    def part(name: str, episodes: int, together: int, most: int, context: int = 0) -> Part:
        read = PROMPT + context + (turns - 1) * ANSWER
        sampled = episodes * turns * most
        return Part(name=name, episodes=episodes, together=together, sampled=sampled, read=episodes * read)

    found = config.knowledge is None
    if found:
        yield part("play", config.play.episodes, config.play.episodes, config.play.sampling.max_tokens)
        reads = config.extract.episodes
        played = PROMPT + turns * config.play.sampling.max_tokens
        yield Part(name="extract", episodes=reads, together=reads, sampled=reads * READING, read=reads * played)
    validation, most = settings.validation_tasks, settings.sampling.max_tokens
    yield part("select: bare", validation, validation, most)
    yield part("select: in context", validation * (config.extract.candidates if found else 1), validation, most, budget)
    if found and config.extract.effects == "randomised":
        yield part("select: effects", 2 * validation, validation, most, budget)
    yield part("train", distill.steps * distill.batch_size, distill.batch_size, distill.sampling.max_tokens)
    chosen = math.ceil(distill.steps / distill.save_every) + 1
    yield part("choose a checkpoint", chosen * validation, validation, most)
    judged = settings.test_tasks + sum(spec.tasks for spec in settings.ood)
    look = math.ceil(settings.test_tasks / settings.looks)
    yield part("judge: bare and distilled", 2 * judged, look, most)
    yield part("judge: in context", judged, look, most, budget)


def _memory(config: ImproveConfig, shape: Shape, longest: int) -> Memory:
    distill = config.distill
    per_token = 4 * shape.layers * shape.kv_heads * shape.head
    rows = min(ROWS, max(distill.batch_size, config.evaluation.validation_tasks))
    cached = min(rows * longest, max(ROW_TOKENS, longest)) + config.extract.budget_tokens
    forward = max(distill.micro_batch_tokens, longest)
    heads = 2 * (shape.heads + shape.kv_heads) * shape.head
    layer = 2 * (6 * shape.hidden + heads + 4 * shape.inner)
    if distill.gradient_checkpointing:
        activations = forward * (2 * shape.layers * shape.hidden + layer)
    else:
        activations = forward * shape.layers * layer
    return Memory(
        weights=2 * shape.parameters,
        adapter=16 * shape.adapter(distill.lora.rank) if distill.lora else 0,
        cache=per_token * cached,
        activations=activations,
    )


def _operations(config: ImproveConfig, shape: Shape, parts: tuple[Part, ...], longest: int) -> tuple[float, float]:
    """Of sampling everything, and of the training's teacher and student."""
    a_token = 2 * shape.worked + 2 * shape.layers * shape.heads * shape.head * longest
    tokens = sum(part.sampled + part.read for part in parts)
    trained = next(part.sampled + part.read for part in parts if part.name == "train")
    passes = 1 + (3 if config.distill.gradient_checkpointing else 2)  # the teacher's forward, and the student's
    return float(tokens * a_token), float(trained * a_token * passes)


def _seconds(
    config: ImproveConfig, shape: Shape, parts: tuple[Part, ...], longest: int, memory: Memory
) -> Iterator[Seconds]:
    playing, training = _operations(config, shape, parts, longest)
    rows = max(1, min(ROWS, ROW_TOKENS // longest))
    for device, (peak, rate, size) in DEVICES.items():
        for devices in (1, 8):
            steps = sum(part.sampled / min(rows * devices, part.together) for part in parts if part.sampled)
            reads = steps * 2 * shape.parameters
            yield Seconds(
                device=device,
                devices=devices,
                sampling=max(playing / devices / (UTILISATION * peak), reads / (UTILISATION * rate)),
                training=training / devices / (UTILISATION * peak),
                fits=memory.total < size,
            )


def tables(found: Plan) -> Iterator[Table]:
    """The plan for people: what is played, memory, time."""
    played = Table(title=f"{found.model} on {found.world}, at most", title_justify="left")
    played.add_column("part")
    for column in ("episodes", "tokens sampled", "tokens read"):
        played.add_column(column, justify="right")
    for part in found.parts:
        played.add_row(part.name, f"{part.episodes:,}", f"{part.sampled:,}", f"{part.read:,}")
    yield played
    if found.memory is None:
        return
    memory = Table(title="Memory of one device, estimate", title_justify="left")
    for column in ("weights", "adapter", "cache", "activations", "in all"):
        memory.add_column(column, justify="right")
    numbers = (*found.memory.model_dump().values(), found.memory.total)
    memory.add_row(*(f"{number / 1e9:.2f} GB" for number in numbers))
    yield memory
    time = Table(title=f"Time at {UTILISATION:.0%} of the device's peak, estimate", title_justify="left")
    for column in ("device", "sampling", "training", "fits"):
        time.add_column(column, justify="left" if column == "device" else "right")
    for row in found.seconds:
        hours = (f"{seconds / 3600:.1f} h" for seconds in (row.sampling, row.training))
        time.add_row(f"{row.devices} x {row.device}", *hours, "yes" if row.fits else "no")
    yield time
