"""The dashboard: every page over a store of hostile texts, who may see and change it, and a real browser."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engrain.cli import app as shell
from engrain.lease import lease_name
from memory.normalise import item_id
from memory.records import RoundStatus
from memory.store import Store
from tests.engrain.furnished import (
    LESSONS,
    MODEL,
    begin_training,
    checkpoint_id,
    episode,
    episode_id,
    furnish,
    write_history,
)
from tests.memory.conftest import postgres_server, postgres_url  # noqa: F401 - fixtures

pytest.importorskip("fastapi", reason="needs the extra ui")

from fastapi.testclient import TestClient

from engrain.ui.access import Access
from engrain.ui.app import make_app
from engrain.ui.progress import STAGES

ROOT = Path(__file__).resolve().parents[2]
BAD = "<script>alert(1)</script><img src=x onerror=alert(1)>\" onclick='x' {{ 7*7 }} \x1b[31m\x07\u202e\u2028 & Ä"


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ui") / "store.db"
    with Store.open(str(path)) as store:
        furnish(store, BAD)
        store.settle()
    return path


@pytest.fixture
def store(furnished: Path, tmp_path: Path) -> Iterator[Store]:
    copy = tmp_path / "store.db"
    shutil.copy(furnished, copy)
    with Store.open(str(copy)) as opened:
        yield opened


@pytest.fixture
def access() -> Access:
    return Access("the-token")


@pytest.fixture
def stranger(store: Store, access: Access) -> TestClient:
    return TestClient(make_app(store, access), base_url="http://127.0.0.1:8765", follow_redirects=False)


@pytest.fixture
def client(stranger: TestClient) -> TestClient:
    assert stranger.get("/?token=the-token").status_code == 303
    return stranger


def pages(store: Store) -> list[str]:
    """The address of every kind of page."""
    item, checkpoint = item_id(LESSONS[0]), checkpoint_id(2)
    return [
        "/", "/live", "/rounds", "/rounds/1", "/rounds/3", "/rounds/4", f"/rounds/{store.rounds()[0].id}",
        "/items", "/items?search=door&status=active&by=effect", "/items?flag=instance-bound", f"/items/{item}",
        f"/items/{store.item_rows(search='lamp')[0].id}", f"/items/{item_id(LESSONS[3])}", f"/items/{item}/retire",
        f"/items/{item}/restore", "/knowledge", "/knowledge/1", "/knowledge/3", "/knowledge/1/restore",
        "/diff?a=1&b=3", "/diff?a=2&b=2", "/episodes", "/episodes?world=doors/train&outcome=solved&round=1&stage=play",
        f"/episodes?checkpoint={checkpoint}", "/episodes?knowledge=1&world=nowhere/test",
        f"/episodes/{episode_id(900)}", f"/episodes/{episode_id(900)}?turn=101", f"/episodes/{episode_id(100)}",
        "/checkpoints", f"/checkpoints/{checkpoint}", "/nonesuch", "/items/zzz", "/rounds?limit=x",
    ]  # fmt: skip


class Page(HTMLParser):
    """What a page consists of."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.text += data
        assert "script" not in self.open[-1:] or not data.strip(), "an inline script"

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_every_page_is_whole_and_no_foreign_text_is_obeyed(client: TestClient, store: Store) -> None:
    hostile = 0
    for address in pages(store):
        answer = client.get(address)
        assert answer.status_code in ((404, 400) if address in pages(store)[-3:] else (200,)), (address, answer.text)
        page = Page(answer.text)
        hostile += "<script>alert(1)</script>" in page.text
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2028\ud800-\udfff]", answer.text), address
        assert "7*7" not in answer.text or "{{ 7*7 }}" in page.text
        for tag, attributes in page.tags:
            assert tag not in ("style", "iframe", "object", "base", "img"), address
            for name, value in attributes.items():
                assert not name.startswith("on"), (address, tag, attributes)
                assert name != "style", (address, tag)
                if name in ("href", "src", "action", "hx-get"):
                    assert re.match(r"(/(?!/)|\?|#)", value or "#"), (address, tag, value)
        assert {a["src"] for a in page.all("script")} <= {"/static/htmx.min.js", "/static/live.js"}, address
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "no-store"
        if address != "/live":
            assert page.all("html") == [{"lang": "en"}], address
            assert [len(page.all(tag)) for tag in ("h1", "main")] == [1, 1], address
            assert answer.text.partition("</head>")[0].count("<title>") == 1
            titles = [a["href"] for a in page.all("link")]
            assert {"/static/style.css", "/charts.css"} <= set(titles)
        ids = [a["id"] for _, a in page.tags if "id" in a]
        assert len(ids) == len(set(ids)), address
    assert hostile > 10


