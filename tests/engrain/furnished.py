"""A made-up store for the dashboard's tests and pictures: rounds that get better and one under way."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from agent.episode import Episode, FinishReason, Message, SamplingParams, StopReason, Turn
from engrain.lease import lease_name
from envs.base import Split, Task
from memory.normalise import item_id
from memory.records import (
    CheckpointRecord,
    CheckpointStatus,
    EvaluationRecord,
    Extraction,
    ItemEffect,
    Knowledge,
    KnowledgeItem,
    RoundStatus,
    RunRecord,
    digest,
)
from memory.store import Store

MODEL = "made-up"
LESSONS = [
    "Read the whole recipe before you take anything.",
    "Open a closed door before you walk through it.",
    "Two digits that add up to ten or more carry one: <b>count it</b>.",
    "Boxes in a corner never come out again: push none there.",
    "Light the lamp before you go down.",
]
_RATES = ((0.12, 0.61, 0.5), (0.5, 0.74, 0.68), (0.68, 0.84, 0.7))  # bare, in context, distilled
_STEPS = 30


def episode(number: int, *, turns: int = 2, text: str = "", **overrides: Any) -> Episode:
    """An episode of two sampled tokens a turn, with `text` wherever a world or a model writes; odd ones are solved."""
    played, ids, mask = [], [1, 2, 3], [False] * 3
    for n in range(turns):
        start = len(ids) + 1
        ids, mask = [*ids, 9, 10, 11], [*mask, False, True, True]
        played.append(
            Turn(observation=f"You are in room {n}. The door is closed. {text}", action=f"open door {text}",
                 start=start, end=len(ids), finish_reason=FinishReason.STOP, reward=0.5,
                 feedback=text or "The door is open.")
        )  # fmt: skip
    fields: dict[str, Any] = {
        "id": episode_id(number), "task": Task.create("doors", Split.TRAIN, number, {}), "turns": tuple(played),
        "messages": (Message(role="system", content=f"You play. {text}"),), "token_ids": tuple(ids),
        "prompt_length": 3, "loss_mask": tuple(mask), "logprobs": (0.0,) * len(ids), "reward": 0.0, "score": 0.5,
        "success": bool(number % 2), "feedback": text, "stop_reason": StopReason.DONE, "model": MODEL,
        "sampling": SamplingParams(), "seconds": 1.0,
        "started_at": datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=number),
    }  # fmt: skip
    return Episode(**{**fields, **overrides})


def episode_id(number: int) -> str:
    """Of `episode(number)`."""
    return digest("furnished", number)


def checkpoint_id(number: int) -> str:
    """Of the weights that round `number` made."""
    return digest("checkpoint", number)


def furnish(store: Store, foreign: str = "") -> None:
    """Three finished rounds, the first two promoted, a fourth that runs elsewhere, and `foreign` wherever it fits."""
    lessons = [*LESSONS[:4], f"{LESSONS[4]} {foreign}".strip()]
    parent: CheckpointRecord | None = None
    for number, rates in enumerate(_RATES, 1):
        parent = _round(store, number, rates, lessons, parent, foreign)
    store.flag_item(item_id(LESSONS[3]), "instance-bound", note=foreign)
    store.add_episodes([episode(900, turns=120, text=foreign, error=foreign or None, human=True)])
    store.add_episodes([episode(2000 + n) for n in range(60)])
    settings = {
        "play": {"episodes": 16},
        "evaluation": {"test_tasks": 64, "validation_tasks": 8},
        "distill": {"steps": "many"},
    }
    running = store.create_round(settings, 4, MODEL)
    store.update_round(running.id, stage="play")
    store.add_episodes([episode(950 + n) for n in range(5)], round_id=running.id, stage="play")
    store.take_lease(lease_name(MODEL), "t", host="elsewhere", machine="elsewhere/1", pid=77, seconds=600)


def begin_training(store: Store, folder: Path, steps: int) -> RunRecord:
    """The running round trains, with its history in `folder`."""
    running = store.rounds()[-1]
    store.update_round(running.id, stage="consolidate")
    run = RunRecord(
        id=digest("run", running.number), round_id=running.id, method="opcd", model=MODEL, folder=str(folder), seed=0,
        config={"steps": 12},
    )  # fmt: skip
    write_history(folder, steps)
    return store.add_run(run)


def write_history(folder: Path, steps: int) -> Path:
    """What a trainer leaves after so many steps; none leaves nothing."""
    state = folder / f"step-{steps:06d}" / "trainer_state.json"
    if steps:
        state.parent.mkdir(parents=True)
        history = [{"step": s, "divergence": 0.8 / s, "loss": 0.9 / s} for s in range(1, steps + 1)]
        state.write_text(json.dumps({"step": steps, "history": history}))
    return state


def _round(
    store: Store, number: int, rates: tuple[float, ...], lessons: list[str], parent: CheckpointRecord | None, text: str
) -> CheckpointRecord | None:
    """A finished round; the checkpoint that the next one starts from."""
    round_ = store.create_round({"model": MODEL, "note": text}, number, MODEL)
    played = [episode(100 * number + n, text=text if n == 0 else "") for n in range(3)]
    store.add_episodes(played, round_id=round_.id, stage="play")
    for place, lesson in enumerate(lessons[: number + 2]):
        found = Extraction(
            id=digest(number, place), episode_id=played[place % 3].id, model=MODEL, checkpoint=None, mode="paper",
            prompt_version="1", seed=0, output=f"- EXPERIENCE ITEM: {lesson}", items=(lesson,), malformed=(),
        )  # fmt: skip
        store.add_extraction(found, round_.id)
        store.add_item(lesson, extraction=found, round_id=round_.id)
        low = 0.03 * place - 0.05
        store.record_effect(
            ItemEffect(item_id=item_id(lesson), round_id=round_.id, method="leave-one-out", env="doors",
                       split="validation", effect=low + 0.1, low=low, high=low + 0.2, n=32)
        )  # fmt: skip
    places = tuple(KnowledgeItem(id=item_id(lesson), text=lesson) for lesson in lessons[number - 1 : number + 2])
    body = "\n".join(f"- {place.text}" for place in places)
    knowledge = store.add_knowledge(
        Knowledge(id=digest(body), items=places, text=body, tokens=20 * number), round_.id,
        parent.knowledge if parent else None,
    )  # fmt: skip
    run = RunRecord(
        id=digest("run", number), round_id=round_.id, method="opcd", model=MODEL, knowledge=knowledge.id, folder="/f",
        parent=parent.id if parent else None, seed=0, config={"steps": _STEPS}, reason=text,
        metrics=tuple({"step": s, "divergence": 0.6 / s} for s in range(1, _STEPS)),
    )  # fmt: skip
    store.add_run(run)
    trained = [episode(500 + 10 * number + n, checkpoint=f"round-{number}@4") for n in range(2)]
    store.add_episodes(trained, round_id=round_.id, stage="train", run_id=run.id)
    record = CheckpointRecord(
        id=checkpoint_id(number), model=MODEL, path=f"/runs/{number}{text}", parent=run.parent, knowledge=knowledge.id,
        round_id=round_.id, run_id=run.id,
    )  # fmt: skip
    store.add_checkpoint(record)
    for name, rate in zip(("bare", "in_context", "distilled"), rates, strict=True):
        store.add_evaluation(
            EvaluationRecord(
                name=f"test/{name}", round_id=round_.id, checkpoint=record.id if name == "distilled" else None,
                knowledge=knowledge.id if name == "in_context" else None, env="doors", split="test", n=100,
                successes=round(100 * rate), accuracy=rate, low=rate - 0.09, high=rate + 0.1, mean_score=rate,
            )
        )  # fmt: skip
    better = rates[2] > rates[0] + 0.05
    status = CheckpointStatus.PROMOTED if better else CheckpointStatus.REJECTED
    store.set_checkpoint_status(record.id, status, "engrain", "judged")
    verdict = "better on test tasks" if better else f"no clear gain on test tasks {text}".strip()
    state = {"select": {"knowledge": knowledge.id}, "consolidate": {"validation": {"10": 0.3, "20": rates[2]}}}
    store.update_round(round_.id, stage="judge", status=RoundStatus.FINISHED, verdict=verdict, state=state)
    return record if better else parent
