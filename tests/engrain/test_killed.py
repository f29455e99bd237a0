"""`engrain improve` and `engrain distill` killed at random moments: the books end as those of an unbroken run.

The processes are real, the command line is the real one and so are the signals; see `kill_server.py` for how they are
started and hit. The model is tiny and random, and the world is made for it (`mimic.py`). A coach on a server writes the
items.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from engrain.config import ImproveConfig
from engrain.rounds import open_round
from memory.columns import unpack_logprobs
from memory.records import RoundStatus
from memory.store import Store
from tests.agent.fake_server import FakeServer
from tests.engrain import mimic
from tests.engrain.mimic import ITEM

STAGES = ("play", "extract", "curate", "select", "consolidate", "judge")
#: How many of the 20 kills hit each stage, and the time before the first of them.
KILLS = {"start": 1, "play": 3, "extract": 2, "curate": 2, "select": 3, "consolidate": 6, "judge": 3}
STEPS = 6
ITEMS = (ITEM, "Drink water before noon.", "Wear a hat against the rain.")


class Coach(FakeServer):
    """Answers every request to look back at an episode with an item; which one depends on the episode."""

    def handle(self, http: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if http.path != "/v1/chat/completions":
            return super().handle(http, body)
        place = int(hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest(), 16) % (2 * len(ITEMS))
        item = ITEMS[max(0, place - len(ITEMS))]  # mostly the first
        message = {"role": "assistant", "content": f"- EXPERIENCE ITEM: {item}"}
        return self.reply(http, 200, {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})


#: What no two runs share: times, and what follows from them.
TIMES = {
    "created_at", "updated_at", "started_at", "added_at", "finished_at", "promoted_at", "last_seen", "at", "seconds",
    "tokens_per_second", "peak_memory_bytes", "seconds_sampling", "seconds_teacher", "seconds_student",
    "seconds_prefix",
}  # fmt: skip


def timeless(value: Any) -> Any:
    """JSON values without times."""
    if isinstance(value, dict):
        return {key: timeless(part) for key, part in value.items() if key not in TIMES}
    return [timeless(part) for part in value] if isinstance(value, list) else value


def files(folder: Path) -> dict[str, Any]:
    """What the files of a folder hold, hidden ones too: tensors bit for bit, JSON without times, of others nothing."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        kind, content = path.suffix, None
        if kind == ".safetensors":
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        elif kind == ".json":
            content = timeless(json.loads(path.read_text()))
        found[str(path.relative_to(folder))] = content
    return found


@dataclass(frozen=True)
class Books:
    """Every row of every table and every file of every run."""

    tables: Mapping[str, list[Any]]
    logprobs: Mapping[str, list[float]]  # by episode: how a batch was put together shows in the last bits
    files: Mapping[str, Any]

    @classmethod
    def read(cls, home: Path) -> Books:
        with closing(sqlite3.connect(home / "engrain.db")) as connection:
            connection.row_factory = sqlite3.Row
            names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            tables = {
                name: [cls._row(dict(row), home) for row in connection.execute(f"SELECT * FROM {name}")]
                for name in names
                if not name.startswith("sqlite_")
            }
        logprobs = {row["id"]: list(unpack_logprobs(row.pop("logprobs"))) for row in tables["episodes"]}
        for name, rows in tables.items():
            if name != "events":  # their order says what happened first
                rows.sort(key=repr)
        return cls(tables, logprobs, files(home / "runs"))

    @staticmethod
    def _row(row: dict[str, Any], home: Path) -> dict[str, Any]:
        for key, value in row.items():
            if isinstance(value, str):
                row[key] = value.replace(str(home), "HOME")
                with suppress(ValueError):  # a text, not JSON
                    row[key] = timeless(json.loads(row[key]))
        return {key: value for key, value in row.items() if key not in TIMES}

    def same(self, other: Books) -> None:
        assert self.tables.keys() == other.tables.keys()
        for name, rows in self.tables.items():
            assert rows == other.tables[name], name
        assert self.files.keys() == other.files.keys()
        for name, content in self.files.items():
            assert content == other.files[name], name
        for name, values in self.logprobs.items():
            assert values == pytest.approx(other.logprobs[name], abs=1e-3)
        assert self.tables["leases"] == []


