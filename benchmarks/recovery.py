"""The paper's table in small: how much of the in-context gap each method bakes in, on the demo's world and two more.

    python benchmarks/recovery.py [--world sums] [--seeds 0 1 2] [--methods opcd:forward_kl ...] [--out FOLDER]

Bare, in context, and for every method and seed: accuracy on held-out tasks with nothing in the context, accuracy on
related tasks that were not trained on, before and after. `opcd:crossing` is the candidate for an `auto` objective that
was measured here and not kept (`evidence_worlds.crossing`). Every method gets the same number of training episodes; its
checkpoint is chosen on validation tasks. One JSON file a run, so that an interrupted benchmark goes on; runs that fail
are reported too. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import evidence_worlds  # noqa: F401 - registers the crossing objective
from measure import where

from agent.engines.transformers import TransformersEngine
from agent.episode import SamplingParams
from agent.models.resolve import resolve
from agent.rollout import play
from distill.config import DistillConfig
from engrain.config import ImproveConfig, OodSpec, WorldSpec
from engrain.consolidate import consolidate
from engrain.demo import MODEL, demo_config
from engrain.gate import Rate, recovery, wilson
from engrain.rounds import RoundTasks
from envs.base import Split
from envs.errors import EngrainError
from memory.records import Knowledge
from memory.render import render_knowledge

#: World options, and the one item that every method distils. That of `sums` is what the 0.5B itself wrote in the demo's
#: round; the others say the same of their own convention.
WORLDS: dict[str, tuple[dict[str, Any], str]] = {
    "sums": ({"convention": "answer_tag"}, "Always write the answer in this form: <answer>12</answer>"),
    "products": (
        {"generators": "products", "convention": "json", "ood_generators": "sums,differences,chains"},
        'Always write the answer in this form: {"answer": 12}',
    ),
    "chains": (
        {"generators": "chains", "convention": "boxed", "ood_generators": "sums,differences,products"},
        "Always write the answer in this form: \\boxed{12}",
    ),
}
METHODS = (
    "opcd:forward_kl",
    "opcd:reverse_kl",
    "opcd:jsd",
    "opcd:skew_kl",
    "opcd:topk",
    "opcd:crossing",
    "off_policy:forward_kl",
    "sft:cross_entropy",
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=32)


def rate(engine: TransformersEngine, tasks: list[Any], knowledge: str | None = None) -> Rate:
    episodes = play(tasks, engine, sampling=GREEDY, namespace="benchmark", knowledge=knowledge, lockstep=True)
    return wilson([episode.success for episode in episodes])


def settings_of(world: str, seed: int) -> ImproveConfig:
    """The demo's settings on a world of this benchmark."""
    options = WORLDS[world][0]
    base = demo_config(seed=seed)
    related = OodSpec(env="math", options=options, split=Split.OOD, tasks=48)
    return base.model_copy(
        update={
            "world": WorldSpec(env="math", options=options),
            "evaluation": base.evaluation.model_copy(update={"ood": (related,)}),
        }
    )


def run(engine: TransformersEngine, world: str, method: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train by one method and measure; the folder keeps the checkpoints."""
    name, objective = method.split(":")
    base = settings_of(world, seed)
    tasks = RoundTasks.draw(base)
    (other,) = tasks.ood.values()
    settings = {**base.distill.model_dump(), "method": name, "objective": objective}
    config = DistillConfig.model_validate(settings)
    knowledge = Knowledge(id="benchmark", items=(), text=render_knowledge([WORLDS[world][1]]), tokens=0)
    started = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    fit = consolidate(
        engine,
        tasks.pool,
        knowledge,
        config,
        folder,
        validate=lambda sampler, step: rate(sampler, tasks.validation).accuracy,
    )
    seconds = time.monotonic() - started
    engine.load(fit.best)
    found = {"distilled": rate(engine, tasks.test), "ood_after": rate(engine, other)}
    engine.load(None)
    return {
        "world": world,
        "method": method,
        "seed": seed,
        "seconds": round(seconds, 1),
        "best_step": fit.best_step,
        "validation": fit.validation,
        "stopped": fit.stopped,
        **{key: value.model_dump() for key, value in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=WORLDS, default="sums")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("runs/recovery"))
    given = parser.parse_args()
    given.out /= given.world
    given.out.mkdir(parents=True, exist_ok=True)
    engine = TransformersEngine(resolve(MODEL), name=MODEL)
    rows: list[dict[str, Any]] = []
    for seed in given.seeds:
        path = given.out / f"base-{seed}.json"
        if not path.exists():
            tasks = RoundTasks.draw(settings_of(given.world, seed))
            (other,) = tasks.ood.values()
            text = render_knowledge([WORLDS[given.world][1]])
            base = {
                "bare": rate(engine, tasks.test),
                "in_context": rate(engine, tasks.test, text),
                "ood_before": rate(engine, other),
                "ood_in_context": rate(engine, other, text),
            }
            path.write_text(json.dumps({key: value.model_dump() for key, value in base.items()}))
        known = json.loads(path.read_text())
        for method in given.methods:
            path = given.out / f"{method.replace(':', '-')}-{seed}.json"
            if not path.exists():
                try:
                    result = run(engine, given.world, method, seed, given.out / "work")
                except EngrainError as error:
                    result = {"method": method, "seed": seed, "error": str(error)}
                path.write_text(json.dumps(result))
            row = {**known, **json.loads(path.read_text())}
            if "distilled" in row:
                row["recovery"] = recovery(*(row[k]["accuracy"] for k in ("bare", "in_context", "distilled")))
            rows.append(row)
            print(
                f"seed {seed} {method:22} "
                + (
                    f"distilled {row['distilled']['accuracy']:.2f} ood {row['ood_before']['accuracy']:.2f} -> "
                    f"{row['ood_after']['accuracy']:.2f} ({row['seconds']:.0f} s)"
                    if "distilled" in row
                    else f"failed: {row['error']}"
                ),
                flush=True,
            )
    best = {
        m: [r["recovery"] for r in rows if r["method"] == m and r.get("recovery") is not None] for m in given.methods
    }
    means = {m: sum(v) / len(v) for m, v in best.items() if v}
    first, peer = "opcd:forward_kl", "off_policy:forward_kl"
    ours, theirs = means.get(first), means.get(peer)
    print(
        json.dumps(
            {
                "name": "recovery",
                "world": given.world,
                "ours": ours,
                "peer": theirs,
                "ratio": ours / theirs if ours is not None and theirs else None,
                "target": {"recovery": 0.8},
                "met": ours is not None and ours >= 0.8,
                "mean_recovery": means,
                "rows": rows,
                "seeds": given.seeds,
                "machine": where(),
            }
        )
    )


if __name__ == "__main__":
    main()