def test_every_link_of_the_pages_leads_to_a_page(client: TestClient, store: Store) -> None:
    seen, waiting = set(), ["/"]
    while waiting:
        address = waiting.pop()
        if address in seen or len(seen) > 150:
            continue
        seen.add(address)
        answer = client.get(address)
        assert answer.status_code == 200, address
        if answer.headers["content-type"].startswith("text/html"):
            links = [a["href"] or "" for a in Page(answer.text).all("a")]
            waiting += [
                link if link.startswith("/") else address.split("?")[0] + link for link in links if link[0] != "#"
            ]
    assert len(seen) > 60


def test_what_the_pages_say(client: TestClient, store: Store) -> None:
    overview = Page(client.get("/").text).text
    assert "Round 4" in overview
    assert "process 77 on elsewhere" in overview
    assert "of at most 16" in overview
    rounds = Page(client.get("/rounds").text)
    assert "0.68 (0.59 to 0.78)" in rounds.text
    assert rounds.all("polyline")
    item = Page(client.get(f"/items/{item_id(LESSONS[1])}").text).text
    assert "+0.08 (-0.02 to +0.18)" in item
    assert "version 1" in item
    lineage = Page(client.get(f"/checkpoints/{checkpoint_id(2)}").text)
    assert {"the base model", "knowledge 1", "knowledge 2", "2 episodes"} <= {
        line.strip() for line in lineage.text.split("\n")
    }
    assert f"/checkpoints/{checkpoint_id(1)}" in [a["href"] for a in lineage.all("a")]
    assert "1 gained, 1 lost, 0 reworded" in Page(client.get("/diff?a=1&b=2").text).text
    diff = client.get("/diff?a=1&b=2").text
    assert re.search(r"<del>.*Read the whole recipe", diff)
    assert re.search(r"<ins>.*Boxes in a corner", diff)
    replay = client.get(f"/episodes/{episode_id(900)}?turn=101").text
    assert 'id="turn-120"' in replay
    assert 'id="turn-100"' not in replay


def test_long_lists_are_read_page_by_page(client: TestClient, store: Store) -> None:
    total, address, found = store.counts()["episode"], "/episodes", []
    while address:
        page = Page(client.get(address).text)
        found += re.findall(r"/episodes/([0-9a-f]{20})", " ".join(a.get("href") or "" for a in page.all("a")))
        address = next((a["href"] for a in page.all("a") if a.get("rel") == "next"), None) or ""
    assert len(found) == len(set(found)) == total > 50


def test_nothing_is_shown_without_the_token(stranger: TestClient, store: Store) -> None:
    routes = [*pages(store), "/charts.css", "/docs", "/openapi.json", "/?token=", "/?token=the-toke", "/?token=Ä"]
    for address in routes:
        answer = stranger.get(address)
        assert answer.status_code == 403, address
        assert MODEL not in answer.text
        assert "set-cookie" not in answer.headers
    assert stranger.post(f"/items/{item_id(LESSONS[0])}/retire").status_code == 403
    assert stranger.get("/static/style.css").status_code == 200
    stranger.cookies.set(Access("the-token").cookie, "the-token")
    assert stranger.get("/").status_code == 403


