"""Does it learn, on more than one world? Every way to use a knowledge text, on the same budget, three seeds, paired.

    python benchmarks/evidence.py --world sums [--seeds 3] [--arms opcd-forward_kl ...] [--force] [--retry]
    python benchmarks/evidence.py --page        # tables and plots of all runs that are there
    python benchmarks/evidence.py --world sokoban --model Qwen/Qwen2.5-1.5B-Instruct --coach Qwen/Qwen2.5-3B-Instruct

The knowledge of a world and seed is what the model itself extracts from twelve played tasks (the written prompt for
`helpdesk`), filtered by validation as in a round, or not. If its gap to the bare model is not there on validation
tasks, the loop would train nothing; then no method is trained either, unless `--force` is given, and the run says so.
The larger model's own gap counts where it teaches. Every method gets the same number of training episodes of the same
longest length; what it sampled is counted, and one arm stops OPCD where off-policy's tokens are spent. Each checkpoint
is chosen on 32 validation tasks. Settings are the demo's, which were chosen on validation tasks of `sums` for OPCD with
forward KL; no other method was tuned. Math tasks of seeds 0 to 2 were looked at while Engrain was built, so math worlds
are asked with seeds 3 to 5.

Measured without training tasks, and paired by task: 128 test tasks; 48 plain problems of other kinds and a hundred
checkable instructions (`instructions.py`), replies cut at 32 tokens, which nobody trained on; and 32 episodes at
temperature 1 for entropy, length, variety and phrases that cite experience. One JSON file a run; what is there is not
run again unless it failed or was refused and `--retry` is given, and a run that was cut goes on. The last line is JSON.

Run only when they are named: `frozenlake` and `sokoban`, which are for a GPU, `chains`, and the objectives that
`recovery.py` has measured with three seeds (skew KL, top-k, forward KL first and reverse KL later). Runs of another
model, any that `engrain improve --model` takes, go to a folder of their own.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

from evidence_page import build
from evidence_worlds import ARMS, COACH, PLACEBOS, WORLDS, arms_of, planned, settings_of
from measure import where
from rich.console import Console
from rounds import bits, monitored

from agent.engines.transformers import TransformersEngine
from agent.episode import Episode, SamplingParams
from agent.models.resolve import resolve
from agent.rollout import play
from distill.config import DistillConfig
from engrain.config import ImproveConfig
from engrain.console import ConsoleListener
from engrain.consolidate import consolidate
from engrain.demo import MODEL
from engrain.evaluate import failures
from engrain.gate import paired_gain
from engrain.loop import Round
from engrain.rounds import RoundTasks, open_round
from envs.base import Task
from envs.errors import EngrainError, UsageError
from memory.records import Knowledge, digest
from memory.render import compose, count_tokens
from memory.store import Store

#: Tasks that are played together, which a cut costs at most; the first so many are sampled for the monitor.
TOGETHER = 32
#: Most tokens of raw traces in a context.
TRACES = 1024


class Bench:
    """One world and seed: its tasks, its texts, and how students are measured."""

    def __init__(
        self, world: str, seed: int, model: str, coach: str, out: Path, work: Path, listener: ConsoleListener
    ) -> None:
        self.world, self.seed, self.listener = world, seed, listener
        self.out, self.work = out / world, work / world
        self.model, self.coach = model, coach
        self.config: ImproveConfig = settings_of(world, seed, model)

    @cached_property
    def tasks(self) -> RoundTasks:
        return RoundTasks.draw(self.config)

    @cached_property
    def engine(self) -> TransformersEngine:
        return TransformersEngine(resolve(self.model), name=self.model)

    def text(self, name: str) -> dict[str, Any]:
        """A knowledge text with its gap to the bare model on validation tasks; kept in a file.

        Raises:
            UsageError: the file is of another model, coach or settings.
        """
        path = self.work / f"text-{name}-{self.seed}.json"
        coach = self.coach if name == "coach" else None
        config = settings_of(self.world, self.seed, self.model, coach=coach)
        made_by = {"model": self.model, "coach": coach, "settings": digest(config.model_dump_json())}
        if not path.exists():
            found = self._make(name, config)
            gap = paired_gain(self._bare, self._validated(found))
            write(path, {"text": found, "gap": gap.model_dump(), "positive": gap.positive, **made_by})
        kept: dict[str, Any] = json.loads(path.read_text())
        if any(kept.get(key) != value for key, value in made_by.items()):
            raise UsageError(f"{path} was made with another model, coach or settings; name another folder with --work")
        return kept

    def _make(self, name: str, config: ImproveConfig) -> str:
        if name in PLACEBOS:
            return PLACEBOS[name]
        if (written := WORLDS[self.world].written) is not None:
            return written
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
            if count_tokens(text + "".join(said), self.engine.tokenizer) <= TRACES:
                text += "".join(said)
        return text

    @cached_property
    def _bare(self) -> list[bool]:
        """The base model's outcomes on validation tasks, which every text is compared with."""
        return self._validated(None)

    def _validated(self, text: str | None, engine: TransformersEngine | None = None) -> list[bool]:
        return [e.success for e in self._play(self.tasks.validation, text, engine=engine)]

    def _play(
        self,
        tasks: Sequence[Task],
        text: str | None,
        sampling: SamplingParams | None = None,
        engine: TransformersEngine | None = None,
    ) -> list[Episode]:
        return play(
            tasks,
            engine or self.engine,
            sampling=sampling or self.config.evaluation.sampling,
            namespace="evidence",
            knowledge=text,
            seed=self.seed,
            lockstep=True,
        )

    def measure(self, text: str | None, kept: Path) -> dict[str, Any]:
        """Everything that is measured of the student that is loaded, with a text in its context or without.

        What is there is kept in a file, and not measured again for the same text and student; `seconds` is what it
        took.
        """
        greedy = SamplingParams(temperature=0.0, max_tokens=32)
        restricted = self.config.evaluation.sampling.admissible_only
        free = SamplingParams(temperature=1.0, max_tokens=32, admissible_only=restricted)
        asked = {"test": (self.tasks.test, self.config.evaluation.sampling)}
        asked |= {name: (tasks, greedy) for name, tasks in self.tasks.ood.items()}
        asked["sampled"] = (self.tasks.test[:TOGETHER], free)
        made_by = {"text": text, "student": self.engine.checkpoint}
        found: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
        if any(found.get(key) != value for key, value in made_by.items()):
            found = {}
        parts: dict[str, Any] = found.get("parts", {})
        earlier = sum(part["seconds"] for part in parts.values())
        for name, (tasks, sampling) in asked.items():
            part = parts.setdefault(name, {"outcomes": "", "broken": 0, "seconds": 0.0})
            for first in range(len(part["outcomes"]), len(tasks), TOGETHER):
                started = time.monotonic()
                episodes = self._play(tasks[first : first + TOGETHER], text, sampling)
                part["outcomes"] += bits(episodes)
                part["broken"] += len(failures(episodes))
                if name == "sampled":
                    part["monitored"] = monitored(episodes, self.engine)
                part["seconds"] += spent(started)
                write(kept, {**made_by, "parts": parts})
        row: dict[str, Any] = {
            "test": parts["test"]["outcomes"],
            "other": {name: parts[name]["outcomes"] for name in self.tasks.ood},
            "sampled": parts["sampled"]["monitored"],
            "broken": {name: part["broken"] for name, part in parts.items() if part["broken"]},
            "seconds": earlier,
        }
        if groups := [task.parameters["template"] for task in self.tasks.test if "template" in task.parameters]:
            row["groups"] = groups
        return row

    def run(self, name: str, *, force: bool) -> dict[str, Any]:
        """One arm: what it trained, if anything, and all measurements."""
        arm = ARMS[name]
        started = time.monotonic()
        self.engine.load(None)  # also after an arm that failed with its student loaded
        known = self.text(arm.text) if arm.text else None
        row: dict[str, Any] = {"knowledge": known["text"], "gap": known["gap"]} if known else {}
        if arm.text == "coach":
            row["coach"] = self.coach
        if arm.distill is not None:
            assert known is not None
            row |= self._distil(name, known, force=force)
            if "refused" in row:
                return row
        row |= self.measure(known["text"] if known and arm.in_context else None, self.parts(name))
        row["seconds"] += spent(started)
        return row

    def _distil(self, name: str, known: dict[str, Any], *, force: bool) -> dict[str, Any]:
        """Train as the arm says, if the gap test passes, or it is forced, or a placebo is."""
        arm = ARMS[name]
        asked, teacher = dict(arm.distill or {}), None
        if "teacher" in asked:
            asked["teacher"] = self.coach
            teacher = TransformersEngine(resolve(self.coach), name=self.coach)
        config = DistillConfig.model_validate({**self.config.distill.model_dump(), **asked})
        row: dict[str, Any] = {}
        with nullcontext() if teacher is None else closing(teacher):
            positive = known["positive"]
            if teacher is not None:
                gap = paired_gain(self._bare, self._validated(known["text"], teacher))
                row["gap"], positive = gap.model_dump(), gap.positive
            row["gap_test"] = "passed" if positive else "refused"
            if not positive and not (force or arm.text in PLACEBOS):
                return row | {"refused": "the gap is not there on validation tasks: the loop trains nothing"}
            row["forced"] = not positive
            if arm.tokens_of is not None:
                guard = config.guard.model_copy(update={"max_sampled_tokens": self._tokens_of(arm.tokens_of)})
                config = config.model_copy(update={"guard": guard})
            return row | self._train(config, known["text"], self.folder(name), teacher)

    def _tokens_of(self, name: str) -> int:
        """What another arm sampled.

        Raises:
            UsageError: it has not been trained on this world and seed.
        """
        row = self.made(name) or {}
        if "sampled_tokens" not in row:
            raise UsageError(f"{self.world}, seed {self.seed}: {name} says how many tokens to sample; run it first")
        return int(row["sampled_tokens"])

    def made(self, name: str) -> dict[str, Any] | None:
        """The run of an arm, if it was made."""
        path = self.out / f"{name}-{self.seed}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def folder(self, name: str) -> Path:
        """Where an arm is trained; it stays until the run is written."""
        return self.work / f"{name}-{self.seed}"

    def parts(self, name: str) -> Path:
        """Where what was measured of an arm is kept until the run is written."""
        return self.work / f"measured-{name}-{self.seed}.json"

    def _train(
        self, config: DistillConfig, text: str, folder: Path, teacher: TransformersEngine | None
    ) -> dict[str, Any]:
        """Train, and leave the engine with the best checkpoint by validation."""
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
            "dropped": sum(m.dropped for m in steps),
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


