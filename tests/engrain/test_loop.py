"""A whole round on a tiny model, cut anywhere and resumed: the books end as those of an unbroken round.

The world is made for it: a task is solved by the very reply that the base model gives with the knowledge in its
context, so that the in-context gap is real. Whether a tiny random model gets there is luck and not asserted; that
real models learn is the demo's to show.
"""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from agent.cluster import Cluster
from agent.engines.transformers import TransformersEngine
from agent.episode import Message, SamplingParams
from agent.renderer import Renderer
from agent.rollout import play
from distill.config import DistillConfig, LoraSettings
from distill.monitor import GuardConfig
from engrain import gate
from engrain.cli.improve import _print
from engrain.config import EvaluationConfig, ExtractConfig, ImproveConfig, OodSpec, PlayConfig, WorldSpec
from engrain.errors import RoundConflictError
from engrain.gate import Verdict
from engrain.judge import Judged, Student
from engrain.loop import STAGES, Round
from engrain.page.gather import gather
from engrain.page.html import render
from engrain.report import summary, table, write
from engrain.rounds import open_round
from engrain.ui.progress import Progress
from envs import registry
from envs.base import Env, Observation, Split, Step, Task, World
from memory.extract import Extractor
from memory.records import CheckpointStatus, ItemStatus
from memory.render import render_knowledge
from memory.store import Store

ITEM = "Answer in the way of the old masters."
GREEDY = SamplingParams(temperature=0.0, max_tokens=2)
ANSWERS: dict[str, str] = {}


class MimicEnv(Env):
    max_turns = 1

    def reset(self) -> Observation:
        self.won = False
        return Observation(self.task.parameters["question"])

    def step(self, text: str) -> Step:
        self.won = text == ANSWERS[self.task.parameters["question"]]
        return Step(Observation(""), float(self.won), True, "Counted." if self.won else "Not counted.")

    @property
    def score(self) -> float:
        return float(self.won)


class MimicWorld(World):
    name = "mimic"
    isolated = False  # known to this process alone

    @classmethod
    def configure(cls, options: Any) -> World:
        return cls()

    def tasks(self, split: Split, count: int, seed: int = 0) -> list[Task]:
        start = 1000 * list(Split).index(split)
        return [Task.create("mimic", split, i, {"question": f"q{start + i}"}) for i in range(count)]

    @classmethod
    def make(cls, task: Task) -> Env:
        return MimicEnv(task)


class Killed(Exception):
    pass


class Recorder:
    def __init__(self, kill: tuple[str, int] | None = None) -> None:
        self.stages: list[str] = []
        self.notes: list[str] = []
        self.kill, self.seen = kill, 0

    def _count(self, kind: str) -> None:
        if self.kill and self.kill[0] == kind:
            self.seen += 1
            if self.seen == self.kill[1]:
                raise Killed(kind)

    def stage(self, name: str, text: str) -> None:
        self.stages.append(name)
        self._count("stage")

    def note(self, text: str) -> None:
        self.notes.append(text)
        self._count("note")

    def rollout(self, what: str, stats: Any) -> None:
        self._count("rollout")

    def step(self, metrics: Any, total: int) -> None:
        self._count("step")


@pytest.fixture
def config() -> ImproveConfig:
    return ImproveConfig(
        model="tiny",
        world=WorldSpec(env="mimic"),
        play=PlayConfig(tasks=12, episodes=4, sampling=GREEDY),
        extract=ExtractConfig(episodes=2, budget_tokens=200, candidates=2),
        evaluation=EvaluationConfig(
            validation_tasks=6,
            test_tasks=16,
            looks=1,
            sampling=GREEDY,
            ood=(OodSpec(env="mimic", tasks=4),),
            ood_margin=1.0,
        ),
        distill=DistillConfig(
            objective="forward_kl",
            steps=4,
            batch_size=4,
            learning_rate=1e-2,
            save_every=2,
            sampling=SamplingParams(max_tokens=2),
            lora=LoraSettings(rank=8),
            guard=GuardConfig(
                rising_steps=None, min_entropy_ratio=None, min_distinct_ratio=None, min_length_ratio=None
            ),
        ),
    )


