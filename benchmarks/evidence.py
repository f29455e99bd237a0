"""Does it learn, on more than one world? Every way to use a knowledge text, on the same budget, three seeds, paired.

    python benchmarks/evidence.py --world sums [--seeds 0 1 2] [--arms opcd-forward_kl ...] [--force]
    python benchmarks/evidence.py --page        # tables and plots of all runs that are there
    python benchmarks/evidence.py --world sokoban --model Qwen/Qwen2.5-1.5B-Instruct --coach Qwen/Qwen2.5-7B-Instruct

The knowledge of a world and seed is what the model itself extracts from twelve played tasks (the written prompt for
`helpdesk`), filtered by validation as in a round, or not. If its gap to the bare model is not there on validation
tasks, the loop would train nothing; then no method is trained either, unless `--force` is given, and the run says so.
Every method gets the same number of training episodes of the same longest length; what it sampled is counted. Its
checkpoint is chosen on 32 validation tasks; settings are the demo's, which were chosen on validation tasks of `sums`.

Measured without training tasks, and paired by task: 128 test tasks; 48 plain problems of other kinds and a hundred
checkable instructions (`instructions.py`), which nobody trained on; and 32 replies at temperature 1 for entropy,
length, variety and phrases that cite experience. One JSON file a run, in FOLDER; what is there is not
run again, and a run that was cut goes on. Runs that fail are kept too. The last line is JSON.

`frozenlake` and `sokoban` are for a GPU. Runs of another model, any that `engrain improve --model` takes, go to a
folder of their own.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

from evidence_page import SEEDS, build
from evidence_worlds import ARMS, COACH, PLACEBOS, WORLDS, Arm, arms_of, settings_of
from measure import where
from rich.console import Console
from rounds import monitored

from agent.engines.transformers import TransformersEngine
from agent.episode import Episode, SamplingParams
from agent.models.resolve import resolve
from agent.rollout import play
from distill.config import DistillConfig
from engrain.config import ImproveConfig
from engrain.console import ConsoleListener
from engrain.consolidate import consolidate
from engrain.demo import MODEL
from engrain.gate import paired_gain
from engrain.loop import Round
from engrain.rounds import RoundTasks, open_round
from envs.base import Task
from envs.errors import EngrainError
from memory.records import Knowledge, digest
from memory.render import compose, count_tokens
from memory.store import Store

FREE = SamplingParams(temperature=1.0, max_tokens=32)
#: Most tokens of raw traces in a context.
TRACES = 1024


class Bench:
    """One world and seed: its tasks, its texts, and how students are measured."""

    def __init__(self, world: str, seed: int, model: str, coach: str, work: Path, listener: ConsoleListener) -> None:
        self.world, self.seed, self.work, self.listener = world, seed, work / world, listener
        self.model, self.coach = model, coach
        self.config: ImproveConfig = settings_of(world, seed, model)
        self.tasks = RoundTasks.draw(self.config)

    @cached_property
    def engine(self) -> TransformersEngine:
        return TransformersEngine(resolve(self.model), name=self.model)

    def text(self, name: str) -> dict[str, Any]:
        """A knowledge text with its gap to the bare model on validation tasks; kept in a file."""
        path = self.work / f"text-{name}-{self.seed}.json"
        if not path.exists():
            found = self._make(name)
            gap = paired_gain(self._bare, self._validated(found))
            path.write_text(json.dumps({"text": found, "gap": gap.model_dump(), "positive": gap.positive}))
        kept: dict[str, Any] = json.loads(path.read_text())
        return kept

    def _make(self, name: str) -> str:
        if name in PLACEBOS:
            return PLACEBOS[name]
        if (written := WORLDS[self.world].written) is not None:
            return written
        config = settings_of(self.world, self.seed, self.model, coach=self.coach if name == "coach" else None)
        with Store.open(str(self.work / f"store-{'coach' if name == 'coach' else 'own'}-{self.seed}.db")) as store:
            round_ = Round(store, self.engine, config, open_round(store, config), self.work / "unused", self.listener)
            episodes = round_.play()
            if name == "traces":
                return self._traces(episodes)
            round_.extract(episodes)
            items = round_.curate()
            if name != "unfiltered":
                return round_.select(items)[0].text
            mixed = random.Random(self.seed).sample(items, len(items))
            return compose(mixed, config.extract.budget_tokens, self.engine.tokenizer).text

    def _traces(self, episodes: Sequence[Episode]) -> str:
        """Episodes as they were, with what was said after them, as many as fit."""
        text = "Earlier tasks:"
        for episode in episodes:
            said = [f"\n\nTask: {episode.messages[-1].content}"] if not episode.turns else []
            said += [f"\n\n{turn.observation}\nReply: {turn.action}\nThen: {turn.feedback}" for turn in episode.turns]
            if count_tokens(text + "".join(said), self.engine.tokenizer) > TRACES:
                break
            text += "".join(said)
        return text

    @cached_property
    def _bare(self) -> list[bool]:
        """The base model's outcomes on validation tasks, which every text is compared with."""
        return self._validated(None)

    def _validated(self, text: str | None) -> list[bool]:
        return [e.success for e in self._play(self.tasks.validation, text)]

    def _play(self, tasks: Sequence[Task], text: str | None, sampling: SamplingParams | None = None) -> list[Episode]:
        return play(
            tasks,
            self.engine,
            sampling=sampling or self.config.evaluation.sampling,
            namespace="evidence",
            knowledge=text,
            seed=self.seed,
            lockstep=True,
        )

    def measure(self, text: str | None) -> dict[str, Any]:
        """Everything that is measured of the student that is loaded, with a text in its context or without."""
        greedy = SamplingParams(temperature=0.0, max_tokens=32)
        found: dict[str, Any] = {"test": bits(self._play(self.tasks.test, text)), "other": {}}
        for name, tasks in self.tasks.ood.items():
            found["other"][name] = bits(self._play(tasks, text, greedy))
        found["sampled"] = monitored(self._play(self.tasks.test[:32], text, FREE), self.engine)
        return found

    def run(self, name: str, *, force: bool) -> dict[str, Any]:
        """One arm: what it trained, if anything, and all measurements."""
        arm = ARMS[name]
        started = time.monotonic()
        self.engine.load(None)  # also after an arm that failed with its student loaded
        known = self.text(arm.text) if arm.text else None
        row: dict[str, Any] = {"knowledge": known["text"], "gap": known["gap"]} if known else {}
        if arm.distill is None:
            return row | self.measure(known["text"] if known and arm.in_context else None) | spent(started)
        assert known is not None
        placebo = arm.text in PLACEBOS
        row["gap_test"] = "passed" if known["positive"] else "refused"
        if not known["positive"] and not (force or placebo):
            return row | {"refused": "the gap is not there on validation tasks: the loop trains nothing"}
        folder = self.work / f"{name}-{self.seed}"
        row |= self._train(arm, known["text"], folder)
        row |= self.measure(None) | spent(started)
        shutil.rmtree(folder)
        return row

    def _train(self, arm: Arm, text: str, folder: Path) -> dict[str, Any]:
        """Train, and leave the engine with the best checkpoint by validation."""
        asked = dict(arm.distill or {})
        if "teacher" in asked:
            asked["teacher"] = self.coach
        config = DistillConfig.model_validate({**self.config.distill.model_dump(), **asked})
        teacher = TransformersEngine(resolve(self.coach), name=self.coach) if config.teacher else None
        with nullcontext() if teacher is None else closing(teacher):
            fit = consolidate(
                self.engine,
                self.tasks.pool,
                Knowledge(id=digest(text), items=(), text=text, tokens=count_tokens(text, self.engine.tokenizer)),
                config,
                folder,
                on_step=lambda metrics: self.listener.step(metrics, config.steps),
                validate=self._validate,
                teacher=teacher,
            )
        self.engine.load(fit.best)
        steps = fit.history
        return {
            "sampled_tokens": round(sum(m.response_tokens * m.sequences for m in steps)),
            "steps": len(steps),
            "best_step": fit.best_step,
            "validation": fit.validation,
            "stopped": fit.stopped,
            "divergence": [round(m.divergence, 4) for m in steps],
            "student_entropy": [round(m.student_entropy, 4) for m in steps],
            "student_mass": steps[0].student_mass,
            "teacher_mass": steps[0].teacher_mass,
        }

    def _validate(self, sampler: TransformersEngine, step: int) -> float:
        episodes = play(
            self.tasks.validation,
            sampler,
            sampling=self.config.evaluation.sampling,
            namespace="validation",
            lockstep=True,
        )
        return sum(e.success for e in episodes) / len(episodes)


