"""Six rounds in a row on hidden conventions of the demo's kind: what is learned, what is forgotten, what collapses.

    python benchmarks/rounds.py [--ungated] [--rounds 6] [--seeds 3 4 5] [--out FOLDER] [--json FILE] [--png FILE]

Each round meets a family of questions whose answers count in one form only, and goes on from the checkpoint that the
gate promoted last; the last two rounds come back to the first two families. The gate counts plain questions and the
families met so far as other worlds. With `--ungated` every trained checkpoint is taken on, whatever the gate says,
which shows what the gate is for.

After every round the same questions are put to the model that plays from then on: 48 of each family, 48 plain ones, a
hundred checkable instructions (`instructions.py`), and a sample at temperature 1 for the collapse monitor (entropy,
length, distinct bigrams, replies that cite their experience). Seeds 0 to 2 are left out because the gate was changed
after a series with one of them. A benchmark that was cut goes on where it stopped. All series in FOLDER go into the
JSON, the picture and, by `evidence.py --page`, the page of the evidence; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import instructions  # noqa: F401 - registers its world
from measure import where
from rich.console import Console
from rounds_page import draw

from agent.engines.transformers import TransformersEngine
from agent.episode import Episode, SamplingParams
from agent.models.resolve import resolve
from distill.monitor import StepMetrics, distinct_n, leak_rate
from engrain.config import ImproveConfig, OodSpec, WorldSpec
from engrain.console import ConsoleListener
from engrain.demo import MODEL, demo_config
from engrain.evaluate import outcomes, play_stored
from engrain.gate import wilson
from engrain.loop import Round
from engrain.redaction import redacted
from engrain.rounds import RoundResult, open_round
from envs import registry
from envs.base import Split, Task
from memory.records import CheckpointRecord
from memory.store import Store

FAMILIES: dict[str, dict[str, Any]] = {
    "sums": {"generators": "sums", "convention": "answer_tag"},
    "products": {"generators": "products", "convention": "json"},
    "chains": {"generators": "chains", "convention": "boxed"},
    "differences": {"generators": "differences", "convention": "answer_tag"},
}
SERIES = ("sums", "products", "chains", "differences", "sums", "products")
#: Questions of all families whose answer counts in any form: what training must not cost.
PLAIN: dict[str, Any] = {"ood_generators": "sums,differences,products,chains"}
GREEDY = SamplingParams(temperature=0.0, max_tokens=32)
FREE = SamplingParams(temperature=1.0, max_tokens=32)
WATCHED = ("student_entropy", "teacher_entropy", "response_tokens", "distinct_2", "leak_rate", "divergence")


def settings_of(number: int, seed: int) -> ImproveConfig:
    """The demo's settings, smaller, on the family of round `number` (from 0)."""
    base = demo_config(seed=seed + number)
    met = dict.fromkeys(name for name in SERIES[:number] if name != SERIES[number])
    ood = [OodSpec(env="math", options=PLAIN, split=Split.OOD, tasks=24)]
    ood += [OodSpec(env="math", options=FAMILIES[name], split=Split.TEST, tasks=12) for name in met]
    evaluation = {"validation_tasks": 20, "test_tasks": 32, "ood": tuple(ood)}
    return base.model_copy(
        update={
            "world": WorldSpec(env="math", options=FAMILIES[SERIES[number]]),
            "play": base.play.model_copy(update={"tasks": 192}),
            "extract": base.extract.model_copy(update={"embeddings": "none"}),
            "evaluation": base.evaluation.model_copy(update=evaluation),
            "distill": base.distill.model_copy(update={"steps": 8}),
        }
    )