@pytest.fixture
def run(tiny_model, tiny_tokenizer, config, tmp_path, monkeypatch):
    monkeypatch.setattr(
        registry, "_world_class", lambda name: MimicWorld if name == "mimic" else pytest.fail(f"asked for {name}")
    )

    def model():
        return tiny_model(initializer_range=0.2)

    with TransformersEngineClosing(model(), tiny_tokenizer) as engine:
        renderer = Renderer(tiny_tokenizer)
        for split in Split:
            questions = [t.parameters["question"] for t in MimicWorld().tasks(split, 16)]
            prompts = [renderer.prompt([Message(role="user", content=q)], render_knowledge([ITEM])) for q in questions]
            for question, completion in zip(questions, engine.generate(prompts, [GREEDY] * 16), strict=True):
                ANSWERS[question] = renderer.decode(completion.token_ids)

    def wrote(self: Extractor, episodes: Any, seed: int) -> Any:
        return [
            self._extraction([e], seed, f"- EXPERIENCE ITEM: {ITEM}", _Parsed((ITEM,), ("- EXPERIENCE:",)))
            for e in episodes
        ]

    monkeypatch.setattr(Extractor, "extract", wrote)

    def go(name: str, listener: Recorder, engines: Any = None, **changed: Any):
        settings = config.model_copy(update=changed)
        with (
            Store.open(str(tmp_path / f"{name}.db")) as store,
            TransformersEngineClosing(model(), tiny_tokenizer) as engine,
        ):
            record = open_round(store, settings)
            return Round(store, engine, settings, record, tmp_path / name, listener, **engines or {}).run(), settings

    return go


class _Parsed:
    def __init__(self, items: tuple[str, ...], malformed: tuple[str, ...]) -> None:
        self.items, self.malformed = items, malformed


class TransformersEngineClosing:
    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.engine = TransformersEngine(model, tokenizer, name="tiny")

    def __enter__(self) -> TransformersEngine:
        return self.engine

    def __exit__(self, *error: object) -> None:
        self.engine.close()


def books(path: Any) -> dict[str, Any]:
    """Everything that must not depend on where a round was cut; times and random ids left out."""
    with Store.open(str(path)) as store:
        (record,) = store.rounds()
        return {
            "counts": store.counts(),
            "status": record.status,
            "verdict": record.verdict,
            "evaluations": sorted((e.name, e.accuracy, e.n, e.knowledge or "") for e in store.evaluations()),
            "knowledge": [k.text for k in store.knowledge_versions()],
            "checkpoints": [(c.status, c.manifest["step"]) for c in store.checkpoints()],
            "support": [i.support for i in store.items()],
        }


def test_a_round_learns_judges_and_reports(run, tmp_path) -> None:
    listener = Recorder()
    result, config = run("whole", listener)
    assert listener.stages == list(STAGES)
    assert result.evaluations["bare"].accuracy == 0.0
    assert result.evaluations["in_context"].accuracy == 1.0
    assert result.verdict is not None
    assert result.verdict.promoted == result.verdict.gain.positive  # the margin for other worlds is 1 here
    assert result.verdict.promoted == (result.checkpoint.status is CheckpointStatus.PROMOTED)
    facts = summary(result, config)
    assert facts["knowledge"].endswith(ITEM)
    assert facts["recovery"] == pytest.approx(result.evaluations["distilled"].accuracy)
    assert facts["bare"]["n"] == 16
    assert write(result, config, tmp_path / "out").is_file()
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert table(result).row_count == 6
    with Store.open(str(tmp_path / "whole.db")) as store:
        by_split = {s: {e.task_id for e in store.episode_rows(split=s)} for s in ("train", "validation", "test", "ood")}
        assert all(not by_split[a] & by_split[b] for a in by_split for b in by_split if a < b)
        assert {row.stage for row in store.episode_rows(split="test")} == {
            "test/bare",
            "test/in_context",
            "test/distilled",
        }
        assert (store.current_checkpoint("tiny") is not None) == result.verdict.promoted
        assert all(e.knowledge is None for e in store.episodes(stage="train"))


@pytest.fixture(scope="module")
def unbroken():
    """The books of a round that nothing cut, played once."""
    found: list[dict[str, Any]] = []

    def get(run, tmp_path) -> dict[str, Any]:
        if not found:
            run("unbroken", Recorder())
            found.append(books(tmp_path / "unbroken.db"))
        return found[0]

    return get


class Sampler(TransformersEngine):
    """An engine that sleeps, and notes what it does."""

    can_sleep = True

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.did: list[str] = []
        super().__init__(*arguments, **named)

    def sleep(self) -> None:
        self.did.append("sleep")

    def wake(self) -> None:
        self.did.append("wake")

    def load(self, checkpoint: Any) -> None:
        assert self.did.count("sleep") == self.did.count("wake"), "loads while it sleeps"
        self.did.append("load")
        super().load(checkpoint)

    def generate(self, prompts: Any, sampling: Any) -> Any:
        assert self.did.count("sleep") == self.did.count("wake"), "asked while it sleeps"
        self.did.append("generate")
        return super().generate(prompts, sampling)


