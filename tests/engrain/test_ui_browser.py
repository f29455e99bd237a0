"""The dashboard in real headless Chromium: nothing is fetched from elsewhere, a keyboard is enough, light and dark.

Runs where `chromium` is on the PATH. With ENGRAIN_TEST_SCREENSHOTS=FOLDER it leaves pictures of the pages there; the
store in them is made up.
"""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memory.normalise import item_id
from memory.store import Store
from tests.engrain.furnished import LESSONS, MODEL, begin_training, checkpoint_id, episode, episode_id, furnish

playwright = pytest.importorskip("playwright.sync_api")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra ui")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")


class Served:
    """A dashboard in a thread."""

    def __init__(self, store: Store) -> None:
        from engrain.ui.access import Access
        from engrain.ui.app import make_app
        from engrain.ui.games import Games, Place

        self.access = Access()
        listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        coins = Place("textworld", {"game": "coin_collector"})
        self.games = Games(store, [Place("math"), coins], itertools.count(3))
        app = make_app(store, self.access, games=self.games)
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(timeout=20)
        self.games.close()


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
        page.wait_for_selector("input[name=why]:focus")  # autofocus comes after the address
        keys.type(f"{label} by keyboard")
        keys.press("Enter")
        page.wait_for_url(f"**/items/{item_id(LESSONS[0])}")
        assert page.locator("main .status").first.text_content() == status
    assert [e.why for e in store.events(subject=item_id(LESSONS[0]))[-2:]] == [
        "Retire by keyboard",
        "Restore by keyboard",
    ]
    picture(page, "item")


def test_a_game_is_played_with_the_keyboard_alone(page: Any, served: Served, store: Store) -> None:
    keys = page.keyboard
    page.goto(f"{served.url}/play")
    page.get_by_label("World").select_option(index=1)
    page.focus("text=Begin")
    keys.press("Enter")
    page.wait_for_url("**/play/*")
    page.wait_for_selector("input[name=text]:focus")  # the world may take a second to start
    picture(page, "play")
    keys.type("look around")
    keys.press("Enter")
    page.wait_for_selector("#turn-1")
    page.wait_for_selector("input[name=text]:focus")
    told = page.locator("body").aria_snapshot()
    assert 'heading "Turn 1"' in told
    assert 'textbox "Your reply"' in told
    page.focus("text=Leave")
    keys.press("Enter")
    page.wait_for_selector("text=left in the middle")
    page.click("#now a >> nth=0")
    page.wait_for_url("**/episodes/*")
    (row,) = [row for row in store.episode_rows(stage="play") if row.model == "human"]
    assert store.episode(row.id).turns[0].action == "look around"


def test_light_and_dark_and_what_a_screen_reader_is_told(page: Any, served: Served) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for name, address in {
            "overview": "/", "rounds": "/rounds", "diff": "/diff?a=1&b=3", "episode": f"/episodes/{episode_id(100)}",
            "lineage": f"/checkpoints/{checkpoint_id(2)}",
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
    assert f"Accuracy of {MODEL} on test tasks" in page.locator("main").aria_snapshot()


def test_the_running_round_moves_by_itself(page: Any, served: Served, store: Store, tmp_path: Path) -> None:
    page.get_by_text("5 episodes of at most 16").wait_for()
    running = store.rounds()[-1].id
    store.add_episodes([episode(955)], round_id=running, stage="play")
    page.get_by_text("6 episodes of at most 16").wait_for()
    page.focus("#live a")
    assert page.locator("#said").text_content() == ""
    store.update_round(running, stage="extract")
    page.locator("li[aria-current=step]", has_text="reads its episodes").wait_for()
    page.locator("#said", has_text="Round 4: extract").wait_for(state="attached")
    assert page.evaluate("document.activeElement.id") == "live-round"  # what had the focus keeps it
    begin_training(store, tmp_path, 3)
    store.add_episodes([episode(960 + n) for n in range(8)], round_id=running, stage="validation/step-000000")
    page.get_by_text("step 3 of 12").wait_for()
    page.get_by_role("progressbar", name="training steps").wait_for()
    page.get_by_text("0.50, 4 of 8 solved").wait_for()
    assert page.locator("#silence").is_hidden()
    page.evaluate("document.activeElement.blur()")
    picture(page, "training")


def test_a_server_that_is_gone_is_noticed(browser: Any, store: Store) -> None:
    other = Served(store)
    page = browser.new_page()
    page.goto(f"{other.url}/?token={other.access.token}")
    page.get_by_text("is running").wait_for()
    other.stop()
    begun = time.monotonic()
    page.locator("#silence").wait_for(timeout=30_000)
    assert time.monotonic() - begun < 30
    page.close()
