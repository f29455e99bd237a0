"""Reads a round's page out of the store, whatever the round came to and wherever it stands."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from engrain.curve import MEASURES
from engrain.curve import gather as scores_of
from engrain.gate import Gain, Rate, Verdict, paired_gain, wilson
from engrain.page.examples import examples
from engrain.page.facts import (
    Ancestor,
    Candidate,
    Cost,
    Learned,
    Machine,
    Measured,
    OtherWorld,
    Outcome,
    ReportPage,
    RoundPoint,
    Source,
    Spent,
    Text,
    Training,
)
from engrain.page.words import words
from engrain.settings import round_dir
from envs.errors import UsageError
from memory.errors import UnknownIdError
from memory.records import (
    CheckpointRecord,
    CheckpointStatus,
    EvaluationRecord,
    Item,
    ItemEffect,
    Knowledge,
    RoundRecord,
    RoundStatus,
)
from memory.store import Store

_SOURCES = 3  # episodes named of each item
_ITEMS = 64  # items of a round that are shown
_GENERATIONS = 20
_MOMENTS = ("before", "in_context", "after")
_PARTS = {"play": "playing to learn from", "train": "playing to train on", "test": "judging", "ood": "judging"}


def gather(store: Store, record: RoundRecord) -> ReportPage:
    """All that the store knows of a round. What an unfinished one has not measured yet is left out."""
    config, state = dict(record.config), dict(record.state)
    evaluations = store.evaluations(round_id=record.id)
    checkpoint = _checkpoint(store, record)
    verdict = Verdict.model_validate(state["judge"]) if "judge" in state else None
    selected = state.get("select", {})
    knowledge = _knowledge(store, selected.get("knowledge"))
    world = dict(config.get("world", {}))
    facts = ReportPage(
        number=record.number,
        id=record.id,
        model=record.model,
        world=str(world.get("env", "?")),
        options=dict(world.get("options") or {}),
        seed=record.seed,
        outcome=_outcome(record, checkpoint),
        reason=_reason(store, record, checkpoint),
        stage=record.stage,
        begun=record.created_at,
        changed=record.updated_at,
        gap=Gain.model_validate(selected["gap"]) if selected.get("gap") else None,
        gain=verdict.gain if verdict else _paired(evaluations, "test/bare", "test/distilled"),
        looks=verdict.looks if verdict else (),
        ood_margin=verdict.ood_margin if verdict else None,
        measured=_measured(evaluations),
        others=_others(evaluations, verdict),
        given=config.get("knowledge") is not None,
        extracted=state.get("extract", {}).get("items"),
        malformed=state.get("extract", {}).get("malformed"),
        refused=_refused(store, record),
        knowledge=_text(knowledge),
        candidates=_candidates(store, evaluations, knowledge),
        items=_items(store, record, knowledge),
        training=_training(config, state, record, store),
        rounds=_rounds(store, record),
        examples=examples(store, evaluations, knowledge.id if knowledge else None),
        cost=_cost(store, record, state, checkpoint),
        settings=config,
        **_lineage(store, record, checkpoint),
    )
    return facts.model_copy(update={"words": words(facts)})


def _outcome(record: RoundRecord, checkpoint: CheckpointRecord | None) -> Outcome:
    if record.status == RoundStatus.RUNNING.value:
        return Outcome.UNFINISHED
    if record.status == RoundStatus.FAILED.value:
        return Outcome.FAILED
    if record.status == RoundStatus.STOPPED.value:
        return Outcome.STOPPED
    if checkpoint is not None and checkpoint.status is CheckpointStatus.ROLLED_BACK:
        return Outcome.ROLLED_BACK
    promoted = bool(record.state.get("judge", {}).get("promoted"))
    return Outcome.PROMOTED if promoted else Outcome.REJECTED


def _reason(store: Store, record: RoundRecord, checkpoint: CheckpointRecord | None) -> str:
    """The round's verdict, and what was done to its checkpoint by hand since then."""
    said = record.verdict or ""
    if checkpoint is None or checkpoint.status is not CheckpointStatus.ROLLED_BACK:
        return said
    events = store.events(subject=checkpoint.id, action=CheckpointStatus.ROLLED_BACK.value, limit=1)
    return "; ".join(filter(None, [said, *(f"rolled back by {event.who}: {event.why}" for event in events)]))


def _checkpoint(store: Store, record: RoundRecord) -> CheckpointRecord | None:
    """The one that the round chose; while it trains there is none."""
    id_ = record.state.get("consolidate", {}).get("checkpoint")
    if not id_:
        return None
    try:
        return store.checkpoint(id_)
    except UnknownIdError:
        return None


def _knowledge(store: Store, id_: str | None) -> Knowledge | None:
    try:
        return store.knowledge(id_) if id_ else None
    except UnknownIdError:  # forgotten since
        return None