@pytest.fixture
def sampler(tiny_model, tiny_tokenizer):
    engine = Sampler(tiny_model(initializer_range=0.2), tiny_tokenizer, name="tiny")
    yield engine
    engine.close()


def test_another_engine_plays_and_sleeps_during_training(run, tmp_path, unbroken, sampler) -> None:
    run("sampled", Recorder(), {"sampler": sampler})
    asleep = sampler.did.index("sleep")
    assert sampler.did[asleep + 1] == "wake"  # training asks its own engine
    before, after = sampler.did[:asleep], sampler.did[asleep + 2 :]
    assert "generate" in before
    assert "generate" in after
    assert "load" in after  # the new checkpoint
    assert books(tmp_path / "sampled.db") == unbroken(run, tmp_path)


def test_training_samples_from_another_engine_that_gets_the_weights(run, tmp_path, unbroken, sampler, config) -> None:
    distill = config.distill.model_copy(update={"sync_every": 2})
    result, _ = run("synced", Recorder(), {"sampler": sampler, "synced": True}, distill=distill)
    assert [metrics.staleness for metrics in result.history] == [0, 1, 0, 1]
    step, sync = ["wake", "generate", "sleep"], ["wake", "load", "generate", "sleep"]
    asleep = sampler.did.index("sleep")
    assert sampler.did[asleep + 1 :][:15] == [*sync, *step, *sync, *step, "wake"]  # awake only to sample
    with Store.open(str(tmp_path / "synced.db")) as store:
        played = [row.checkpoint for row in store.episode_rows(stage="train")]
        assert sorted(played, key=str) == [None] * 8 + ["synced@2"] * 8
    run("fresh", Recorder(), {"sampler": sampler, "synced": True})  # refreshed at every step
    assert books(tmp_path / "fresh.db") == unbroken(run, tmp_path)