class Probe:
    """The same questions for every checkpoint; what the store already has is not played again."""

    def __init__(self, store: Store, engine: TransformersEngine, seed: int, listener: ConsoleListener) -> None:
        self.store, self.engine, self.seed, self.listener = store, engine, seed + 10_000, listener
        self.tasks: dict[str, list[Task]] = {
            name: registry.world("math", options).tasks(Split.TEST, 48, self.seed) for name, options in FAMILIES.items()
        }
        self.tasks["plain"] = registry.world("math", PLAIN).tasks(Split.OOD, 48, self.seed)
        self.tasks["instructions"] = registry.world("instructions", {}).tasks(Split.TEST, 100, self.seed)

    def __call__(self, checkpoint: CheckpointRecord | None) -> dict[str, Any]:
        """Success task by task (`1` or `0`), and the monitor's numbers of replies sampled at temperature 1."""
        name = checkpoint.id if checkpoint else "base"
        self.listener.stage("probe", f"{sum(map(len, self.tasks.values()))} questions to {name}")
        if self.engine.checkpoint != (checkpoint.id if checkpoint else None):
            self.engine.load(Path(checkpoint.path) if checkpoint else None)
            self.engine.checkpoint = checkpoint.id if checkpoint else None
        found: dict[str, Any] = {"checkpoint": checkpoint.id if checkpoint else None}
        for world, tasks in self.tasks.items():
            found[world] = bits(self._play(f"{name}/{world}", tasks, GREEDY))
        some = [task for world, tasks in self.tasks.items() if world != "instructions" for task in tasks[:8]]
        found["sampled"] = monitored(self._play(f"{name}/sampled", some, FREE), self.engine)
        self.listener.note(", ".join(f"{world} {mean(map(int, found[world])):.2f}" for world in self.tasks))
        return found

    def _play(self, name: str, tasks: Sequence[Task], sampling: SamplingParams) -> list[Episode]:
        return play_stored(
            self.store,
            tasks,
            self.engine,
            sampling=sampling,
            namespace=f"probe/{name}",
            stage="probe",
            seed=self.seed,
            progress=lambda stats: self.listener.rollout(f"probe/{name}", stats),
        )


def bits(episodes: Sequence[Episode]) -> str:
    """Success task by task, in the tasks' order: `1` or `0`."""
    return "".join("01"[episode.success] for episode in episodes)


def monitored(episodes: Sequence[Episode], engine: TransformersEngine) -> dict[str, float]:
    """Entropy in nats a token (estimated by minus the mean log-probability of sampled tokens), length, variety."""
    responses = [list(e.token_ids[turn.start : turn.end]) for e in episodes for turn in e.turns]
    said = [value for e in episodes for value, ours in zip(e.logprobs, e.loss_mask, strict=True) if ours]
    return {
        "entropy": -sum(said) / len(said),
        "response_tokens": sum(map(len, responses)) / len(responses),
        "distinct_2": distinct_n(responses),
        "leak_rate": leak_rate([turn.action for e in episodes for turn in e.turns]),
        "n": len(responses),
    }


def row_of(number: int, result: RoundResult, guard: str | None) -> dict[str, Any]:
    """What the round itself measured; the monitor's numbers as means over its first and last three steps."""

    def means(steps: Sequence[StepMetrics]) -> dict[str, float]:
        return {name: sum(getattr(m, name) for m in steps) / len(steps) for name in WATCHED}

    fields = {"accuracy", "low", "high", "n"}
    before = [o for other in result.ood.values() for o in outcomes(other.before)]
    after = [o for other in result.ood.values() for o in outcomes(other.after)]
    return {
        "round": number + 1,
        "family": SERIES[number],
        "convention": FAMILIES[SERIES[number]]["convention"],
        "status": result.status,
        "promoted": bool(result.verdict and result.verdict.promoted),
        "reason": result.reason,
        "trained": bool(result.history),
        "stopped_by_guard": guard,
        "gap": result.gap.model_dump() if result.gap else None,
        **{name: found.model_dump(include=fields) for name, found in result.evaluations.items()},
        "gain": result.verdict.gain.model_dump() if result.verdict else None,
        "ood_before": wilson(before).model_dump() if before else None,
        "ood_after": wilson(after).model_dump() if after else None,
        "knowledge": result.knowledge.text if result.knowledge else None,
        "training": {"first": means(result.history[:3]), "last": means(result.history[-3:])}
        if result.history
        else None,
        "seconds": round(result.seconds, 1),
    }