def _text(knowledge: Knowledge | None) -> Text | None:
    if knowledge is None:
        return None
    return Text(
        id=knowledge.id,
        version=knowledge.version,
        text=knowledge.text,
        lines=_lines(knowledge),
        tokens=knowledge.tokens,
        left_out=len(knowledge.dropped),
    )


def _lines(knowledge: Knowledge) -> int:
    """Its items; of a text without any, what is written in lines."""
    return len(knowledge.items) or len(knowledge.text.splitlines())


def _rate(evaluation: EvaluationRecord) -> Rate:
    return Rate(accuracy=evaluation.accuracy, low=evaluation.low, high=evaluation.high, n=evaluation.n)


def _measured(evaluations: Sequence[EvaluationRecord]) -> tuple[Measured, ...]:
    found = {evaluation.name: evaluation for evaluation in evaluations}
    return tuple(
        Measured(student=name, env=one.env, split=one.split, rate=_rate(one), mean_score=one.mean_score)
        for name in MEASURES
        if (one := found.get(f"test/{name}"))
    )


def _others(evaluations: Sequence[EvaluationRecord], verdict: Verdict | None) -> tuple[OtherWorld, ...]:
    worlds: dict[str, dict[str, Rate]] = defaultdict(dict)
    for evaluation in evaluations:
        ood, _, rest = evaluation.name.partition("/")
        moment, _, world = rest.partition("/")
        if ood == "ood" and moment in _MOMENTS:
            worlds[world][moment] = _rate(evaluation)
    changes = verdict.looks[-1].worlds if verdict and verdict.looks else {}
    return tuple(
        OtherWorld(
            world=name,
            change=changes.get(name) or _paired(evaluations, f"ood/before/{name}", f"ood/after/{name}"),
            **rates,
        )
        for name, rates in worlds.items()
    )


def _paired(evaluations: Sequence[EvaluationRecord], before: str, after: str) -> Gain | None:
    """The difference of two evaluations of the same tasks, for rounds that kept no verdict with its numbers."""
    named = {evaluation.name: evaluation.results for evaluation in evaluations}
    one, other = named.get(before, ()), named.get(after, ())
    if not one or [result.task_id for result in one] != [result.task_id for result in other]:
        return None
    return paired_gain([result.success for result in one], [result.success for result in other])


def _refused(store: Store, record: RoundRecord) -> int:
    return sum(len(store.events(subject=e.id, action="refused")) for e in store.extractions(round_id=record.id))


def _candidates(
    store: Store, evaluations: Sequence[EvaluationRecord], chosen: Knowledge | None
) -> tuple[Candidate, ...]:
    """The texts that were scored, best first."""
    scored = [e for e in evaluations if e.name == "validation/in_context" and e.knowledge]
    found = []
    for evaluation in sorted(scored, key=lambda e: -e.accuracy):
        text = _knowledge(store, evaluation.knowledge)
        if text is not None:
            mine = chosen is not None and text.id == chosen.id
            found.append(
                Candidate(
                    version=text.version,
                    id=text.id,
                    lines=_lines(text),
                    tokens=text.tokens,
                    rate=_rate(evaluation),
                    chosen=mine,
                )
            )
    return tuple(found)


def _items(store: Store, record: RoundRecord, knowledge: Knowledge | None) -> tuple[Learned, ...]:
    """Those of the chosen text in its order, then what else the round learned, what most episodes taught first."""
    own = {item.id: item for item in sorted(store.items(round_id=record.id), key=lambda item: -item.support)}
    placed = [place.id for place in knowledge.items] if knowledge else []
    effects = {effect.item_id: effect for effect in store.effects(round_id=record.id)}
    measured = [id_ for id_ in effects if id_ not in own]
    found: list[Learned] = []
    for id_ in list(dict.fromkeys([*placed, *own, *measured]))[:_ITEMS]:
        try:
            item = own.get(id_) or store.item(id_)
        except UnknownIdError:
            continue
        found.append(_learned(store, item, id_ in placed, effects.get(id_)))
    return tuple(found)


def _learned(store: Store, item: Item, chosen: bool, effect: ItemEffect | None) -> Learned:
    taught = [source for source in item.sources if source.episode_id and not source.recalled][:_SOURCES]
    sources = []
    for source in taught:
        try:
            row = store.episode(str(source.episode_id))
        except UnknownIdError:
            sources.append(Source(episode=str(source.episode_id), env=None, split=None, solved=None, reader=None))
            continue
        sources.append(
            Source(episode=row.id, env=row.task.env, split=row.task.split.value, solved=row.success, reader=row.model)
        )
    numbers = (
        {} if effect is None else {name: getattr(effect, name) for name in ("effect", "low", "high", "n", "method")}
    )
    return Learned(
        id=item.id,
        text=item.text,
        status=item.status.value,
        chosen=chosen,
        support=item.support,
        flags=tuple(dict.fromkeys(flag.flag for flag in item.flags)),
        sources=tuple(sources),
        **numbers,
    )


