"""A round's page: what it says of promoted, rejected, stopped and unfinished rounds, and that nothing in it runs."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agent.episode import Episode, FinishReason, Message, SamplingParams, StopReason, Turn
from distill.monitor import StepMetrics
from engrain.cli import app
from engrain.evaluate import measure, outcomes
from engrain.gate import Gate, paired_gain
from engrain.page.examples import shortened
from engrain.page.facts import Outcome
from engrain.page.gather import gather
from engrain.page.html import render
from envs.base import Split, Task
from memory.records import (
    CheckpointRecord,
    CheckpointStatus,
    Extraction,
    ItemEffect,
    RoundRecord,
    RoundStatus,
    RunRecord,
)
from memory.render import compose
from memory.store import Store

HOSTILE = "<script>alert('1')</script><img src=//x.example onerror=alert(1)>{{ 7*7 }}\x1b[2J\u202e"
TASKS = 12


def episode(name: str, task: Task, success: bool, knowledge: str | None = None, reply: str = "12") -> Episode:
    question = str(task.parameters["question"])
    return Episode(
        id=f"{name}-{task.id}".replace("/", "-"),
        task=task,
        messages=(Message(role="user", content=question), Message(role="assistant", content=reply)),
        turns=(Turn(observation=question, action=reply, start=1, end=2, finish_reason=FinishReason.STOP),),
        token_ids=(1, 2),
        prompt_length=1,
        loss_mask=(False, True),
        logprobs=(0.0, -0.5),
        reward=float(success),
        score=float(success),
        success=success,
        feedback="Counted." if success else HOSTILE,
        stop_reason=StopReason.DONE,
        model="tiny",
        knowledge=knowledge,
        sampling=SamplingParams(),
        started_at=datetime.now(UTC),
        seconds=0.1,
    )


def tasks(split: Split, count: int = TASKS) -> list[Task]:
    return [Task.create("math", split, n, {"question": f"{n} + {n} {HOSTILE}"}) for n in range(count)]


def step(number: int, divergence: float) -> dict[str, Any]:
    names = {name: 0.0 for name, field in StepMetrics.model_fields.items() if field.annotation is float}
    rest = {"step": number, "sequences": 4, "dropped": 0, "peak_memory_bytes": 2**30, "seconds_student": 2.0}
    return StepMetrics.model_validate({**names, **rest, "divergence": divergence, "leak_rate": 0.25}).model_dump()


class Book:
    """Writes a round into a store as the loop does, as far as it is told to."""

    def __init__(self, store: Store) -> None:
        self.store = store
        config = {
            "model": "tiny",
            "world": {"env": "math", "options": {"convention": "json"}},
            "evaluation": {"validation_tasks": TASKS},
            "distill": {"objective": "forward_kl", "steps": 4},
        }
        self.round = store.create_round(config, 3, "tiny")
        self.state: dict[str, Any] = {"parent": None}

    def note(self, key: str, value: Any, stage: str) -> None:
        self.state |= {key: value, "seconds": 75.0}
        self.round = self.store.update_round(self.round.id, state=self.state, stage=stage)

    def keep(self, name: str, split: Split, wins: list[bool], knowledge: str | None = None) -> Any:
        played = [episode(name, task, won, knowledge) for task, won in zip(tasks(split, len(wins)), wins, strict=True)]
        self.store.add_episodes(played, round_id=self.round.id, stage=name)
        checkpoint = "c1" if "distilled" in name or "after" in name else None
        return self.store.add_evaluation(
            measure(name, played, checkpoint=checkpoint, knowledge=knowledge, round_id=self.round.id)
        )

    def select(self, gap: list[bool]) -> Book:
        taught = episode("play", tasks(Split.TRAIN)[0], False)
        self.store.add_episodes([taught], round_id=self.round.id, stage="play")
        fields = {"mode": "examples", "prompt_version": "1", "seed": 0, "output": "…", "malformed": ("- EXP",)}
        line = f"Knock first {HOSTILE}"
        said = Extraction(id="x1", episode_id=taught.id, model="tiny", checkpoint=None, items=(line,), **fields)
        self.store.add_extraction(said, self.round.id)
        item = self.store.add_item(line, extraction=said, round_id=self.round.id)
        self.note("extract", {"items": 1, "malformed": 1}, "extract")
        text = self.store.add_knowledge(
            compose([item], 10_000, lambda text, **_: {"input_ids": text.split()}), self.round.id
        )
        bare = self.keep("validation/bare", Split.VALIDATION, [False] * TASKS)
        helped = self.keep("validation/in_context", Split.VALIDATION, gap, text.id)
        self.store.record_effect(
            ItemEffect(
                item_id=item.id,
                method="leave-one-out",
                env="math",
                split="validation",
                effect=0.5,
                low=0.1,
                high=0.9,
                n=TASKS,
                round_id=self.round.id,
            )
        )
        found = paired_gain(outcomes(bare), outcomes(helped))
        self.note("select", {"knowledge": text.id, "gap": found.model_dump(), "changes": []}, "select")
        self.knowledge = text.id
        return self

    def train(self, stopped: str | None = None) -> Book:
        run = RunRecord(
            id="r1",
            round_id=self.round.id,
            method="opcd",
            model="tiny",
            knowledge=self.knowledge,
            folder="f",
            seed=0,
            config={},
        )
        self.store.add_run(run)
        manifest = {"step": 2, "versions": {"torch": "9"}}
        self.store.add_checkpoint(
            CheckpointRecord(
                id="c1",
                model="tiny",
                path="f/c1",
                knowledge=self.knowledge,
                round_id=self.round.id,
                run_id="r1",
                manifest=manifest,
            )
        )
        done = {
            "checkpoint": "c1",
            "step": 2,
            "validation": {"0": 0.0, "2": 0.75},
            "history": [step(1, 0.8), step(2, 0.2)],
        }
        self.note("consolidate", {**done, "stopped": stopped}, "consolidate")
        return self

    def judge(self, after: list[bool], other: list[bool]) -> RoundRecord:
        bare = self.keep("test/bare", Split.TEST, [False] * (TASKS - 1) + [True])
        self.keep("test/in_context", Split.TEST, [True] * TASKS, self.knowledge)
        distilled = self.keep("test/distilled", Split.TEST, after)
        before = self.keep("ood/before/math/ood", Split.OOD, [True] * len(other))
        self.keep("ood/in_context/math/ood", Split.OOD, [True] * len(other), self.knowledge)
        later = self.keep("ood/after/math/ood", Split.OOD, other)
        gate = Gate(TASKS, looks=1, ood_margin=0.1)
        look = gate.look(outcomes(bare), outcomes(distilled), {"math/ood": (outcomes(before), outcomes(later))}, None)
        verdict = gate.verdict([look])
        self.note("judge", verdict.model_dump(mode="json"), "judge")
        status = CheckpointStatus.PROMOTED if verdict.promoted else CheckpointStatus.REJECTED
        self.store.set_checkpoint_status("c1", status, "engrain", "judged")
        return self.store.update_round(self.round.id, status=RoundStatus.FINISHED, verdict=verdict.reason)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
def book(path: Path):
    with Store.open(str(path)) as store:
        yield Book(store)


class Tags(HTMLParser):
    """Every element with its attributes, and the text outside of styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def test_a_promoted_round_is_told_with_its_numbers_examples_lineage_and_cost(book: Book) -> None:
    record = book.select([True] * TASKS).train().judge([True] * 11 + [False], [True] * 4)

    page = gather(book.store, record)

    assert page.outcome is Outcome.PROMOTED
    assert page.gain is not None
    assert (page.gain.gained, page.gain.lost) == (11, 1)
    assert page.examples.counts == {"gained": 11, "lost": 1, "solved before and after": 0, "solved by neither": 0}
    assert [example.kind for example in page.examples.shown] == ["gained", "gained", "lost"]
    assert [played.student for played in page.examples.shown[0].played] == ["bare", "in_context", "distilled"]
    assert [row.checkpoint for row in page.lineage] == ["c1"]
    assert page.before_lineage == "the base model tiny"
    assert page.items[0].chosen
    assert page.items[0].sources[0].solved is False
    assert page.cost.total.episodes == 1 + 2 * TASKS + 3 * TASKS + 3 * 4
    assert page.training is not None
    assert page.training.validation[2].n == TASKS
    text = Tags(render(page)).text
    for said in (
        "promoted",
        "11 tasks gained, 1 lost",
        "step 2",
        "75 s",
        "Knock first",
        "seed (3)",
        "25% of the replies",
    ):
        assert said in text