def run(folder: Path, rounds: int, seed: int, *, gated: bool) -> None:
    """The series in `folder`, one JSON file a round; `round-0.json` is the base model."""
    folder.mkdir(parents=True, exist_ok=True)
    engine = TransformersEngine(resolve(MODEL), name=MODEL)
    with Store.open(str(folder / "store.db")) as store, ConsoleListener(Console(stderr=True)) as listener:
        probe = Probe(store, engine, seed, listener)
        base = folder / "round-0.json"
        if not base.exists():
            base.write_text(json.dumps({"round": 0, "probe": probe(None)}))
        for number in range(rounds):
            path = folder / f"round-{number + 1}.json"
            if path.exists():
                continue
            row = play_round(store, engine, listener, folder, number, seed, gated=gated)
            started = time.monotonic()
            row["probe"] = probe(store.current_checkpoint(MODEL))
            row["probe_seconds"] = round(time.monotonic() - started, 1)
            path.write_text(json.dumps(row))
            verdict = "promoted" if row["promoted"] else "not promoted"
            print(f"round {number + 1} {row['family']:12} {row['status']}, {verdict}: {row['reason']}", flush=True)
    engine.close()


def play_round(
    store: Store,
    engine: TransformersEngine,
    listener: ConsoleListener,
    folder: Path,
    number: int,
    seed: int,
    *,
    gated: bool,
) -> dict[str, Any]:
    """Round `number` (from 0), from wherever it stands."""
    notes = folder / f"round-{number + 1}.result.json"
    if not notes.exists():
        config = settings_of(number, seed)
        begun = [record for record in store.rounds() if dict(record.config) == redacted(config.model_dump(mode="json"))]
        record = begun[0] if begun else open_round(store, config)  # its seed makes a round's settings its own
        result = Round(store, engine, config, record, folder / f"weights-{number + 1}", listener).run()
        guard = dict(store.round(record.id).state).get("consolidate", {}).get("stopped")
        row = row_of(number, result, guard)
        row["taken"] = row["promoted"]
        if not gated and result.checkpoint is not None and not row["promoted"]:
            store.promote(result.checkpoint.id, who="benchmark", why="taken on without the gate")
            row["taken"] = True
        notes.write_text(json.dumps(row))
    found: dict[str, Any] = json.loads(notes.read_text())
    return found


def collect(out: Path) -> list[dict[str, Any]]:
    """The series that are there, without the gate first, each with its rows."""
    found = []
    for name in ("ungated", "gated"):
        for folder in sorted(out.glob(f"{name}-*")):
            rows = [json.loads(file.read_text()) for file in sorted(folder.glob("round-?.json"))]
            if rows:
                seed = int(folder.name.removeprefix(f"{name}-"))
                found.append({"gated": name == "gated", "seed": seed, "rounds": rows})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ungated", action="store_true", help="take on every trained checkpoint")
    parser.add_argument("--rounds", type=int, choices=range(1, len(SERIES) + 1), default=len(SERIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5])
    parser.add_argument("--out", type=Path, default=Path("runs/rounds"))
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--png", type=Path, help="draw the curve here")
    given = parser.parse_args()
    name = "ungated" if given.ungated else "gated"
    for seed in given.seeds:
        run(given.out / f"{name}-{seed}", given.rounds, seed, gated=not given.ungated)
    series = collect(given.out)
    facts = {"name": "rounds", "model": MODEL, "series": series, "machine": where()}
    if given.json is not None:
        given.json.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if given.png is not None:
        draw(series, given.png)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