def test_the_token_becomes_a_cookie_and_leaves_the_address(stranger: TestClient) -> None:
    answer = stranger.get("/items?search=door&token=the-token")
    assert (answer.status_code, answer.headers["location"]) == (303, "/items?search=door")
    assert re.search("HttpOnly.*SameSite=strict", answer.headers["set-cookie"], re.IGNORECASE)
    assert "the-token" not in answer.headers["set-cookie"]
    assert stranger.get("/items?search=door").status_code == 200
    elsewhere = stranger.get("http://127.0.0.1:8765//evil.example/?token=the-token")
    assert elsewhere.headers["location"].startswith("/evil")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "evil.example:8765", "[::2]", ""])
def test_other_names_are_refused(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"host": host}).status_code == 400
    for name in ("localhost:8765", "127.0.0.1", "[::1]:8765"):
        assert client.get("/static/icon.svg", headers={"host": name}).status_code == 200


def form(access: Access, **changed: str) -> dict[str, str]:
    return {"csrf": access.csrf, "who": "Ada", "why": "wrong <b>", **changed}


def test_an_item_is_retired_and_restored_with_an_event(client: TestClient, store: Store, access: Access) -> None:
    id_ = item_id(LESSONS[0])
    before = len(store.events(subject=id_))
    asked = Page(client.get(f"/items/{id_}/retire").text)
    assert asked.all("form")[0] == {"class": "confirm", "method": "post", "action": f"/items/{id_}/retire"}
    assert access.csrf in [a.get("value") for a in asked.all("input")]
    assert len(store.events(subject=id_)) == before
    answer = client.post(f"/items/{id_}/retire", data=form(access))
    assert (answer.status_code, answer.headers["location"]) == (303, f"/items/{id_}")
    assert store.item(id_).status == "retired"
    event = store.events(subject=id_)[-1]
    assert (event.who, event.action, event.why, event.detail) == ("Ada", "retired", "wrong <b>", {"before": "active"})
    assert "wrong <b>" in Page(client.get(f"/items/{id_}").text).text
    assert client.post(f"/items/{id_}/restore", data=form(access, why="it was right")).status_code == 303
    assert store.item(id_).status == "active"


def test_a_knowledge_version_is_restored(client: TestClient, store: Store, access: Access) -> None:
    version = store.knowledge(1)
    assert client.post(f"/knowledge/{version.id}/restore", data=form(access)).status_code == 303
    active = {row.id for row in store.item_rows(status="active")}
    assert active == {place.id for place in version.items}
    assert store.events(subject=version.id)[-1].who == "Ada"


@pytest.mark.parametrize(
    ("fields", "headers", "status"),
    [
        ({"csrf": ""}, {}, 403),
        ({"csrf": "the-token"}, {}, 403),
        ({}, {"origin": "http://evil.example"}, 403),
        ({}, {"origin": "http://127.0.0.1:9999"}, 403),
        ({}, {"origin": "null"}, 403),
        ({}, {"sec-fetch-site": "cross-site"}, 403),
        ({}, {"sec-fetch-site": "same-site"}, 403),
        ({"why": ""}, {}, 400),
        ({"who": "x" * 201}, {}, 400),
    ],
)
def test_forms_of_others_change_nothing(
    client: TestClient, store: Store, access: Access, fields: dict[str, str], headers: dict[str, str], status: int
) -> None:
    id_, before = item_id(LESSONS[0]), store.all_counts()["event"]
    for address in (f"/items/{id_}/retire", "/knowledge/1/restore"):
        assert client.post(address, data=form(access, **fields), headers=headers).status_code == status
    assert client.get(f"/items/{id_}/retire", params=form(access)).status_code == 200
    assert store.all_counts()["event"] == before


