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
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agent.episode import Episode, FinishReason, Message, SamplingParams, StopReason, Turn
from engrain.cli import app as shell
from engrain.lease import lease_name
from envs.base import Split, Task
from memory.normalise import item_id
from memory.records import (
    CheckpointRecord,
    CheckpointStatus,
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

pytest.importorskip("fastapi", reason="needs the extra ui")

from fastapi.testclient import TestClient

from engrain.ui.access import Access
from engrain.ui.app import make_app
from engrain.ui.progress import STAGES

ROOT = Path(__file__).resolve().parents[2]
BAD = "<script>alert(1)</script><img src=x onerror=alert(1)>\" onclick='x' {{ 7*7 }} \x1b[31m\x07\u202e\u2028 & Ä"
LESSONS = [
    "Read the whole recipe before you take anything.",
    "A closed door is opened before you walk through it.",
    "Count the carrying digit when two digits add up to ten or more.",
    "Boxes in a corner never come out again: push none there.",
]


def episode(number: int, *, turns: int = 2, text: str = "", **overrides: Any) -> Episode:
    played, ids, mask = [], [1, 2, 3], [False] * 3
    for n in range(turns):
        start = len(ids) + 1
        ids, mask = [*ids, 9, 10, 11], [*mask, False, True, True]
        played.append(
            Turn(observation=f"Observation {n}. {text}", action=f"go north {text}", start=start, end=len(ids),
                 finish_reason=FinishReason.STOP, feedback=text, reward=0.5)
        )  # fmt: skip
    fields: dict[str, Any] = {
        "id": digest("ui", number), "task": Task.create("doors", Split.TRAIN, number, {}),
        "messages": (Message(role="system", content=f"You play. {text}"),), "turns": tuple(played),
        "token_ids": tuple(ids), "prompt_length": 3, "loss_mask": tuple(mask), "logprobs": (0.0,) * len(ids),
        "reward": 0.0, "score": 0.5, "success": bool(number % 2), "feedback": text, "stop_reason": StopReason.DONE,
        "model": "tiny", "sampling": SamplingParams(), "seconds": 1.0,
        "started_at": datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=number),
    }  # fmt: skip
    return Episode(**{**fields, **overrides})


