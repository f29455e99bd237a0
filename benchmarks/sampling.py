"""Sampling inside a training step: from the base model, from the adapter merged and unmerged, and as TRL does it.

    python benchmarks/sampling.py [--models smollm2-135m qwen2.5-coder-0.5b] [--repeats 5]

Sides: `base` is our engine on the base model; `merged` on the model under training, its LoRA adapter (rank 16, all
linear layers, weights not zero) merged before and taken out after, that time included; `unmerged` the same with the
adapter beside the weights; `generate` is transformers' `model.generate` on the PEFT model in eval mode, prompts padded
on the left, which is what TRL's trainers call. All sample at temperature 1 from the whole vocabulary.

Cases: `even`, the demo's step: 16 short prompts, 32 tokens each; `ragged`, 16 rows of 8 to 64 tokens, where a batch
that keeps its finished rows computes 64 for all; `prefix`, 16 prompts that share 512 tokens, 32 tokens each. No end
token is obeyed, so that all sides sample equally many. `forwarded` counts the positions that went through the model.

Sides take turns within every repeat, and ratios are medians over the repeats. Processor time is of all threads; with
OMP_NUM_THREADS=1 it says more than the clock where other programs run. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from measure import in_process_of_its_own, where

ROWS = 16
PREFIX = 512
WITHIN = 0.95  # of the base model's tokens a second
LENGTHS = {"even": [32] * ROWS, "ragged": [8 + round(56 * i / (ROWS - 1)) for i in range(ROWS)], "prefix": [32] * ROWS}

#: (prompts, tokens to sample after each) -> sampled ids
Sampler = Callable[[Sequence[Sequence[int]], Sequence[int]], list[list[int]]]


def prompts(renderer: Any, case: str) -> list[list[int]]:
    from agent.episode import Message

    knowledge = None
    if case == "prefix":
        line = "- Count the boxes before you open the door.\n"
        knowledge = line * (PREFIX // (len(renderer.tokenizer(line)["input_ids"])))
    return [renderer.prompt([Message(role="user", content=f"What is {n} + {7 * n}?")], knowledge) for n in range(ROWS)]


def by_engine(engine: Any) -> Sampler:
    """Our engine. A wrapped one merges at every call."""
    from agent.episode import SamplingParams

    engine.renderer.stop_ids = frozenset()
    engine.network.generation_config.eos_token_id = None

    def sample(given: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[list[int]]:
        params = [SamplingParams(temperature=1.0, max_tokens=n, seed=i) for i, n in enumerate(lengths)]
        return [list(c.token_ids) for c in engine.generate(given, params)]

    return sample


def by_generate(model: Any, pad: int) -> Sampler:
    """transformers' own generation, which ends when the last row does."""
    import torch
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    class Lengths(StoppingCriteria):  # type: ignore[misc]
        """Every row is done at its own length."""

        def __init__(self, start: int, lengths: Sequence[int]) -> None:
            self.ends = torch.tensor([start + n for n in lengths])

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return (input_ids.shape[1] >= self.ends).to(input_ids.device)

    config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=pad)

    def sample(given: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[list[int]]:
        width = max(map(len, given))
        ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in given], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in given], device=model.device)
        config.max_new_tokens = max(lengths)
        with torch.no_grad():
            done = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([Lengths(width, lengths)]),
            )
        return [row[width : width + n].tolist() for row, n in zip(done, lengths, strict=True)]

    return sample


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Positions of every forward pass inside."""
    seen: list[int] = []
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].numel()))
    try:
        yield seen
    finally:
        handle.remove()


def run(case: dict[str, Any]) -> dict[str, Any]:
    import torch

    from agent.engines.lora import merged
    from agent.engines.transformers import TransformersEngine
    from agent.models.resolve import resolve
    from distill.adapters import add_lora
    from distill.config import LoraSettings

    folder = resolve(case["model"])
    base = TransformersEngine(folder, name=case["model"], reuse_tokens=0)
    student = add_lora(TransformersEngine(folder, name=case["model"]).network, LoraSettings(rank=16, alpha=32), 0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    wrap = {"model": student.eval(), "tokenizer": base.tokenizer, "name": case["model"]}
    sides: dict[str, tuple[Any, Sampler]] = {
        "base": (base.network, by_engine(base)),
        "merged": (student, by_engine(TransformersEngine.wrap(**wrap))),
        "unmerged": (student, by_engine(TransformersEngine.wrap(**wrap, merge=False))),
        "generate": (student, by_generate(student, base.tokenizer.pad_token_id or 0)),
    }
    before = {name: tensor.clone() for name, tensor in student.state_dict().items() if "lora_" not in name}
    found: dict[str, Any] = {}
    for name, lengths in LENGTHS.items():
        given = prompts(base.renderer, name)
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        work: dict[str, list[float]] = {side: [] for side in sides}
        forwarded = {}
        for repeat in range(1 + case["repeats"]):  # the first one warms up
            for side, (network, sample) in sides.items():
                with counted(network) as seen:
                    started, worked = time.perf_counter(), time.process_time()
                    sampled = sample(given, lengths)
                    elapsed, worked = time.perf_counter() - started, time.process_time() - worked
                if [len(ids) for ids in sampled] != lengths:
                    raise SystemExit(f"{side} sampled {[len(ids) for ids in sampled]} tokens, not {lengths}")
                forwarded[side] = sum(seen)
                if repeat:
                    seconds[side].append(elapsed)
                    work[side].append(worked)
        tokens = sum(lengths)
        found[name] = {
            "tokens": tokens,
            "prompt_tokens": sum(map(len, given)),
            "tokens_per_second": {side: round(tokens / statistics.median(s), 1) for side, s in seconds.items()},
            "forwarded": forwarded,
            "of_base": median_ratio(seconds["base"], seconds["merged"]),
            "of_base_in_processor_time": median_ratio(work["base"], work["merged"]),
            "of_unmerged": median_ratio(seconds["unmerged"], seconds["merged"]),
            "of_generate": median_ratio(seconds["generate"], seconds["merged"]),
            "seconds": {side: [round(x, 3) for x in s] for side, s in seconds.items()},
        }
        print(f"{case['model']}, {name}: {found[name]['of_base']} of the base model", file=sys.stderr, flush=True)
    merging = []
    for _ in range(1 + case["repeats"]):
        started = time.perf_counter()
        with merged(student):
            pass
        merging.append(time.perf_counter() - started)
    after = student.state_dict()
    return {
        "cases": found,
        "merge_seconds": round(statistics.median(merging[1:]), 4),
        "weights_unchanged": all(torch.equal(after[name], tensor) for name, tensor in before.items()),
        "dtype": str(next(base.network.parameters()).dtype),
        "threads": torch.get_num_threads(),
    }


def median_ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """How many times faster ours is: the median over repeats that ran one after the other."""
    return round(statistics.median(t / o for t, o in zip(theirs, ours, strict=True)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m", "qwen2.5-coder-0.5b"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(run(json.loads(given.case))))
        return
    models = {m: in_process_of_its_own(__file__, model=m, repeats=given.repeats) for m in given.models}
    demo = models[given.models[-1]]["cases"]["even"]
    worst = min(case["of_base"] for model in models.values() for case in model["cases"].values())
    print(
        json.dumps(
            {
                "name": "sampling",
                "ours": demo["tokens_per_second"]["merged"],
                "peer": demo["tokens_per_second"]["generate"],
                "ratio": demo["of_generate"],
                "target": {"of_base": WITHIN},
                "met": worst >= WITHIN and all(model["weights_unchanged"] for model in models.values()),
                "worst_of_base": worst,
                "models": models,
                "machine": where(),
            }
        )
    )


if __name__ == "__main__":
    main()
