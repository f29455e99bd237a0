"""How long the pages of `engrain ui` take over a store of a million turns.

    python benchmarks/ui.py                        # 1,000,000 turns on SQLite
    python benchmarks/ui.py --turns 100000         # in small
    python benchmarks/ui.py --keep store.db        # makes that store once, and uses it again

The store is that of `benchmarks/store.py`. Each page is asked for 100 times with random arguments, from a seed, over
HTTP on loopback by a client in the same process. Target: every page's p99 under 200 ms.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import httpx2
import uvicorn
from measure import where
from store import ROUNDS, TURNS, Worlds, furnish, insert

from engrain.cli.ui import LOOPBACK, _listen
from engrain.ui.access import Access
from engrain.ui.app import make_app
from memory.store import Store

ASKED, TARGET_MS = 100, 200


@contextmanager
def served(store: Store) -> Iterator[httpx2.Client]:
    """A client that the dashboard of this store has let in."""
    access, listening = Access(), _listen(LOOPBACK, 0)
    server = uvicorn.Server(uvicorn.Config(make_app(store, access), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    address = f"http://{LOOPBACK}:{listening.getsockname()[1]}"
    with httpx2.Client(base_url=address, follow_redirects=True, timeout=60) as client:
        client.get(f"/?token={access.token}").raise_for_status()
        yield client
    server.should_exit = True
    thread.join(timeout=10)


def addresses(store: Store, made: random.Random) -> dict[str, Callable[[], str]]:
    """What to ask for, by kind of page."""
    ids = [row.id for row in store.episode_rows(newest_first=True, limit=2000)] + store.ids("episode", "", 2000)
    items = [row.id for row in store.item_rows(limit=200)]
    outcomes = ["solved", "failed"]
    worlds = [f"{tally.env}/{tally.split}" for tally in store.tallies()]

    def number() -> int:
        return made.randint(1, ROUNDS)

    return {
        "overview": lambda: "/",
        "live": lambda: "/live",
        "rounds": lambda: "/rounds",
        "round": lambda: f"/rounds/{number()}",
        "items": lambda: f"/items?offset={50 * made.randrange(len(items) // 50 or 1)}",
        "items, searched": lambda: "/items?search=door+north&by=effect",
        "item": lambda: f"/items/{made.choice(items)}",
        "knowledge": lambda: "/knowledge",
        "knowledge version": lambda: f"/knowledge/{number()}",
        "diff": lambda: f"/diff?a={number()}&b={number()}",
        "episodes": lambda: "/episodes",
        "episodes, older": lambda: f"/episodes?before={made.choice(ids)}",
        "episodes of a world": lambda: f"/episodes?world={made.choice(worlds)}&outcome={made.choice(outcomes)}",
        "episodes of a round": lambda: f"/episodes?round={number()}",
        "episodes of a checkpoint": lambda: f"/episodes?checkpoint=checkpoint{number() - 1:04d}",
        "episode": lambda: f"/episodes/{made.choice(ids)}",
        "checkpoints": lambda: "/checkpoints",
        "checkpoint": lambda: f"/checkpoints/checkpoint{number() - 1:04d}",
    }


def measure(client: httpx2.Client, address: Callable[[], str]) -> dict[str, float]:
    """Milliseconds at the median and at the 99th percentile."""
    client.get(address()).raise_for_status()
    taken = []
    for _ in range(ASKED):
        asked, begun = address(), time.perf_counter()
        client.get(asked).raise_for_status()
        taken.append(1000 * (time.perf_counter() - begun))
    taken.sort()
    return {"p50_ms": round(taken[ASKED // 2], 1), "p99_ms": round(taken[int(ASKED * 0.99) - 1], 1)}


def main() -> None:
    """Make the store, ask for the pages, print what they took."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--turns", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", help="store to make, or to use if it is there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(given.keep or f"{folder}/store.db")
        there = path.exists()
        with Store.open(str(path)) as store:
            if not there:
                worlds, episodes = Worlds(given.seed), given.turns // TURNS
                insert(store, worlds, episodes)
                furnish(store, worlds, episodes)
            turns = sum(tally.turns for tally in store.tallies())
            with served(store) as client:
                pages = {
                    name: measure(client, address)
                    for name, address in addresses(store, random.Random(given.seed)).items()
                }
    worst = max(page["p99_ms"] for page in pages.values())
    found = {
        "name": "ui",
        "unit": "ms, p99 of the slowest page",
        "ours": worst,
        "peer": None,  # nobody else shows such a store
        "ratio": None,
        "target": TARGET_MS,
        "met": worst < TARGET_MS,
        "turns": turns,
        "asked": ASKED,
        "pages": pages,
        "machine": where(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
