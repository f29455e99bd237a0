"""Scaling over Ray players: the same episodes by 1, 2 and 4 of them, with an engine that takes a fixed time a call.

    python benchmarks/scaling.py [--episodes 256] [--latency 0.5] [--players 1 2 4]

The engine only sleeps, so that players do not compete for cores and what is left is the cost of handing out tasks,
stepping envs and gathering episodes. Players are started, and have played once, before the clock runs. Needs
`engrain[ray]`. The last line is JSON; efficiency is the time of one player by n times that of n.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from measure import where

TARGET = 0.9


class StandIn:
    """Answers every prompt with the same few tokens, `latency` seconds a call."""

    model, checkpoint, max_context = "stand-in", None, 8192

    def __init__(self, folder: str, latency: float) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.latency = latency
        self.ids = (*self.tokenizer("go on", add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id)

    def generate(self, prompts: Sequence[Any], sampling: Sequence[Any]) -> list[Any]:
        from agent.engines.base import Completion
        from agent.episode import FinishReason

        time.sleep(self.latency)
        return [Completion(self.ids, (-1.0,) * len(self.ids), FinishReason.STOP) for _ in prompts]


def make_echo(turns: int, task: Any) -> Any:
    from envs.base import Env, Observation, Step

    class Echo(Env):
        system, max_turns, turn = "Echo.", turns, 0

        def reset(self) -> Observation:
            return Observation("start")

        def step(self, text: str) -> Step:
            self.turn += 1
            return Step(Observation(f"heard {text}"), 0.0, self.turn == turns)

        @property
        def score(self) -> float:
            return float(self.turn == turns)

    return Echo(task)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=256)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16, help="requests a call, in each player")
    parser.add_argument("--latency", type=float, default=0.5, help="seconds a call")
    parser.add_argument("--players", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--model", default="smollm2-135m", help="whose tokenizer is used")
    given = parser.parse_args()

    import ray

    from agent.cluster import Cluster
    from agent.episode import SamplingParams
    from agent.models.resolve import resolve
    from agent.rollout import RolloutStats
    from envs.base import Split, Task

    quiet: Any = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init("local", num_cpus=max(given.players), **quiet)
    engine = partial(StandIn, str(resolve(given.model)), given.latency)
    tasks = [Task.create("echo", Split.TRAIN, seed, {}) for seed in range(given.episodes)]
    options: Any = {
        "sampling": SamplingParams(max_tokens=8),
        "batch": given.batch,
        "make_env": partial(make_echo, given.turns),
    }
    rows = []
    for players in given.players:
        with Cluster(engine, players=players) as cluster:
            while len(cluster.play(tasks[: 2 * players], namespace="warm-up", **options)) and not cluster.complete:
                continue
            stats = RolloutStats()
            start = time.perf_counter()
            played = cluster.play(tasks, namespace="scaling", stats=stats, **options)
            seconds = time.perf_counter() - start
        if len({episode.id for episode in played}) != given.episodes or stats.failed:
            raise SystemExit(
                f"{players} players lost episodes: {len(played)} of {given.episodes}, {stats.failed} failed"
            )
        rows.append({"players": players, "seconds": round(seconds, 3), "engine_share": round(stats.engine_share, 3)})
        rows[-1]["episodes_per_second"] = round(given.episodes / seconds, 2)
        rows[-1]["efficiency"] = round(rows[0]["seconds"] * rows[0]["players"] / (seconds * players), 4)
        print(rows[-1], flush=True)
    worst = min(row["efficiency"] for row in rows)
    calls = given.episodes / given.batch * given.turns * given.latency
    print(
        json.dumps(
            {
                "name": "scaling",
                "ours": rows[-1]["seconds"],
                "peer": rows[0]["seconds"],
                "ratio": round(rows[0]["seconds"] / rows[-1]["seconds"], 2),
                "efficiency": worst,
                "target": TARGET,
                "met": worst >= TARGET,
                "rows": rows,
                "engine_seconds_of_full_batches": calls,
                "settings": vars(given),
                "machine": where(),
            }
        )
    )
    ray.shutdown()


if __name__ == "__main__":
    main()