def bits(episodes: Sequence[Episode]) -> str:
    """Success task by task, in the tasks' order: `1` or `0`."""
    return "".join("01"[episode.success] for episode in episodes)


def spent(started: float) -> dict[str, float]:
    return {"seconds": round(time.monotonic() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=WORLDS, nargs="*", default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    parser.add_argument("--model", default=MODEL, help="who plays and learns")
    parser.add_argument("--coach", default=COACH, help="the larger model of the arms that have one")
    parser.add_argument("--force", action="store_true", help="train also where the gap test refuses")
    parser.add_argument("--page", action="store_true", help="only build the page of the runs that are there")
    parser.add_argument("--out", type=Path, help="one JSON file a run; default docs/results/evidence")
    parser.add_argument("--work", type=Path, help="texts, stores and checkpoints; default runs/evidence")
    given = parser.parse_args()
    own = "" if given.model == MODEL else "-" + given.model.strip("/").replace("/", "-").lower()
    out, work = given.out or Path(f"docs/results/evidence{own}"), given.work or Path(f"runs/evidence{own}")
    if not given.world and not given.page:
        parser.error("give --world, or --page")
    with ConsoleListener(Console(stderr=True)) as listener:
        for world in given.world:
            for seed in given.seeds:
                bench = Bench(world, seed, given.model, given.coach, work, listener)
                run_all(bench, given.arms, out, force=given.force)
    print(json.dumps(build(out)))


def run_all(bench: Bench, arms: Sequence[str], out: Path, *, force: bool) -> None:
    """All arms of a world and seed that have not been run."""
    world, seed = bench.world, bench.seed
    missing = [name for name in arms_of(world) if name in arms and not (out / world / f"{name}-{seed}.json").exists()]
    if not missing:
        return
    bench.work.mkdir(parents=True, exist_ok=True)
    (out / world).mkdir(parents=True, exist_ok=True)
    for name in missing:
        bench.listener.stage("evidence", f"{world}, seed {seed}: {ARMS[name].title}")
        row: dict[str, Any] = {"world": world, "arm": name, "seed": seed, "model": bench.model}
        try:
            row |= bench.run(name, force=force)
        except EngrainError as error:
            row["error"] = str(error)
        row["machine"] = where()
        (out / world / f"{name}-{seed}.json").write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
        rate = sum(map(int, row["test"])) / len(row["test"]) if "test" in row else None
        print(f"{world:10} seed {seed} {name:24} {row.get('refused') or row.get('error') or f'{rate:.2f}'}", flush=True)


if __name__ == "__main__":
    main()
