"""The dashboard in real headless Chromium: nothing is fetched from elsewhere, a keyboard is enough, light and dark.

Runs where `chromium` is on the PATH. With ENGRAIN_TEST_SCREENSHOTS=FOLDER it leaves pictures of the pages there; the
store in them is made up.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from agent.episode import Episode, FinishReason, Message, SamplingParams, StopReason, Turn
from envs.base import Split, Task
from memory.normalise import item_id
from memory.records import (
    CheckpointRecord,
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

playwright = pytest.importorskip("playwright.sync_api")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra ui")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")

LESSONS = [
    "Read the whole recipe before you take anything.",
    "Open a closed door before you walk through it.",
    "Two digits that add up to ten or more carry one: <b>count it</b>.",
    "Push no box into a corner: it never comes out again.",
    "Light the lamp before you go down.",
]


def episode(number: int) -> Episode:
    turn = Turn(observation="You are in a kitchen. The door is closed.", action="open door", start=4, end=6,
                finish_reason=FinishReason.STOP, feedback="The door is open.", reward=1.0)  # fmt: skip
    return Episode(
        id=digest("browser", number), task=Task.create("doors", Split.TRAIN, number, {}), turns=(turn, turn),
        messages=(Message(role="system", content="You play."),), token_ids=(1,) * 6, prompt_length=3,
        loss_mask=(False,) * 4 + (True,) * 2, logprobs=(0.0,) * 6, reward=1.0, score=1.0, success=bool(number % 3),
        feedback="", stop_reason=StopReason.DONE, model="made-up", sampling=SamplingParams(), seconds=1.0,
        started_at=datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=number),
    )  # fmt: skip


def furnish(store: Store) -> None:
    """Three rounds that get better, and a fourth under way."""
    parent = None
    for number, rates in enumerate(((0.12, 0.61, 0.5), (0.5, 0.74, 0.69), (0.69, 0.84, 0.83)), 1):
        round_ = store.create_round({}, number, "made-up")
        store.add_episodes([episode(100 * number + n) for n in range(16)], round_id=round_.id, stage="play")
        lessons = LESSONS[number - 1 : number + 2]
        for place, lesson in enumerate(lessons):
            found = Extraction(
                id=digest(number, place), episode_id=digest("browser", 100 * number + place), model="made-up", seed=0,
                checkpoint=None, mode="paper", prompt_version="1", output=lesson, items=(lesson,), malformed=(),
            )  # fmt: skip
            store.add_extraction(found, round_.id)
            store.add_item(lesson, extraction=found, round_id=round_.id)
            effect = ItemEffect(item_id=item_id(lesson), round_id=round_.id, method="leave-one-out", env="doors",
                                split="validation", effect=0.05 * place + 0.02, low=0.05 * place - 0.06,
                                high=0.05 * place + 0.1, n=64)  # fmt: skip
            store.record_effect(effect)
        places = tuple(KnowledgeItem(id=item_id(lesson), text=lesson) for lesson in lessons)
        body = "\n".join(f"- {lesson}" for lesson in lessons)
        text = store.add_knowledge(
            Knowledge(id=digest(body), items=places, text=body, tokens=18 * number), round_.id,
            parent.knowledge if parent else None,
        )  # fmt: skip
        run = RunRecord(id=digest("run", number), round_id=round_.id, method="opcd", model="made-up", seed=0,
                        folder="/runs", config={}, knowledge=text.id, parent=parent.id if parent else None,
                        metrics=tuple({"step": s, "divergence": 0.6 / s} for s in range(1, 41)))  # fmt: skip
        store.add_run(run)
        store.add_episodes([episode(500 + 10 * number)], round_id=round_.id, stage="train", run_id=run.id)
        record = CheckpointRecord(id=digest("c", number), model="made-up", path=f"/runs/{number}", parent=run.parent,
                                  knowledge=text.id, round_id=round_.id, run_id=run.id)  # fmt: skip
        parent = store.add_checkpoint(record)
        for name, rate in zip(("bare", "in_context", "distilled"), rates, strict=True):
            store.add_evaluation(
                EvaluationRecord(name=f"test/{name}", round_id=round_.id, env="doors", split="test", n=128,
                                 checkpoint=parent.id if name == "distilled" else None, successes=round(128 * rate),
                                 accuracy=rate, low=rate - 0.08, high=rate + 0.07, mean_score=rate)
            )  # fmt: skip
        store.promote(parent.id, why="better on test tasks")
        store.update_round(round_.id, stage="judge", status=RoundStatus.FINISHED, verdict="better on test tasks")
    running = store.create_round({"play": {"episodes": 16}}, 4, "made-up")
    store.update_round(running.id, stage="play")
    store.add_episodes([episode(900 + n) for n in range(5)], round_id=running.id, stage="play")


class Served:
    """A dashboard in a thread."""

    def __init__(self, store: Store) -> None:
        from engrain.ui.access import Access
        from engrain.ui.app import make_app

        self.access = Access()
        listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(make_app(store, self.access), log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(timeout=20)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with Store.open(str(tmp_path_factory.mktemp("browser") / "store.db")) as opened:
        furnish(opened)
        yield opened


@pytest.fixture(scope="module")
def served(store: Store) -> Iterator[Served]:
    server = Served(store)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=flags, timeout=120_000)
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, served: Served) -> Iterator[Any]:
    """A page that was let in; at the end it has asked nobody else, and nothing went wrong on it."""
    context = browser.new_context(viewport={"width": 1180, "height": 900}, color_scheme="light")
    opened = context.new_page()
    opened.set_default_timeout(30_000)
    asked: list[str] = []
    wrong: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("dialog", lambda dialog: wrong.append(dialog.message))
    opened.on(
        "console",
        lambda said: wrong.append(said.text) if said.type == "error" and "ERR_CONNECTION" not in said.text else None,
    )
    opened.goto(f"{served.url}/?token={served.access.token}")
    yield opened
    context.close()
    assert wrong == []
    assert asked
    assert all(url.startswith(served.url + "/") for url in asked)


def picture(page: Any, name: str) -> None:
    if folder := os.environ.get("ENGRAIN_TEST_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"ui-{name}.png")


def test_a_keyboard_is_enough_to_retire_and_restore_an_item(page: Any, served: Served, store: Store) -> None:
    keys = page.keyboard
    keys.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    while page.evaluate("document.activeElement.textContent") != "Items":
        keys.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    keys.press("Enter")
    page.wait_for_url("**/items")
    page.focus(f"text={LESSONS[0]}")
    keys.press("Enter")
    page.wait_for_url(f"**/items/{item_id(LESSONS[0])}")
    for label, status in (("Retire", "retired"), ("Restore", "active")):
        page.focus(f"text={label} …")
        keys.press("Enter")
        page.wait_for_url(f"**/{label.lower()}")
        page.wait_for_function("document.activeElement.name === 'why'")  # autofocus comes after the address
        keys.type(f"{label} by keyboard")
        keys.press("Enter")
        page.wait_for_url(f"**/items/{item_id(LESSONS[0])}")
        assert page.locator("main .status").first.text_content() == status
    assert [e.why for e in store.events(subject=item_id(LESSONS[0]))[-2:]] == [
        "Retire by keyboard",
        "Restore by keyboard",
    ]
    picture(page, "item")


def test_light_and_dark_and_what_a_screen_reader_is_told(page: Any, served: Served) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for name, address in {
            "overview": "/", "rounds": "/rounds", "diff": "/diff?a=1&b=3", "lineage": f"/checkpoints/{digest('c', 3)}",
            "episode": f"/episodes/{digest('browser', 100)}",
        }.items():  # fmt: skip
            page.goto(served.url + address)
            picture(page, name if scheme == "light" else f"{name}-dark")
            told = page.locator("body").aria_snapshot()
            assert 'navigation "Main"' in told
            assert "main" in told
            assert "heading" in told
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (scheme, name)
        seen[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert seen["light"] != seen["dark"]
    page.set_viewport_size({"width": 360, "height": 700})
    for address in ("/", "/rounds", "/items", "/episodes"):
        page.goto(served.url + address)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), address
    page.goto(served.url + "/rounds")
    assert page.get_by_role("table", name="Rounds, latest first").count() == 1
    assert "Accuracy of made-up on test tasks" in page.locator("main").aria_snapshot()


def test_the_running_round_moves_by_itself(page: Any, store: Store) -> None:
    page.get_by_text("5 episodes of at most 16").wait_for()
    running = store.rounds()[-1].id
    store.add_episodes([episode(920)], round_id=running, stage="play")
    page.get_by_text("6 episodes of at most 16").wait_for()
    store.update_round(running, stage="extract")
    page.locator("li[aria-current=step]", has_text="reads its episodes").wait_for()
    assert page.locator("#silence").is_hidden()


def test_a_server_that_is_gone_is_noticed(browser: Any, store: Store) -> None:
    other = Served(store)
    page = browser.new_page()
    page.goto(f"{other.url}/?token={other.access.token}")
    page.get_by_text("is not over").wait_for()
    other.stop()
    begun = time.monotonic()
    page.locator("#silence").wait_for(timeout=30_000)
    assert time.monotonic() - begun < 30
    page.close()