def test_a_rejected_round_says_so_first_and_shows_what_was_lost(book: Book) -> None:
    record = book.select([True] * TASKS).train("entropy fell").judge([True] * TASKS, [False] * 4)

    page = gather(book.store, record)

    assert page.outcome is Outcome.REJECTED
    assert "not promoted" in page.words.headline
    assert any("out-of-distribution accuracy fell" in sentence for sentence in page.words.story)
    assert any("ended early: entropy fell" in sentence for sentence in page.words.story)
    assert any("from 100%" in sentence and "to 0%" in sentence for sentence in page.words.story)
    assert page.others[0].change is not None
    assert page.others[0].change.lost == 4


def test_a_promotion_that_was_rolled_back_is_no_success_any_more(book: Book) -> None:
    record = book.select([True] * TASKS).train().judge([True] * TASKS, [True] * 4)
    book.store.set_checkpoint_status("c1", CheckpointStatus.ROLLED_BACK, "anna", "it swears")

    page = gather(book.store, record)

    assert page.outcome is Outcome.ROLLED_BACK
    assert "rolled back by anna: it swears" in page.reason


def test_a_round_that_stopped_shows_validation_tasks_and_claims_nothing(book: Book) -> None:
    book.select([True] + [False] * (TASKS - 1))
    record = book.store.update_round(book.round.id, status=RoundStatus.STOPPED, verdict="training cannot pay")

    page = gather(book.store, record)

    assert page.outcome is Outcome.STOPPED
    assert page.rate("bare") is None
    assert page.recovery is None
    assert page.examples.split == "validation"
    assert [played.student for played in page.examples.shown[0].played] == ["bare", "in_context"]
    assert any("does not exclude zero" in sentence for sentence in page.words.story)
    assert any("No test task was played" in sentence for sentence in page.words.cautions)
    text = Tags(render(page)).text
    assert "This round made no checkpoint; it began with the base model tiny." in text