class Runner:
    """Starts commands through the process that forks."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        command = [sys.executable, str(Path(__file__).with_name("kill_server.py"))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
        self._answer()

    def __call__(
        self, *argv: object, home: Path, plan: Mapping[str, Any] | None = None, beside: bool = False
    ) -> dict[str, Any]:
        job: dict[str, Any] = {"argv": [*map(str, argv)], "env": {"ENGRAIN_HOME": str(home)}}
        job["log"] = str(home.with_suffix(".log"))
        return self.ask(job | ({"plan": plan} if plan else {}) | ({"beside": job} if beside else {}))

    def ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process that forks has died"
        return json.loads(line)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)


class Bench:
    """A model, a world, a coach, settings, and the process that forks."""

    def __init__(self, folder: Path, model: Path, config: Path, run: Runner) -> None:
        self.folder, self.model, self.config, self.run = folder, model, config, run

    def begin(self, name: str) -> Path:
        """A home with a store in which the round, always the same one, has just been opened."""
        home = self.folder / name
        home.mkdir()
        shutil.copy(self.folder / "begun.db", home / "engrain.db")
        return home

    def improve(self, home: Path, plan: Mapping[str, Any] | None = None, beside: bool = False) -> dict[str, Any]:
        return self.run("improve", "--config", self.config, home=home, plan=plan, beside=beside)

    def log(self, home: Path) -> str:
        return home.with_suffix(".log").read_text()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, tiny_tokenizer: Any) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("killed")
    model = folder / "tiny"
    tiny_model(initializer_range=0.2).save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    coach = Coach(tiny_tokenizer, model=str(model))
    runner = Runner(folder, {**mimic.install(folder, model), "OMP_NUM_THREADS": "1"})
    extract = {"episodes": 6, "budget_tokens": 300, "candidates": 3, "coach": f"{model}@{coach.url}"}
    config = ImproveConfig.model_validate({**mimic.settings(model, STEPS), "extract": extract})
    file = folder / "config.json"
    file.write_text(config.model_dump_json())
    with Store.open(str(folder / "begun.db")) as store:
        open_round(store, config)
    yield Bench(folder, model, file, runner)
    runner.close()
    coach.stop()


@dataclass(frozen=True)
class Whole:
    """The unbroken run: what is in its books, and what it took."""

    books: Books
    calls: Mapping[str, int]  # calls and returns in each stage
    seconds: Mapping[str, float]
    prompts: int


@pytest.fixture(scope="module")
def whole(bench: Bench) -> Whole:
    counted = bench.improve(bench.begin("counted"), {"count": True})
    assert counted["code"] == 0, bench.log(bench.folder / "counted")
    calls = next(said[1] for said in counted["said"] if said[0] == "calls")
    home = bench.begin("whole")
    done = bench.improve(home)
    assert done["code"] == 0, bench.log(home)
    began = [said[1:] for said in done["said"] if said[0] == "stage"]
    seconds = {name: later - at for (name, at), (_, later) in pairwise(began)}
    assert tuple(name for name, _ in began) == (*STAGES, "finish")
    return Whole(Books.read(home), calls, seconds, sum(prompts(done)))


def prompts(done: Mapping[str, Any]) -> list[int]:
    """How many prompts each call of the engine had."""
    return [said[1] for said in done["said"] if said[0] == "prompts"]


def stage_of(done: Mapping[str, Any]) -> str:
    """Where a process was when it was killed."""
    return next((said[1] for said in reversed(done["said"]) if said[0] in ("signalled", "stage")), "start")


def over(home: Path) -> bool:
    """Whether the round is."""
    with Store.open(str(home / "engrain.db")) as store:
        (record,) = store.rounds()
    return record.status != RoundStatus.RUNNING


def test_twenty_kills_change_nothing(bench: Bench, whole: Whole) -> None:
    draw = random.Random(20)
    plans: list[dict[str, Any]] = []
    for stage, count in KILLS.items():
        for number in range(count):
            share = draw.random()
            late = number and stage in whole.seconds  # the first one of a stage hits it for certain
            where = {"seconds": share * whole.seconds[stage]} if late else {"calls": int(share * whole.calls[stage])}
            plans.append({"stage": stage, **where})
    hit: list[str] = []
    while plans:
        home, taken = bench.begin(f"killed-{len(hit)}"), []
        while plans:
            plan = plans.pop(0)
            taken.append(bench.improve(home, plan))
            if taken[-1]["code"] == 0:  # the clock's kill came too late: another round takes it
                plans.insert(0, {"stage": plan["stage"], "calls": 1})
                break
            assert taken[-1]["code"] == -signal.SIGKILL, bench.log(home)
            hit.append(stage_of(taken[-1]))
            if over(home):  # the clock's kill came after the last write: the command would begin another round
                break
        if not over(home):
            taken.append(bench.improve(home))
            assert taken[-1]["code"] == 0, bench.log(home)
        Books.read(home).same(whole.books)
        no_more_than_the_last_batch_again(taken, whole)
    assert len(hit) == 20
    assert set(hit) >= set(KILLS)  # a kill by the clock may also land in the moments after the last stage


def no_more_than_the_last_batch_again(taken: Sequence[Mapping[str, Any]], whole: Whole) -> None:
    """All processes of a round together sampled and trained what the unbroken one did, and once more what was cut."""
    sampled = [prompts(one) for one in taken]
    assert sum(map(sum, sampled)) - whole.prompts <= sum(calls[-1] for calls in sampled[:-1] if calls)
    steps = [said[1] for one in taken for said in one["said"] if said[0] == "step"]
    assert sorted(set(steps)) == list(range(1, STEPS + 1))
    assert len(steps) - STEPS <= sum(stage_of(one) == "consolidate" for one in taken[:-1])


#: Functions, named where they are called from, after whose return, the so-many-th time, a process is killed: where two
#: writes belong together.
JOINTS = (
    ("memory.experience:ExperienceTable.add_extraction", 2),
    ("memory.items:ItemTable.add_item", 1),
    ("memory.items:ItemTable.add_item", 3),
    ("memory.lineage:LineageTable.add_evaluation", 2),
    ("memory.items:ItemTable.record_effect", 1),
    ("distill.checkpoint:_write_weights", 2),
    ("distill.trainer:Trainer._keep", 1),
    ("distill.trainer:save_checkpoint", 3),
    ("memory.lineage:LineageTable.add_checkpoint", 1),
    ("memory.lineage:LineageTable.finish_run", 1),
    ("memory.lineage:LineageTable.set_checkpoint_status", 1),
    ("engrain.report:write", 1),
)


def test_a_kill_between_two_writes_that_belong_together_changes_nothing(bench: Bench, whole: Whole) -> None:
    home = bench.begin("joints")
    for function, times in JOINTS:
        done = bench.improve(home, {"returns": function, "times": times})
        assert done["code"] == -signal.SIGKILL, f"{function}: {bench.log(home)}"
    assert bench.improve(home)["code"] == 0
    Books.read(home).same(whole.books)


def test_a_signal_in_any_stage_ends_it_within_ten_seconds_and_changes_nothing(bench: Bench, whole: Whole) -> None:
    home, draw = bench.begin("stopped"), random.Random(10)
    for place, stage in enumerate(("start", *STAGES)):
        number = (signal.SIGTERM, signal.SIGINT)[place % 2]
        calls = int(draw.uniform(0.1, 0.9) * whole.calls[stage])
        done = bench.improve(home, {"stage": stage, "calls": calls, "signal": number})
        assert done["code"] == 128 + number, bench.log(home)
        assert done["seconds"] < 10
        assert bench.log(home).rstrip().endswith("run the same command again to go on")
    assert bench.improve(home)["code"] == 0
    Books.read(home).same(whole.books)


def test_a_second_loop_refuses_and_names_the_first_which_goes_on(bench: Bench, whole: Whole) -> None:
    home = bench.begin("two")
    plan = {"stage": "select", "calls": whole.calls["select"] // 2, "signal": signal.SIGSTOP}
    first = bench.improve(home, plan, beside=True)
    assert first["beside"]["code"] == 2
    refusal = bench.log(home).replace("\n", " ")
    assert f"another loop improves {bench.model} in" in refusal
    assert f"process {first['pid']} on" in refusal
    assert first["code"] == 0, bench.log(home)
    Books.read(home).same(whole.books)


def test_a_killed_distillation_ends_in_the_same_bits(bench: Bench) -> None:
    text = bench.folder / "knowledge.txt"
    text.write_text(ITEM)

    def distil(name: str, plan: Mapping[str, Any] | None = None) -> dict[str, Any]:
        options = {
            "--knowledge": text, "--out": bench.folder / name / "run", "--model": bench.model, "--steps": 6,
            "--batch-size": 4, "--save-every": 3, "--validation": 4, "--tasks": 12, "--max-tokens": 2, "--rank": 4,
        }  # fmt: skip
        argv = [str(part) for option in options.items() for part in option]
        (bench.folder / name).mkdir(exist_ok=True)
        return bench.run("distill", "mimic", *argv, home=bench.folder / name, plan=plan)

    done = distil("distilled", {"count": True})
    assert done["code"] == 0, bench.log(bench.folder / "distilled")
    total = next(said[1]["start"] for said in done["said"] if said[0] == "calls")
    draw = random.Random(2)
    for plan in (
        {"returns": "distill.trainer:Trainer.step", "times": draw.randint(1, 5)},
        {"stage": "start", "calls": int(draw.uniform(0.7, 0.9) * total)},
    ):
        assert distil("cut", plan)["code"] == -signal.SIGKILL
    assert distil("cut")["code"] == 0, bench.log(bench.folder / "cut")
    ours, theirs = (files(bench.folder / name / "run") for name in ("cut", "distilled"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name] == theirs[name], name