def test_what_does_not_exist_is_a_page_that_says_so(client: TestClient, access: Access) -> None:
    for noun in ("items", "rounds", "knowledge", "episodes", "checkpoints"):
        for id_ in ("zzz", "99999", "%00", "%F0%9F%98%80", "a%2Fb", "x" * 300, "%27%3B--"):
            answer = client.get(f"/{noun}/{id_}")
            assert answer.status_code == 404, (noun, id_)
            assert Page(answer.text).all("h1")
    assert client.post("/items/zzz/retire", data=form(access)).status_code == 404
    assert client.post(f"/items/{item_id(LESSONS[0])}/burn", data=form(access)).status_code == 404
    for address in (
        "/items?offset=-1", "/items?status=gone", "/items?by=<b>", "/rounds?limit=0", "/episodes?outcome=won",
        "/diff", f"/items?search={'x' * 501}", "/items?offset=99999999999999999999",
    ):  # fmt: skip
        answer = client.get(address)
        assert answer.status_code == 400, address
        assert "<b>" not in answer.text
    assert client.delete("/items").status_code == 405


def test_the_running_round_is_followed(client: TestClient, store: Store) -> None:
    page = Page(client.get("/live").text)
    address = page.all("div")[0]["hx-get"] or ""
    assert client.get(address).status_code == 204
    number = store.rounds()[-1].id
    store.add_episodes([episode(955)], round_id=number, stage="play")
    moved = client.get(address)
    assert "6 episodes of at most 16, 3 solved" in Page(moved.text).text
    store.update_round(number, stage="curate")
    states = [(a.get("class"), a.get("aria-current")) for a in Page(client.get("/live").text).all("li")][:6]
    assert states == [("done", None)] * 2 + [("now", "step")] + [("next", None)] * 3
    store.drop_lease(lease_name(MODEL), "t")
    assert "nobody is at work on it" in Page(client.get("/live").text).text
    store.take_lease(lease_name(MODEL), "t", host="h", machine="m", pid=1, seconds=-1)
    assert "nobody is at work on it" in Page(client.get("/live").text).text
    store.update_round(number, status=RoundStatus.STOPPED, verdict="enough")
    assert "No round is running" in client.get("/live").text
    assert client.get("/live?mark=none").status_code == 204


def test_the_running_training_is_followed(client: TestClient, store: Store, tmp_path: Path) -> None:
    running = begin_training(store, tmp_path, 0).round_id

    def live() -> str:
        return " ".join(Page(client.get("/live").text).text.split())

    assert "no step is noted yet" in live()
    assert "No step is noted yet." in Page(client.get("/rounds/4").text).text
    (address,) = (a["hx-get"] or "" for a in Page(client.get("/live").text).all("div") if "hx-get" in a)
    assert client.get(address).status_code == 204
    write_history(tmp_path, 2)
    write_history(tmp_path, 10)
    assert client.get(address).status_code == 200
    assert "step 10 of 12" in live()
    assert "0.080 nats a token, from 0.800 at step 1; loss 0.090" in live()
    store.add_episodes([episode(960 + n) for n in range(8)], round_id=running, stage="validation/step-000000")
    store.add_episodes([episode(970 + n) for n in range(3)], round_id=running, stage="validation/step-000010")
    assert re.search("validation, step 0 0.50, 4 of 8 solved validation, step 10 1 of 3 solved", live())
    assert "validation/step" not in live()
    page = Page(client.get("/rounds/4").text)
    assert "10 of 12" in page.text
    assert len(page.all("polyline")) == 1  # the divergence; one validation that is over is a point
    assert page.all("circle")


@pytest.mark.parametrize(
    "written",
    [
        "", "[]", "{", "\x00", '{"history": 5}', '{"history": [1, null, "x"]}', "[" * 100_000,
        '{"history": [{"step": "x", "divergence": NaN, "loss": 1e999}, {"step": 1, "divergence": [2]}]}',
        '{"history": [{"step": 1, "divergence": 1' + "0" * 400 + "}]}",
    ],
)  # fmt: skip
def test_a_history_that_makes_no_sense_harms_no_page(
    client: TestClient, store: Store, tmp_path: Path, written: str
) -> None:
    begin_training(store, tmp_path, 1)
    next(tmp_path.glob("*/*")).write_text(written)
    for address in ("/", "/live", "/rounds/4"):
        answer = client.get(address)
        assert answer.status_code == 200
        assert "nats a token," not in answer.text