def test_a_round_that_has_just_begun_has_a_page_that_says_so(book: Book) -> None:
    page = gather(book.store, book.round)

    assert page.outcome is Outcome.UNFINISHED
    assert "not finished" in page.words.headline
    assert "No knowledge was chosen." in Tags(render(page)).text


def test_a_round_in_training_is_unfinished_whatever_its_numbers_are(book: Book) -> None:
    page = gather(book.store, book.select([True] * TASKS).train().round)

    assert page.outcome is Outcome.UNFINISHED
    assert any("consolidate" in sentence for sentence in page.words.cautions)


def test_forgotten_episodes_leave_the_numbers_and_no_example(book: Book) -> None:
    record = book.select([True] * TASKS).train().judge([True] * TASKS, [True] * 4)
    for one in book.store.episode_rows(round_id=record.id):
        if one.split == "test":
            book.store.forget("episode", one.id, "anna", "private")

    page = gather(book.store, record)

    assert page.examples.counts["gained"] == TASKS - 1
    assert page.examples.shown == ()
    assert "not in the store any more" in Tags(render(page)).text


def test_nothing_of_a_strangers_text_is_markup_and_nothing_is_fetched(book: Book) -> None:
    html = render(gather(book.store, book.select([True] * TASKS).train().judge([True] * TASKS, [False] * 4)))

    found = Tags(html)
    assert not {tag for tag, _ in found.elements} & {"script", "img", "link", "a", "iframe", "object", "form", "base"}
    assert not {name for _, given in found.elements for name in given if name.startswith("on") or name == "style"}
    assert not {name for _, given in found.elements for name in given if name in ("src", "href", "action")}
    assert "<script>alert('1')</script>" in found.text  # as text
    assert "{{ 7*7 }}" in found.text
    assert "onerror=alert(1)&gt;49" not in html
    assert "\x1b" not in html
    assert "\u202e" not in html
    html.encode()


def test_the_policy_allows_the_files_own_styles_and_nothing_else(book: Book) -> None:
    html = render(gather(book.store, book.round))

    policy = next(given["content"] for tag, given in Tags(html).elements if given.get("http-equiv"))
    style = html.partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert "url(" not in style
    assert "@import" not in style
    assert style.count("@media screen and (prefers-color-scheme: dark)") == 2  # the page and its charts; paper is light
    assert "@media print" in style


def test_a_long_text_is_cut_and_says_so() -> None:
    assert shortened("a" * 1200) == "a" * 1200
    assert shortened("a" * 1300).endswith("… (100 more characters)")


def report(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_the_command_writes_a_file_once_and_prints_where(
    book: Book, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert report(1, "--store", path).stdout.strip() == "engrain-round-1.html"
    written = tmp_path / "engrain-round-1.html"
    assert written.read_text().startswith("<!doctype html>")
    assert written.stat().st_mode & 0o077 == 0o666 & ~_umask() & 0o077

    again = report(book.round.id[:8], "--store", path)
    assert again.exit_code == 2
    assert "--force" in again.output
    assert report(1, "--store", path, "--force").exit_code == 0
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".engrain")) == []  # no drafts


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_json_prints_what_the_page_holds_and_writes_nothing(book: Book, path: Path, tmp_path: Path) -> None:
    book.select([True] * TASKS).train().judge([True] * TASKS, [True] * 4)

    held = json.loads(report(1, "--store", path, "--json").stdout)

    assert held["outcome"] == "promoted"
    assert held["gain"]["gained"] == TASKS - 1
    assert held["words"]["story"]
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["7"], "no round"),
        (["zzz"], "no round"),
        ([""], ""),
        (["1", "--out", "."], "is a folder"),
        (["1", "--out", "x.html", "--json"], "leave out --out"),
        (["1", "--out", "store.db/x.html"], "cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    book: Book, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)

    result = report(*arguments, "--store", path)

    assert result.exit_code == 2
    assert said in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*.html"))


def test_no_store_is_one_line(tmp_path: Path) -> None:
    result = report(1, "--store", tmp_path / "none.db")

    assert result.exit_code == 2
    assert len(result.output.strip().splitlines()) == 1
