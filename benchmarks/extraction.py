"""How good is what a model writes down? In-context gap by extraction mode, on the demo's world.

    OMP_NUM_THREADS=1 python benchmarks/extraction.py                       # Qwen2.5-Coder-0.5B, three seeds
    python benchmarks/extraction.py --coach qwen2.5-coder-1.5b              # a stronger model reads the episodes, too

For each seed the model plays the demo's training episodes. Each mode then reads the same episodes and writes items;
admission, merging and candidate texts are the round's own; the best candidate is chosen on validation tasks and
measured in context on test tasks that had no part in the choice. `paper` is the peer: one trace, bare instructions
(arXiv 2602.12275). Gaps are paired by task; the interval of a mode pools the tasks of all seeds.

Results of each seed and mode are kept under --out; a run that was cut goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from measure import where

from agent.engines.base import Engine
from agent.engines.transformers import TransformersEngine
from agent.episode import Episode
from agent.models.resolve import resolve
from agent.rollout import play
from engrain.coach import open_coach
from engrain.config import ImproveConfig
from engrain.demo import MODEL, demo_config
from engrain.gate import paired_gain
from engrain.rounds import RoundTasks
from memory.curate import admit, candidates
from memory.extract import Extractor, alternate
from memory.prompts import MODES
from memory.reader import Reader
from memory.records import Knowledge
from memory.select import select
from memory.store import Store

PEER, OURS = "paper", "contrastive"


def solved(engine: TransformersEngine, tasks: list[Any], config: ImproveConfig, text: str | None = None) -> list[bool]:
    sampling = config.evaluation.sampling
    episodes = play(tasks, engine, sampling=sampling, namespace="benchmark", knowledge=text, lockstep=True)
    return [episode.success for episode in episodes]


def played(engine: TransformersEngine, config: ImproveConfig, tasks: RoundTasks) -> list[Episode]:
    """What the round's first stage plays."""
    return play(
        tasks.play,
        engine,
        sampling=config.play.sampling,
        namespace=f"play-{config.seed}",
        seed=config.seed,
        lockstep=True,
    )


def run(
    engine: TransformersEngine, reader: Engine | Reader, mode: Any, config: ImproveConfig, bare: dict[str, list[bool]]
) -> dict[str, Any]:
    """One mode on one seed."""
    tasks, settings = RoundTasks.draw(config), config.extract
    episodes = played(engine, config, tasks)
    started = time.monotonic()
    chosen = alternate(episodes, settings.episodes, config.seed)
    extractions = Extractor(reader, mode).extract(chosen, config.seed)
    seconds = time.monotonic() - started
    with Store.open(":memory:") as store:
        store.add_episodes(episodes)
        for extraction in extractions:
            store.add_extraction(extraction)
        items = admit(store, extractions, most=settings.max_items)
        refused = len(store.events(kind="extraction", action="refused"))
    pool = candidates(items, settings.budget_tokens, engine.tokenizer, settings.candidates, config.seed)
    found: dict[str, Any] = {
        "mode": mode,
        "seed": config.seed,
        "extractions": len(extractions),
        "written": sum(len(e.items) for e in extractions),
        "malformed": sum(len(e.malformed) for e in extractions),
        "refused": refused,
        "items": [item.text for item in items],
        "seconds": round(seconds, 1),
        "knowledge": "",
    }
    helped = bare
    if pool:

        def score(knowledge: Knowledge) -> list[bool]:
            return solved(engine, tasks.validation, config, knowledge.text)

        best = select(pool, score).best
        found["knowledge"] = best.knowledge.text
        helped = {"validation": list(best.outcomes), "test": solved(engine, tasks.test, config, best.knowledge.text)}
    found["bare"], found["in_context"] = bare, helped
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--coach", help="MODEL, MODEL@URL or URL that also reads the episodes, in all modes")
    parser.add_argument("--test-tasks", type=int, default=96)
    parser.add_argument("--out", type=Path, default=Path("runs/extraction"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    engine = TransformersEngine(resolve(MODEL), name=MODEL)
    rows: list[dict[str, Any]] = []
    for reader_name in [None, given.coach] if given.coach else [None]:
        opened = open_coach(reader_name) if reader_name else None
        reader: Engine | Reader = opened.__enter__() if opened else engine
        for seed in given.seeds:
            base = demo_config(seed=seed)
            evaluation = base.evaluation.model_copy(update={"test_tasks": given.test_tasks, "ood": ()})
            config = base.model_copy(update={"evaluation": evaluation})
            bare = cached(given.out / f"bare-{seed}-{given.test_tasks}.json", lambda c=config: measure_bare(engine, c))
            for mode in given.modes:
                who = f"{mode}" + (f" by {reader_name}" if reader_name else "")
                name = f"{who.replace(' ', '-').replace('/', '_')}-{seed}-{given.test_tasks}.json"
                row = cached(given.out / name, lambda m=mode, c=config, b=bare, r=reader: run(engine, r, m, c, b)) | {
                    "mode": who
                }
                rows.append(row)
                gain = paired_gain(row["bare"]["test"], row["in_context"]["test"])
                print(f"seed {seed} {who:30} {row['written']:3} lines, test gap {gain} | {row['knowledge'][42:160]!r}")
        if opened:
            opened.__exit__(None, None, None)
    by_mode = {}
    for mode in dict.fromkeys(row["mode"] for row in rows):
        mine = [row for row in rows if row["mode"] == mode]
        by_mode[mode] = {
            split: paired_gain(
                [o for row in mine for o in row["bare"][split]], [o for row in mine for o in row["in_context"][split]]
            ).model_dump()
            for split in ("validation", "test")
        } | {"per_seed": [paired_gain(r["bare"]["test"], r["in_context"]["test"]).difference for r in mine]}
        print(f"{mode:30} test gap {by_mode[mode]['test']['difference']:+.3f}", by_mode[mode]["test"])
    ours, peer = (by_mode[m]["test"]["difference"] if m in by_mode else None for m in (OURS, PEER))
    print(
        json.dumps(
            {
                "name": "extraction",
                "ours": ours,
                "peer": peer,
                "ratio": ours / peer if ours is not None and peer else None,
                "target": {"gap at least the paper's mode": peer},
                "met": ours is not None and peer is not None and ours >= peer,
                "modes": by_mode,
                "seeds": given.seeds,
                "machine": where(),
            }
        )
    )


def measure_bare(engine: TransformersEngine, config: ImproveConfig) -> dict[str, list[bool]]:
    tasks = RoundTasks.draw(config)
    return {"validation": solved(engine, tasks.validation, config), "test": solved(engine, tasks.test, config)}


def cached(path: Path, make: Any) -> dict[str, Any]:
    """What stands in the file, or what `make` gives, which then stands there."""
    if not path.exists():
        path.write_text(json.dumps(make(), ensure_ascii=False))
    return dict(json.loads(path.read_text()))


if __name__ == "__main__":
    main()