class Here(Cluster):
    """Players that are in this process: what a cluster does with its arguments, without one."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.engine, self.stages, self.checkpoint = engine, [], None

    def load(self, checkpoint: Any) -> None:
        self.engine.load(checkpoint)

    def play(self, tasks: Any, **options: Any) -> Any:
        self.stages.append(options["namespace"].split("/")[1])
        self.engine.checkpoint = self.checkpoint
        return play(tasks, self.engine, lockstep=True, **options)


def test_players_on_a_cluster_write_the_same_books(run, tmp_path, unbroken, sampler) -> None:
    players = Here(sampler)
    run("spread", Recorder(), {"players": players})
    assert {"play", "validation", "test", "ood"} <= set(players.stages)
    assert books(tmp_path / "spread.db") == unbroken(run, tmp_path)


CUTS = [("stage", n) for n in range(1, 7)] + [
    ("note", 2),
    ("note", 4),
    ("rollout", 1),
    ("rollout", 9),
    ("step", 1),
    ("step", 3),
]


@pytest.mark.parametrize("cut", CUTS, ids=[f"{kind}-{n}" for kind, n in CUTS])
def test_a_round_cut_anywhere_ends_like_an_unbroken_one(run, tmp_path, cut, unbroken) -> None:
    with pytest.raises(Killed):
        run("cut", Recorder(cut))
    run("cut", Recorder())
    assert books(tmp_path / "cut.db") == unbroken(run, tmp_path)


class CutInLook(Recorder):
    """Kills a round while it plays `what` after so many looks, with at least one episode of the batch stored."""

    def __init__(self, looks: int, what: str) -> None:
        super().__init__()
        self.looks, self.what = looks, what

    def rollout(self, what: str, stats: Any) -> None:
        looks = sum(note.startswith("look ") for note in self.notes)
        if (what, looks) == (self.what, self.looks) and stats.episodes > stats.known:
            raise Killed(what)


@pytest.mark.parametrize("place", [(1, "test/bare"), (2, "test/in_context"), (3, "test/distilled")])
def test_a_judge_stage_cut_between_looks_plays_nothing_twice(run, config, tmp_path, monkeypatch, place) -> None:
    monkeypatch.setattr(gate, "_FUTILE", -1.0)  # no look but the last gives up
    evaluation = config.evaluation.model_copy(update={"looks": 4})
    asked: dict[str, int] = {"replies": 0}
    generate = TransformersEngine.generate

    def counted(self: Any, prompts: Any, sampling: Any) -> Any:
        asked["replies"] += len(prompts)
        return generate(self, prompts, sampling)

    monkeypatch.setattr(TransformersEngine, "generate", counted)
    whole, _ = run("whole", Recorder(), evaluation=evaluation)
    unbroken = asked.pop("replies")
    asked["replies"] = 0
    with pytest.raises(Killed):
        run("cut", CutInLook(*place), evaluation=evaluation)
    resumed, _ = run("cut", Recorder(), evaluation=evaluation)
    assert books(tmp_path / "cut.db") == books(tmp_path / "whole.db")
    assert resumed.verdict == whole.verdict
    with Store.open(str(tmp_path / "cut.db")) as store:
        (record,) = store.rounds()
        kept = Verdict.model_validate(record.state["judge"])  # either outcome with its evidence
    assert kept == whole.verdict
    assert [look.number for look in kept.looks] == [1, 2, 3, 4]
    assert asked["replies"] <= unbroken + 4  # at most the batch that was under way


def test_without_a_gap_nothing_is_trained(run, tmp_path, monkeypatch) -> None:
    for question in ANSWERS:
        monkeypatch.setitem(ANSWERS, question, "never said")
    result, config = run("flat", Recorder())
    assert result.status == "stopped"
    assert "training cannot pay" in result.reason
    assert result.checkpoint is None
    assert summary(result, config)["recovery"] is None
    assert not (tmp_path / "flat").exists()
    for method, line in (("opcd", "objective: forward_kl, on-policy"), ("off_policy", "method: off_policy, objective")):
        asked = config.model_copy(update={"distill": config.distill.model_copy(update={"method": method})})
        said = Console(file=io.StringIO())
        _print(said, result, table(result), summary(result, asked), asked)
        assert line in said.file.getvalue()


def test_a_given_text_is_distilled_and_judged_without_play_or_extraction(run, tmp_path) -> None:
    text = render_knowledge([ITEM])
    (tmp_path / "prompt.txt").write_text(text + "\n")
    listener = Recorder()

    result, _ = run("given", listener, knowledge=str(tmp_path / "prompt.txt"))

    assert listener.stages == ["select", "consolidate", "judge"]
    assert result.status == "finished"
    assert (result.knowledge.text, result.knowledge.items) == (text, ())
    assert result.knowledge.tokens > 0
    assert result.gap.difference == 1.0  # the world's answers are those that the model gives with this very text
    assert set(result.evaluations) == {"bare", "in_context", "distilled"}
    with Store.open(str(tmp_path / "given.db")) as store:
        assert store.items() == []
        [version] = store.knowledge_versions()
        page = render(gather(store, store.round(result.round.id)))
    assert f"It was given a text of {len(text.splitlines())} lines and " in page
    assert "as it was given:" in page
    result, _ = run("given", Recorder(), knowledge=version.id, seed=1)  # again, as a stored version
    assert result.knowledge.id == version.id


def test_a_round_of_a_given_text_goes_on_with_it_though_the_file_is_gone(run, tmp_path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(render_knowledge([ITEM]))
    with pytest.raises(Killed):
        run("cut", Recorder(kill=("step", 1)), knowledge=str(prompt))
    with Store.open(str(tmp_path / "cut.db")) as store:
        progress = Progress.of(store)
        assert [(name, state) for name, _, state in progress.stages] == [
            ("select", "done"), ("consolidate", "now"), ("judge", "next"),
        ]  # fmt: skip
    prompt.unlink()
    result, _ = run("cut", Recorder(), knowledge=str(prompt))
    assert result.status == "finished"


def test_a_gate_of_ones_own_has_the_last_word(run, tmp_path) -> None:
    def never(judged: Judged) -> Verdict:
        assert [len(judged.test[student]) for student in Student] == [16] * 3
        assert set(judged.ood) == {"mimic/ood"}
        return judged.verdict.model_copy(update={"promoted": False, "reason": "not today"})

    result, _ = run("gated", Recorder(), {"gate": never})
    assert result.reason == "not today"
    assert result.verdict.gain.n == 16  # the evidence stays
    assert result.checkpoint.status is CheckpointStatus.REJECTED
    with Store.open(str(tmp_path / "gated.db")) as store:
        assert store.current_checkpoint("tiny") is None


def test_a_gate_that_has_answered_is_not_asked_again(run, tmp_path, monkeypatch) -> None:
    asked = []

    def once(judged: Judged) -> Verdict:
        asked.append(len(asked))
        return judged.verdict.model_copy(update={"promoted": not asked[-1], "reason": f"answer {asked[-1]}"})

    with monkeypatch.context() as patched:
        patched.setattr(Round, "_absorb", lambda *given: (_ for _ in ()).throw(Killed("absorb")))
        with pytest.raises(Killed):
            run("asked", Recorder(), {"gate": once})
    result, _ = run("asked", Recorder(), {"gate": once})
    assert (asked, result.reason) == ([0], "answer 0")
    assert result.verdict.promoted
    assert result.checkpoint.status is CheckpointStatus.PROMOTED


def test_a_second_round_starts_from_the_promoted_checkpoint(run, tmp_path) -> None:
    first, _ = run("two", Recorder())
    listener = Recorder()
    second, _ = run("two", listener, seed=1)
    assert second.round.number == 2
    if first.verdict.promoted:
        with Store.open(str(tmp_path / "two.db")) as store:
            assert {row.checkpoint for row in store.episode_rows(round_id=second.round.id, stage="play")} == {
                first.checkpoint.id
            }


def test_a_promoted_rounds_items_are_absorbed_where_the_gap_has_closed(run, tmp_path) -> None:
    result, _ = run("absorbed", Recorder())
    with Store.open(str(tmp_path / "absorbed.db")) as store:
        (item,) = store.items()
        (effect,) = store.effects()
        assert (effect.item_id, effect.method, effect.effect, effect.n) == (item.id, "leave-one-out", 1.0, 6)
        names = {evaluation.name for evaluation in store.evaluations()}
        if not result.verdict.promoted:
            assert item.status is ItemStatus.ACTIVE
            assert "validation/distilled" not in names
            return
        rates = {e.name: e.accuracy for e in store.evaluations()}
        left = rates["validation/distilled_in_context"] - rates["validation/distilled"]
        assert (item.status is ItemStatus.ABSORBED) == (left <= 0.25)
        if item.status is ItemStatus.ABSORBED:
            assert result.checkpoint.id in store.events(subject=item.id)[-1].why


def test_a_coach_reads_and_effects_are_measured_by_randomised_inclusion(
    run, config, tmp_path, tiny_folder, monkeypatch
) -> None:
    def wrote(self: Extractor, episodes: Any, seed: int) -> Any:
        texts = (ITEM, "Drink water.", "Wear a hat.")
        lines = "\n".join(f"- EXPERIENCE ITEM: {text}" for text in texts)
        return [self._extraction([e], seed, lines, _Parsed(texts, ())) for e in episodes]

    monkeypatch.setattr(Extractor, "extract", wrote)
    extract = config.extract.model_copy(update={"coach": str(tiny_folder), "effects": "randomised"})
    result, _ = run("coached", Recorder(), extract=extract)
    assert result.knowledge is not None
    with Store.open(str(tmp_path / "coached.db")) as store:
        assert {e.model for e in store.extractions()} == {str(tiny_folder)}
        assert {(e.method, e.n) for e in store.effects()} == {("randomised", 6)}
        assert len(store.effects()) == len(store.items()) == 3
        assert store.episode_rows(stage="validation/randomised")


def test_of_two_items_that_contradict_each_other_validation_retires_one(run, tmp_path, monkeypatch) -> None:
    other = "Never answer in the way of the old masters."

    def wrote(self: Extractor, episodes: Any, seed: int) -> Any:
        lines = f"- EXPERIENCE ITEM: {other}\n- EXPERIENCE ITEM: {ITEM}"
        return [self._extraction([e], seed, lines, _Parsed((other, ITEM), ())) for e in episodes]

    monkeypatch.setattr(Extractor, "extract", wrote)
    run("torn", Recorder())
    with Store.open(str(tmp_path / "torn.db")) as store:
        items = {item.text: item for item in store.items()}
        marks = {item.text: [(f.flag, f.other) for f in item.flags] for item in items.values()}
        assert marks == {ITEM: [("contradicts", items[other].id)], other: [("contradicts", items[ITEM].id)]}
        assert all(len(text.items) == 1 for text in store.knowledge_versions())  # never in one text
        assert items[other].status is ItemStatus.RETIRED
        assert items[ITEM].status is not ItemStatus.RETIRED
        last = store.events(subject=items[other].id)[-1]
        assert (last.who, last.action) == ("engrain", "retired")
        assert f"contradicts item {items[ITEM].id}, which does more on validation tasks: +1.00" in last.why


def test_an_unfinished_round_of_other_settings_is_not_mixed_up(run, config, tmp_path) -> None:
    with pytest.raises(Killed):
        run("mixed", Recorder(("stage", 3)))
    with Store.open(str(tmp_path / "mixed.db")) as store:
        other = config.model_copy(update={"seed": 5})
        with pytest.raises(RoundConflictError, match="round 1 of tiny is unfinished"):
            open_round(store, other)
        fresh = open_round(store, other, fresh=True)
        assert fresh.number == 2
        assert [r.status for r in store.rounds()] == ["stopped", "running"]
