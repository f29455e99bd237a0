"""Logs and metrics of a loop: what they say, and what they never say."""

from __future__ import annotations

import io
import json
import logging
import urllib.error
import urllib.request

import pytest

from agent.rollout import RolloutStats
from engrain.errors import MetricsPortError
from engrain.logs import LogListener, json_logs
from engrain.metrics import MetricsListener, serve_metrics
from engrain.redaction import redact, redacted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:p4ss@db/x failed", "postgresql://me:***@db/x failed"),
        ("qwen@http://:tok@h:80/v1", "qwen@http://:***@h:80/v1"),
        ("http://u:a:b@h and http://v:c@h", "http://u:***@h and http://v:***@h"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("got Bearer abc.def back", "got Bearer *** back"),
        ("api_key=sk-1 x", "api_key=*** x"),
        ('{"password": "p"}', '{"password": "***"}'),
        ("the key is topsecret", "the key is ***"),
        ("max_tokens=64, 3 tokens, http://h:80/a@b", "max_tokens=64, 3 tokens, http://h:80/a@b"),
    ],
)
def test_secrets_are_hidden_and_nothing_else(text: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGRAIN_API_KEY", "topsecret")
    assert redact(text) == shown


def test_secrets_in_settings_are_hidden_by_key_and_by_form() -> None:
    given = {"a": [{"api_key": "x", "max_tokens": 3}], "url": "http://a:b@c", "password": "", "n": None}
    assert redacted(given) == {
        "a": [{"api_key": "***", "max_tokens": 3}], "url": "http://a:***@c", "password": "", "n": None,
    }  # fmt: skip


def test_a_log_line_is_one_json_object_without_secrets() -> None:
    out = io.StringIO()
    with json_logs(out):
        listener = LogListener("tiny")
        listener.begin(3, 7)
        listener.stage("play", "line one\nline two at http://a:b@c")
        listener.rollout("play", RolloutStats(total=4, episodes=2))
        listener.rollout("play", RolloutStats(total=4, episodes=3))  # less than half a minute later: no line
        listener.rollout("play", RolloutStats(total=4, episodes=4, successes=1))
        try:
            raise ValueError("postgresql://me:p4ss@db/x")
        except ValueError:
            logging.getLogger("sqlalchemy").exception("broken")
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line.get("event") for line in lines] == ["round", "stage", "episodes", "episodes", None]
    assert lines[1]["message"] == "line one\nline two at http://a:***@c"
    assert (lines[3]["round"], lines[3]["successes"], lines[3]["level"]) == (3, 1, "info")
    assert "p4ss" not in out.getvalue()
    assert "ValueError" in lines[4]["error"]


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_metrics_and_health_are_served() -> None:
    listener, ill = MetricsListener("tiny"), []

    def check() -> None:
        if ill:
            raise RuntimeError("lost the lease")

    with serve_metrics(listener, "127.0.0.1", 0, check) as port:
        base = f"http://127.0.0.1:{port}"
        listener.begin(3, 0)
        listener.stage("play", "")
        for played in (1, 3, 4):
            stats = RolloutStats(total=5, episodes=played + 1, known=1, successes=2, sampled_tokens=10 * played)
            listener.rollout("play", stats)
        status, page = get(f"{base}/metrics")
        assert status == 200
        values = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
        assert values["engrain_episodes_total"] == "4.0"  # the one that was there before is not counted again
        assert values["engrain_sampled_tokens_total"] == "40.0"
        assert (values['engrain_stage{stage="play"}'], values['engrain_stage{stage="judge"}']) == ("1.0", "0.0")
        status, body = get(f"{base}/healthz")
        assert (status, json.loads(body)["status"], json.loads(body)["doing"]) == (200, "ok", "play")
        ill.append(1)
        status, body = get(f"{base}/healthz")
        assert (status, json.loads(body)["reason"]) == (503, "lost the lease")
        assert get(f"{base}/secrets")[0] == 404
        with (
            pytest.raises(MetricsPortError, match=f"127.0.0.1:{port}.*--metrics-port"),
            serve_metrics(listener, "127.0.0.1", port),
        ):
            pass