def test_the_pages_stand_on_postgresql_too(request: pytest.FixtureRequest, access: Access, tmp_path: Path) -> None:
    with Store.open(request.getfixturevalue("postgres_url")) as store:
        furnish(store, BAD)
        begin_training(store, tmp_path, 3)
        client = TestClient(make_app(store, access), base_url="http://127.0.0.1:8765", follow_redirects=False)
        client.get("/?token=the-token")
        wrong = pages(store)[-3:]
        for address in pages(store):
            assert (client.get(address).status_code == 200) == (address not in wrong), address
        id_ = item_id(LESSONS[0])
        for action, status in (("retire", "retired"), ("restore", "active")):
            assert client.post(f"/items/{id_}/{action}", data=form(access)).status_code == 303
            assert store.item(id_).status == status
        assert [event.who for event in store.events(subject=id_)[-2:]] == ["Ada", "Ada"]


def test_an_empty_store_has_pages_too(tmp_path: Path, access: Access) -> None:
    with Store.open(str(tmp_path / "empty.db")) as empty:
        client = TestClient(make_app(empty, access))
        client.base_url = "http://localhost"
        client.get("/?token=the-token")
        for address in ("/", "/live", "/rounds", "/items", "/knowledge", "/episodes", "/checkpoints"):
            assert client.get(address).status_code == 200, address


def test_the_stages_are_those_of_the_loop() -> None:
    source = (ROOT / "engrain" / "loop.py").read_text()  # imported it would bring torch with it
    assert f"STAGES = {tuple(STAGES)!r}".replace("'", '"') in source


def test_without_the_extra_one_line_says_what_to_install(furnished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("engrain.ui")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    result = CliRunner().invoke(shell, ["ui", "--store", str(furnished)])
    assert result.exit_code == 2
    assert "pip install 'engrain[ui]'" in result.stderr.replace("\n", " ")


def test_addresses_that_cannot_be_served_are_one_line(furnished: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, said in {
            ("--port", port): f"127.0.0.1:{port}",
            ("--host", "0.0.0.0"): "name the one that they will use",
            ("--host", "::"): "name the one that they will use",
            ("--host", "no such host"): "no address of this machine",
            ("--host", "192.0.2.1"): "choose another --port or --host",
            ("--store", "nowhere.db"): "there is no store at nowhere.db",
        }.items():
            result = CliRunner().invoke(shell, ["ui", "--store", str(furnished), *arguments])
            assert result.exit_code == 2, result.output
            assert said in " ".join(result.stderr.split()), result.stderr


@pytest.mark.parametrize("token", ["", "a-token_that-stays"])
def test_the_command_serves_until_it_is_interrupted(furnished: Path, token: str) -> None:
    import httpx2

    command = [sys.executable, "-m", "engrain", "ui", "--port", "0", "--store", str(furnished)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "ENGRAIN_UI_TOKEN": token}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as served:
        assert served.stdout is not None
        assert str(furnished) in served.stdout.readline()
        address = served.stdout.readline().strip()
        shown = r"\$ENGRAIN_UI_TOKEN" if token else r"[\w-]{43}"
        assert re.fullmatch(rf"http://127\.0\.0\.1:\d+/\?token={shown}", address)
        address = address.replace("$ENGRAIN_UI_TOKEN", token)
        with httpx2.Client(follow_redirects=True, timeout=60) as client:
            assert client.get(address.partition("?")[0]).status_code == 403
            page = client.get(address)
            assert page.status_code == 200
            assert "token=" not in str(page.url)
            assert "server" not in page.headers
        served.send_signal(signal.SIGINT)
        out, err = served.communicate(timeout=60)
    assert (served.returncode, out, err) == (0, "", "")