def furnish(store: Store) -> None:
    """Three finished rounds that get better, a fourth that runs elsewhere, and foreign texts wherever one fits."""
    lessons = [*LESSONS, f"Nothing is what it seems: {BAD}"]
    parent: CheckpointRecord | None = None
    for number, (bare, context, after) in enumerate(((0.1, 0.6, 0.5), (0.5, 0.7, 0.68), (0.5, 0.72, 0.52)), 1):
        round_ = store.create_round({"model": "tiny", "note": BAD}, number, "tiny")
        played = [episode(100 * number + n, text=BAD if n == 0 else "") for n in range(3)]
        store.add_episodes(played, round_id=round_.id, stage="play")
        for place, lesson in enumerate(lessons[: number + 2]):
            found = Extraction(
                id=digest(number, place), episode_id=played[place % 3].id, model="tiny", checkpoint=None, mode="paper",
                prompt_version="1", seed=0, output=f"- EXPERIENCE ITEM: {lesson}", items=(lesson,), malformed=(),
            )  # fmt: skip
            store.add_extraction(found, round_.id)
            store.add_item(lesson, extraction=found, round_id=round_.id)
            low = 0.03 * place - 0.05
            store.record_effect(
                ItemEffect(item_id=item_id(lesson), round_id=round_.id, method="leave-one-out", env="doors",
                           split="validation", effect=low + 0.1, low=low, high=low + 0.2, n=32)
            )  # fmt: skip
        places = tuple(KnowledgeItem(id=item_id(lesson), text=lesson) for lesson in lessons[number - 1 : number + 2])
        body = "\n".join(f"- {place.text}" for place in places)
        text = Knowledge(id=digest(body), items=places, text=body, tokens=20 * number)
        text = store.add_knowledge(text, round_.id, parent.knowledge if parent else None)
        run = RunRecord(
            id=digest("run", number), round_id=round_.id, method="opcd", model="tiny", knowledge=text.id, folder="/f",
            parent=parent.id if parent else None, seed=0, config={}, reason=BAD,
            metrics=tuple({"step": s, "divergence": 0.5 / s} for s in range(1, 30)),
        )  # fmt: skip
        store.add_run(run)
        store.add_episodes([episode(500 + number, text="")], round_id=round_.id, stage="train", run_id=run.id)
        record = CheckpointRecord(
            id=digest("checkpoint", number), model="tiny", path=f"/f/{BAD}", parent=run.parent, knowledge=text.id,
            round_id=round_.id, run_id=run.id,
        )  # fmt: skip
        store.add_checkpoint(record)
        for name, rate in (("bare", bare), ("in_context", context), ("distilled", after)):
            store.add_evaluation(
                EvaluationRecord(
                    name=f"test/{name}", round_id=round_.id, checkpoint=record.id if name == "distilled" else None,
                    knowledge=text.id if name == "in_context" else None, env="doors", split="test", n=100,
                    successes=round(100 * rate), accuracy=rate, low=rate - 0.09, high=rate + 0.1, mean_score=rate,
                )
            )  # fmt: skip
        better = after > bare + 0.05
        store.set_checkpoint_status(
            record.id, CheckpointStatus.PROMOTED if better else CheckpointStatus.REJECTED, "engrain", "judged"
        )
        verdict = "better on test tasks" if better else f"no better {BAD}"
        state = {"consolidate": {"validation": {"10": 0.3, "20": rate}}}
        store.update_round(round_.id, stage="judge", status=RoundStatus.FINISHED, verdict=verdict, state=state)
        parent = record if better else parent
    store.flag_item(item_id(LESSONS[3]), "instance-bound", note=BAD)
    store.add_episodes([episode(900, turns=120, text=BAD, error=BAD, human=True)])
    store.add_episodes([episode(2000 + n) for n in range(60)])
    settings = {"play": {"episodes": 16}, "evaluation": {"test_tasks": 64}, "distill": {"steps": "many"}}
    running = store.create_round(settings, 4, "tiny")
    store.update_round(running.id, stage="play")
    store.add_episodes([episode(950)], round_id=running.id, stage="play")
    store.take_lease(lease_name("tiny"), "t", host="elsewhere", machine="elsewhere/1", pid=77, seconds=600)


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ui") / "store.db"
    with Store.open(str(path)) as store:
        furnish(store)
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
    item, checkpoint = item_id(LESSONS[0]), digest("checkpoint", 2)
    return [
        "/", "/live", "/rounds", "/rounds/1", "/rounds/3", "/rounds/4", f"/rounds/{store.rounds()[0].id}",
        "/items", "/items?search=door&status=active&by=effect", "/items?flag=instance-bound", f"/items/{item}",
        f"/items/{store.item_rows(search='seems')[0].id}", f"/items/{item_id(LESSONS[3])}", f"/items/{item}/retire",
        f"/items/{item}/restore", "/knowledge", "/knowledge/1", "/knowledge/3", "/knowledge/1/restore",
        "/diff?a=1&b=3", "/diff?a=2&b=2", "/episodes", "/episodes?world=doors/train&outcome=solved&round=1&stage=play",
        f"/episodes?checkpoint={checkpoint}", "/episodes?knowledge=1&world=nowhere/test",
        f"/episodes/{digest('ui', 900)}", f"/episodes/{digest('ui', 900)}?turn=101", f"/episodes/{digest('ui', 100)}",
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
    lineage = Page(client.get(f"/checkpoints/{digest('checkpoint', 2)}").text)
    assert {"the base model", "knowledge 1", "knowledge 2", "1 episodes"} <= {
        line.strip() for line in lineage.text.split("\n")
    }
    assert f"/checkpoints/{digest('checkpoint', 1)}" in [a["href"] for a in lineage.all("a")]
    assert "1 gained, 1 lost, 0 reworded" in Page(client.get("/diff?a=1&b=2").text).text
    diff = client.get("/diff?a=1&b=2").text
    assert re.search(r"<del>.*Read the whole recipe", diff)
    assert re.search(r"<ins>.*Boxes in a corner", diff)
    replay = client.get(f"/episodes/{digest('ui', 900)}?turn=101").text
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
        assert "tiny" not in answer.text
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
    store.add_episodes([episode(951)], round_id=number, stage="play")
    moved = client.get(address)
    assert "2 episodes of at most 16, 1 solved" in Page(moved.text).text
    store.update_round(number, stage="curate")
    states = [(a.get("class"), a.get("aria-current")) for a in Page(client.get("/live").text).all("li")][:6]
    assert states == [("done", None)] * 2 + [("now", "step")] + [("next", None)] * 3
    store.drop_lease(lease_name("tiny"), "t")
    assert "nobody is at work on it" in Page(client.get("/live").text).text
    store.take_lease(lease_name("tiny"), "t", host="h", machine="m", pid=1, seconds=-1)
    assert "nobody is at work on it" in Page(client.get("/live").text).text
    store.update_round(number, status=RoundStatus.STOPPED, verdict="enough")
    assert "No round is running" in client.get("/live").text
    assert client.get("/live?mark=none").status_code == 204


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


def test_the_command_serves_until_it_is_interrupted(furnished: Path) -> None:
    import httpx2

    command = [sys.executable, "-m", "engrain", "ui", "--port", "0", "--store", str(furnished)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as served:
        assert served.stdout is not None
        assert str(furnished) in served.stdout.readline()
        address = served.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{43}", address)
        with httpx2.Client(follow_redirects=True, timeout=60) as client:
            assert client.get(address.partition("?")[0]).status_code == 403
            page = client.get(address)
            assert page.status_code == 200
            assert "token=" not in str(page.url)
            assert "server" not in page.headers
        served.send_signal(signal.SIGINT)
        out, err = served.communicate(timeout=60)
    assert (served.returncode, out, err) == (0, "", "")
