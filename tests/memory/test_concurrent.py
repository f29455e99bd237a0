"""Many processes write at once: nothing is lost, nothing is stored twice."""

import subprocess
import sys
from pathlib import Path

import sqlalchemy as sa

from memory.schema import TextRow, TurnRow
from memory.store import Store

WRITERS, EPISODES = 8, 60  # benchmarks/store.py does the same with 1,000 episodes a writer

WRITER = """
import sys
sys.path[:0] = [sys.argv[3], sys.argv[4]]
from conftest import build_episode
from memory.records import Extraction, Knowledge, KnowledgeItem
from memory.store import Store
url, me, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[5])
with Store.open(url) as store:
    for start in range(0, count, 20):
        turns = [("o", f"a{j}") for j in range(3)]
        own = [build_episode(f"w{me}-{start + i}", seed=i, turns=turns, system=f"s{start}") for i in range(20)]
        assert store.add_episodes(own[:15]) == 15
        for episode in own[15:]:  # as the loop does it: each as it ends
            assert store.add_episodes([episode]) == 1
        assert store.add_episodes(own) == 0
        shared = [build_episode(f"shared-{start}-{i}", seed=i) for i in range(10)]
        print("shared", store.add_episodes(shared if me % 2 else shared[::-1]))
        store.create_round({}, me, "tiny")
        text = f"- {me} {start}"
        store.add_knowledge(Knowledge(id=text, items=(KnowledgeItem(id="i", text="t"),), text=text, tokens=1))
        store.add_item(f"Lesson {start}.")
"""


def test_eight_processes_at_once_lose_and_double_nothing(store_url):
    root, here = Path(__file__).parents[2], Path(__file__).parent
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, store_url, str(me), str(root), str(here), str(EPISODES)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for me in range(WRITERS)
    ]  # fmt: skip
    outputs = [writer.communicate(timeout=300) for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * WRITERS, outputs
    batches, shared = EPISODES // 20, EPISODES // 20 * 10
    new = sum(int(line.split()[1]) for out, _ in outputs for line in out.splitlines())
    with Store.open(store_url) as store:
        assert new == shared
        written = WRITERS * batches
        assert [(tally.episodes, tally.turns) for tally in store.tallies()] == [
            (WRITERS * EPISODES + shared, WRITERS * EPISODES * 3 + shared)
        ]
        assert store.counts() == {
            "episode": WRITERS * EPISODES + shared, "item": 1 + batches, "knowledge": written, "checkpoint": 0,
            "round": written, "run": 0,
        }  # fmt: skip
        assert [r.number for r in store.rounds()] == list(range(1, written + 1))
        assert [k.version for k in store.knowledge_versions()] == list(range(1, written + 1))
        assert sum(event.subject == store.item_rows()[0].id for event in store.events()) == 1
        expected = {f"w{me}-{i}" for me in range(WRITERS) for i in range(EPISODES)}
        rows = {row.id: row.turns for row in store.episode_rows()}
        assert {id for id in rows if id.startswith("w")} == expected
        with store._read() as connection:
            count = sa.select(TurnRow.episode_id, sa.func.count()).group_by(TurnRow.episode_id)
            assert dict(connection.execute(count).tuples().all()) == rows
            bodies = connection.execute(sa.select(TextRow.body)).scalars().all()
        assert len(bodies) == len(set(bodies))