def write(path: Path, content: dict[str, Any]) -> None:
    """A JSON file, there whole or not at all."""
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def commit() -> str | None:
    """The code that made a run."""
    try:
        asked = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def spent(started: float) -> float:
    return round(time.monotonic() - started, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=WORLDS, nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=3, choices=(1, 2, 3), help="how many of the world's three seeds")
    parser.add_argument("--seed", type=int, nargs="+", help="these seeds instead")
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", help="default: those planned for the world")
    parser.add_argument("--model", default=MODEL, help="who plays and learns")
    parser.add_argument("--coach", default=COACH, help="the larger model of the arms that have one")
    parser.add_argument("--force", action="store_true", help="train also where the gap test refuses")
    parser.add_argument("--retry", action="store_true", help="again what failed or was refused")
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
            for seed in given.seed or WORLDS[world].seeds[: given.seeds]:
                bench = Bench(world, seed, given.model, given.coach, out, work, listener)
                run_all(bench, given.arms or planned(world), force=given.force, retry=given.retry)
    print(json.dumps(build(out)))


def run_all(bench: Bench, arms: Sequence[str], *, force: bool, retry: bool) -> None:
    """All arms of a world and seed that have not been run."""
    world, seed = bench.world, bench.seed

    def done(name: str) -> bool:
        row = bench.made(name)
        return row is not None and not (retry and "test" not in row)

    missing = [name for name in arms_of(world) if name in arms and not done(name)]
    if not missing:
        return
    bench.work.mkdir(parents=True, exist_ok=True)
    bench.out.mkdir(parents=True, exist_ok=True)
    for name in missing:
        bench.listener.stage("evidence", f"{world}, seed {seed}: {ARMS[name].title}")
        row: dict[str, Any] = {"world": world, "arm": name, "seed": seed, "model": bench.model}
        try:
            row |= bench.run(name, force=force)
        except EngrainError as error:
            row["error"] = str(error)
        row |= {"machine": where(), "commit": commit()}
        write(bench.out / f"{name}-{seed}.json", row)
        bench.parts(name).unlink(missing_ok=True)
        if "steps" in row:
            shutil.rmtree(bench.folder(name))
        rate = sum(map(int, row["test"])) / len(row["test"]) if "test" in row else None
        print(f"{world:10} seed {seed} {name:24} {row.get('refused') or row.get('error') or f'{rate:.2f}'}", flush=True)


if __name__ == "__main__":
    main()
