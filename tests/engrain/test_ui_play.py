"""Games in the browser: what a person can do there, with an agent and without, and what is kept of it."""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agent.episode import StopReason
from agent.game import Plan
from agent.renderer import Renderer
from engrain.cli import app as shell
from engrain.match import AgentMatch, human_turns
from envs import registry
from envs.base import Env, Split, Task, World
from envs.errors import UsageError
from memory.errors import UnknownIdError
from memory.store import Store
from tests.engrain.test_play import SAMPLING, Echo, Parrot

pytest.importorskip("fastapi", reason="needs the extra ui")

from fastapi.testclient import TestClient

from engrain.ui import games as web_games
from engrain.ui.access import Access
from engrain.ui.app import make_app
from engrain.ui.games import LIMIT, Games, Phase, Place, Seat, WebGame, places_of
from engrain.ui.pages import play as play_page

ACTIONS = ["open door", "<b>wait</b>\u3000"]


class Doors(World):
    """Three turns of repetition."""

    name = "doors"

    @classmethod
    def configure(cls, options: Any) -> World:
        if options.keys() - {"list"}:
            raise UsageError(f"doors has no option {sorted(options.keys() - {'list'})[0]}")
        world = cls()
        world.listed = "list" in options
        return world

    def tasks(self, split: Split, count: int, seed: int = 0) -> list[Task]:
        parameters = {"actions": ACTIONS} if self.listed else {}
        return [Task.create("doors", split, seed + i, parameters) for i in range(count)]

    @classmethod
    def make(cls, task: Task) -> Env:
        return Echo(task)


@pytest.fixture(autouse=True)
def doors() -> Iterator[None]:
    registry.register_world(Doors)
    yield
    registry.WORLDS._here.pop("doors", None)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(str(tmp_path / "store.db")) as opened:
        yield opened


@pytest.fixture
def parrot(tiny_tokenizer: Any) -> Parrot:
    return Parrot(tiny_tokenizer)


@pytest.fixture
def games(store: Store, parrot: Parrot) -> Iterator[Games]:
    def agent(task: Task, seed: int) -> AgentMatch:
        return AgentMatch(task, Plan(parrot, Renderer(parrot.tokenizer), SAMPLING), "web")

    opened = Games(store, [Place("doors"), Place("doors", {"list": "yes"})], itertools.count(5), agent=agent)
    yield opened
    opened.close()


@pytest.fixture
def access() -> Access:
    return Access("the-token")


@pytest.fixture
def client(store: Store, access: Access, games: Games) -> TestClient:
    opened = TestClient(make_app(store, access, games=games), base_url="http://127.0.0.1:8766")
    opened.get("/play?token=the-token")
    return opened


def until(game: WebGame, phase: Phase) -> None:
    game.wait(20)
    assert game.phase is phase