def _training(
    config: Mapping[str, Any], state: Mapping[str, Any], record: RoundRecord, store: Store
) -> Training | None:
    done, settings = state.get("consolidate"), dict(config.get("distill", {}))
    if done is None and not store.runs(round_id=record.id):
        return None
    done = done or {}
    tasks = int(config.get("evaluation", {}).get("validation_tasks", 0))
    history = [dict(step) for step in done.get("history", ())]
    return Training(
        objective=str(settings.get("objective", "")),
        steps=int(settings.get("steps", 0)),
        chosen_step=done.get("step"),
        stopped=done.get("stopped"),
        validation={int(step): _of(float(score), tasks) for step, score in dict(done.get("validation", {})).items()},
        divergence={int(step["step"]): float(step["divergence"]) for step in history},
        entropy={int(step["step"]): float(step["student_entropy"]) for step in history},
        leak_rate=history[-1].get("leak_rate") if history else None,
    )


def _of(accuracy: float, tasks: int) -> Rate:
    """The interval of a rate over so many tasks."""
    solved = round(accuracy * tasks)
    return wilson([place < solved for place in range(tasks)])


def _rounds(store: Store, record: RoundRecord) -> tuple[RoundPoint, ...]:
    """This round and those before it of the same model, world and options."""
    world = record.config.get("world")
    same = [r for r in store.rounds() if r.model == record.model and r.config.get("world") == world]
    found = scores_of(store, [r for r in same if r.number <= record.number])
    return tuple(
        RoundPoint(number=row.round.number, promoted=row.promoted, scores={k: _rate(v) for k, v in row.scores.items()})
        for row in found
        if row.scores
    )


def _lineage(store: Store, record: RoundRecord, checkpoint: CheckpointRecord | None) -> dict[str, Any]:
    """The checkpoints that this round's goes back to; for a round without one, those that it began with."""
    start = checkpoint.id if checkpoint else record.state.get("parent")
    base = f"the base model {record.model}"
    if not start:
        return {"before_lineage": base}
    try:
        level = store.lineage(start, sources=0, detailed=0, generations=_GENERATIONS)
    except UnknownIdError:
        return {"before_lineage": f"checkpoint {start}, which is not in this store"}
    numbers = {r.id: r.number for r in store.rounds()}
    found = []
    while True:
        own, text = level.checkpoint, level.knowledge
        found.append(
            Ancestor(
                checkpoint=own.id,
                status=own.status.value,
                round=numbers.get(own.round_id or ""),
                method=level.run.method if level.run else None,
                step=own.manifest.get("step"),
                episodes=level.training_episodes,
                knowledge=text.version if text else None,
                lines=_lines(text) if text else 0,
            )
        )
        if level.parent is None:
            break
        level = level.parent
    if own.parent:
        base = f"checkpoint {own.parent}"
    return {"lineage": tuple(found), "before_lineage": base}


def _cost(store: Store, record: RoundRecord, state: Mapping[str, Any], checkpoint: CheckpointRecord | None) -> Cost:
    sums: dict[str, list[int]] = {}
    for row in store.episode_rows(round_id=record.id):
        kind, _, rest = row.stage.partition("/")
        part = _PARTS.get(kind) or ("choosing a checkpoint" if rest.startswith("step-") else "choosing knowledge")
        counted = (1, row.turns, row.tokens, row.sampled)
        sums[part] = [a + b for a, b in zip(sums.get(part, [0, 0, 0, 0]), counted, strict=True)]
    parts = tuple(
        Spent(part=part, episodes=count, replies=turns, tokens=tokens, sampled=sampled)
        for part, (count, turns, tokens, sampled) in sums.items()
    )
    history = [dict(step) for step in state.get("consolidate", {}).get("history", ())]
    spent = {
        name: sum(float(s.get(f"seconds_{name}", 0)) for s in history) for name in ("sampling", "teacher", "student")
    }
    return Cost(
        seconds=float(state.get("seconds", 0.0)),
        **spent,
        peak_memory=max((int(step.get("peak_memory_bytes", 0)) for step in history), default=0),
        parts=parts,
        machine=_machine(record),
        versions=dict(checkpoint.manifest.get("versions", {})) if checkpoint else {},
    )


def _machine(record: RoundRecord) -> Machine | None:
    """What the round's own `report.json` says, where it lies in its usual place."""
    try:
        path = round_dir(record.id) / "report.json"
        return Machine.model_validate(json.loads(path.read_text(encoding="utf-8"))["machine"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError, UsageError):
        return None
