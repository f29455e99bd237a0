import subprocess
import sys
from pathlib import Path

from memory.store import Store

WRITER = """
import sys
sys.path[:0] = [sys.argv[3], sys.argv[4]]
from conftest import build_episode
from memory.records import Extraction, Knowledge, KnowledgeItem
from memory.store import Store
url, me = sys.argv[1], int(sys.argv[2])
with Store.open(url) as store:
    for batch in range(5):
        turns = [("o", f"a{j}") for j in range(3)]
        own = [build_episode(f"w{me}-{batch}-{i}", seed=i, turns=turns) for i in range(10)]
        shared = [build_episode(f"shared-{batch}-{i}", seed=i) for i in range(10)]
        assert store.add_episodes(own) == 10
        print("shared", store.add_episodes(shared if me % 2 else shared[::-1]))
        store.create_round({}, me, "tiny")
        text = f"- {me} {batch}"
        store.add_knowledge(Knowledge(id=text, items=(KnowledgeItem(id="i", text="t"),), text=text, tokens=1))
"""


def test_four_processes_at_once_lose_and_double_nothing(store_url):
    root, here = Path(__file__).parents[2], Path(__file__).parent
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, store_url, str(me), str(root), str(here)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for me in range(4)
    ]  # fmt: skip
    outputs = [writer.communicate(timeout=120) for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 4, outputs
    new = sum(int(line.split()[1]) for out, _ in outputs for line in out.splitlines())
    with Store.open(store_url) as store:
        assert new == 50
        assert store.counts() == {"episode": 250, "item": 1, "knowledge": 20, "checkpoint": 0, "round": 20, "run": 0}
        assert [r.number for r in store.rounds()] == list(range(1, 21))
        assert [k.version for k in store.knowledge_versions()] == list(range(1, 21))
        assert all(len(e.turns) in (1, 3) for e in store.episodes())