def text_of(html: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def test_a_person_plays_a_game_to_its_end(client: TestClient, access: Access, store: Store) -> None:
    page = client.post("/play", data={"csrf": access.csrf, "place": "0", "seat": "human"})
    assert page.status_code == 200
    number = re.search(r"/play/([0-9a-f]{8})$", page.url.path)
    assert number is not None
    assert "Turn 1 of 3" in text_of(page.text)
    assert "Say something." in text_of(page.text)
    assert "agent" not in text_of(page.text)
    for turn, reply in enumerate(("hello", "<script>alert(1)</script>", "go"), 1):
        page = client.post(page.url.path, data={"csrf": access.csrf, "turn": str(turn), "text": reply})
        assert "<script>" not in page.text
    assert "Over" in text_of(page.text)
    assert "solved , score 1.00" in text_of(page.text)
    (row,) = store.episode_rows(stage="play")
    episode = store.episode(row.id)
    assert [turn.action for turn in episode.turns] == ["hello", "<script>alert(1)</script>", "go"]
    assert (episode.human, episode.model, episode.task.split) == (True, "human", Split.TRAIN)
    assert client.get(f"/episodes/{row.id}").status_code == 200
    assert "over" in text_of(client.get("/play").text)


def test_listed_actions_are_buttons_and_what_they_say_is_said(client: TestClient, access: Access, games: Games) -> None:
    page = client.post("/play", data={"csrf": access.csrf, "place": "1"})
    assert '<button name="pick" value="1">&lt;b&gt;wait&lt;/b&gt;\ufffd</button>' in page.text
    assert client.post(page.url.path, data={"csrf": access.csrf, "turn": "1", "pick": "7"}).status_code == 400
    client.post(page.url.path, data={"csrf": access.csrf, "turn": "1", "pick": "1", "text": ""})
    assert games.all()[0].match.turns[0].action == ACTIONS[1]  # what cannot be shown is said all the same


def test_the_agent_suggests_and_a_person_decides(client: TestClient, access: Access, store: Store) -> None:
    page = client.post("/play", data={"csrf": access.csrf, "place": "0", "seat": "co"})
    assert "The agent suggests" in page.text
    suggested = re.search(r'<pre class="reply">(go \d+)</pre>', page.text)
    assert suggested is not None
    for turn, form in enumerate(({"do": "take"}, {"text": "mine"}, {"text": "  "}), 1):
        page = client.post(page.url.path, data={"csrf": access.csrf, "turn": str(turn), **form})
    episode = store.episode(store.episode_rows(stage="play")[0].id)
    assert episode.turns[0].action == suggested[1]
    assert human_turns(episode) == (False, True, False)
    heads = re.findall(r"<h3>(You|The agent)</h3>", page.text)
    assert heads == ["The agent", "You", "The agent"]


def test_the_agent_plays_on_alone_and_its_episode_is_no_persons(
    client: TestClient, access: Access, games: Games, store: Store
) -> None:
    page = client.post("/play", data={"csrf": access.csrf, "place": "0", "seat": "co"})
    page = client.post(page.url.path, data={"csrf": access.csrf, "turn": "1", "do": "on"})
    until(games.all()[0], Phase.OVER)
    episode = store.episode(store.episode_rows(stage="play")[0].id)
    assert (len(episode.turns), episode.human) == (3, False)


def test_a_form_that_is_sent_twice_says_it_once(client: TestClient, access: Access, games: Games) -> None:
    page = client.post("/play", data={"csrf": access.csrf, "place": "0"})
    for _ in range(2):
        page = client.post(page.url.path, data={"csrf": access.csrf, "turn": "1", "text": "hello"})
    assert client.post(page.url.path, data={"csrf": access.csrf, "turn": "1", "text": ""}).status_code == 200
    assert "Turn 2 of 3" in text_of(page.text)
    assert len(games.all()[0].match.turns) == 1
    form = re.search(r'name="form" value="(\w+)"', client.get("/play").text)
    assert form is not None
    begun = [client.post("/play", data={"csrf": access.csrf, "place": "0", "form": form[1]}).url for _ in range(2)]
    assert begun[0] == begun[1]
    assert len(games.all()) == 2


def test_the_page_follows_a_game_that_is_busy(
    client: TestClient, access: Access, parrot: Parrot, games: Games, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(play_page, "SOON", 0.1)
    parrot.slow = threading.Event()
    page = client.post("/play", data={"csrf": access.csrf, "place": "0", "seat": "co"})
    follow = re.search(r'hx-get="(/play/\w+/now\?seen=0)"', page.text)
    assert follow is not None
    assert "The agent thinks" in text_of(page.text)
    parrot.slow.set()
    part = client.get(follow[1])
    assert part.text.strip().startswith('<div id="game">')  # it asks no more: the person has the word
    assert "The agent suggests" in part.text


def test_games_are_kept_though_the_agent_still_thinks_when_the_server_ends(
    parrot: Parrot, games: Games, store: Store
) -> None:
    played = [games.start(0, Seat.CO) for _ in range(3)]
    for game in played:
        until(game, Phase.TURN)
    parrot.slow = threading.Event()
    for game in played:
        game.take(1)
    while any(len(game.view().turns) < 1 for game in played):
        time.sleep(0.01)
    games.close(0.5)
    assert len(store.episode_rows(stage="play")) == 3
    parrot.slow.set()
    until_over = time.monotonic() + 20
    while any(game.phase is not Phase.OVER for game in played) and time.monotonic() < until_over:
        time.sleep(0.01)
    rows = store.episode_rows(stage="play")  # their threads found them kept
    assert [store.episode(row.id).stop_reason for row in rows] == [StopReason.INTERRUPTED] * 3


def test_who_leaves_keeps_what_was_played(client: TestClient, access: Access, games: Games, store: Store) -> None:
    page = client.post("/play", data={"csrf": access.csrf, "place": "0"})
    page = client.post(page.url.path, data={"csrf": access.csrf, "turn": "1", "do": "leave"})  # and waits for the end
    assert "nothing to keep" in text_of(page.text)
    page = client.post("/play", data={"csrf": access.csrf, "place": "0"})
    client.post(page.url.path, data={"csrf": access.csrf, "turn": "1", "text": "hello"})
    games.close()  # the server ends
    (row,) = store.episode_rows(stage="play")
    assert store.episode(row.id).stop_reason is StopReason.INTERRUPTED
    assert "left in the middle" in text_of(client.get(page.url.path).text)


def test_a_world_or_an_engine_that_breaks_is_said_on_the_page(
    client: TestClient, access: Access, games: Games, parrot: Parrot, store: Store
) -> None:
    page = client.post("/play", data={"csrf": access.csrf, "place": "0"})
    page = client.post(page.url.path, data={"csrf": access.csrf, "turn": "1", "text": "break"})
    assert "error , score 0.00: " in text_of(page.text)
    assert "is gone" in text_of(page.text)
    parrot.broken = True
    page = client.post("/play", data={"csrf": access.csrf, "place": "0", "seat": "co"})
    assert "It broke off: out of numbers" in text_of(page.text)
    assert {store.episode(row.id).stop_reason for row in store.episode_rows(stage="play")} == {StopReason.ERROR}


@pytest.mark.parametrize(
    ("form", "status", "reason"),
    [
        ({"place": "7"}, 400, "there is no world number 7"),
        ({"place": "0", "seat": "god"}, 400, "seat"),
        ({}, 400, "place"),
        ({"place": "0", "csrf": "other"}, 403, "not from this server"),
    ],
)
def test_what_cannot_be_begun_is_one_line(
    client: TestClient, access: Access, games: Games, form: dict[str, str], status: int, reason: str
) -> None:
    page = client.post("/play", data={"csrf": access.csrf, **form})
    assert page.status_code == status
    assert reason in text_of(page.text)
    assert games.all() == []


def test_forms_of_others_and_empty_replies_say_nothing(client: TestClient, access: Access, games: Games) -> None:
    page = client.post("/play", data={"csrf": access.csrf, "place": "0"})
    for form, status in (({"csrf": "other", "text": "hello"}, 403), ({"text": " "}, 400), ({"text": "x" * 4001}, 400)):
        answer = client.post(page.url.path, data={"csrf": access.csrf, "turn": "1", **form})
        assert answer.status_code == status
    assert client.post(page.url.path, data={"csrf": access.csrf, "turn": "1", "text": "a"},
                       headers={"origin": "http://evil.example"}).status_code == 403  # fmt: skip
    assert games.all()[0].match.turns == []
    assert client.get("/play/00000000").status_code == 404


def test_nothing_is_played_where_only_a_dashboard_was_started(store: Store, access: Access) -> None:
    client = TestClient(make_app(store, access), base_url="http://127.0.0.1:8765")
    page = client.get("/?token=the-token")
    assert "/play" not in page.text
    assert client.get("/play").status_code == 404
    assert client.post("/play", data={"csrf": access.csrf, "place": "0"}).status_code == 404


def test_the_game_that_nobody_looks_at_makes_room(games: Games, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = [games.start(0, Seat.HUMAN) for _ in range(LIMIT)]
    for game in (*others, first):
        until(game, Phase.TURN)  # looking at a game
    with pytest.raises(UsageError, match=f"{LIMIT} games are under way"):
        games.start(0, Seat.HUMAN)
    monkeypatch.setattr(web_games, "IDLE", 0.0)
    games.start(0, Seat.HUMAN)
    assert [game.phase for game in (others[0], first)] == [Phase.OVER, Phase.TURN]
    games.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("game-")]
    with pytest.raises(UnknownIdError):
        games.find("nonesuch")


def test_several_people_play_at_once(games: Games, store: Store) -> None:
    played = [games.start(0, seat) for seat in (Seat.HUMAN, Seat.CO) * 3]

    def finish(game: WebGame) -> None:
        for turn in (1, 2, 3):
            game.wait(20)
            game.say(turn, f"game {game.number}")

    hands = [threading.Thread(target=finish, args=(game,)) for game in played]
    for hand in hands:
        hand.start()
    for hand in hands:
        hand.join(60)
    for game in played:
        until(game, Phase.OVER)
        episode = game.view().episode
        assert episode is not None
        assert {turn.action for turn in episode.turns} == {f"game {game.number}"}
    assert len(store.episode_rows(stage="play")) == len(played)


def test_worlds_of_the_stores_rounds_come_first(store: Store) -> None:
    options = {"convention": "json", "generators": ["sums", "chains"]}
    config = {"world": {"env": "math", "options": options}}
    for settings in (config, config, {"world": {"env": "of another place"}}, {"world": "?"}):
        store.create_round(settings, 0, "model")
    found = places_of(store, ["doors", "math"])
    assert [place.env for place in found] == ["math", "doors", "math"]
    games = Games(store, found, itertools.count(5))
    until(games.start(0, Seat.HUMAN), Phase.TURN)  # with its options as they were
    games.close()


def test_what_does_not_go_with_the_browser_is_refused(tmp_path: Path) -> None:
    said: Callable[..., Any] = lambda *words: CliRunner().invoke(  # noqa: E731
        shell, ["play", *words, "--web", "--store", str(tmp_path / "s.db")]
    )
    for words, reason in (
        (("math", "--compare"), "--compare"),
        (("math", "--json"), "--json"),
        (("math", "-n", "2"), "--episodes"),
        (("-o", "convention=json"), "engrain play math -o convention=json"),
        (("math", "--human", "--port", "70000"), "65535"),
        (("nonesuch", "--human"), "nonesuch"),
        (("math", "-o", "convention=x"), "convention"),
        (("math", "--host", "0.0.0.0"), "0.0.0.0"),
        (("math", "-k", "3"), "--co"),
    ):
        found = said(*words)
        assert found.exit_code == 2, (words, found.output)
        assert reason in found.output
    found = CliRunner().invoke(shell, ["play", "math", "--human", "--port", "9000"])
    assert found.exit_code == 2
    assert "--web" in found.output
