"""The chunked exact divergence against naive full logits and TRL's chunked kernel: time, peak memory, error.

    python benchmarks/divergence.py [--positions 4096] [--vocabulary 151936] [--width 896] [--repeats 3]

Each case is forward and backward of reverse KL from hidden states, in a process of its own, bfloat16 inputs where the
machine computes in it. The error is ours in float32 against float64, on fewer positions. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from measure import in_process_of_its_own, timed, where


def inputs(case: dict[str, Any], dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Student hidden states and head, teacher hidden states and head."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(case["positions"], case["width"]), (case["vocabulary"], case["width"])] * 2
    scales = [1.0, 0.08] * 2
    return [
        (torch.randn(*shape, generator=draw) * scale).to(device=device, dtype=dtype)
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def run(case: dict[str, Any]) -> dict[str, Any]:
    from agent.engines.transformers import pick_device, pick_dtype
    from distill.objective import chunked_divergence, reverse_kl

    device = pick_device()
    dtype = pick_dtype("auto", device)
    student, head_s, teacher, head_t = inputs(case, dtype, device)
    student.requires_grad_()

    def naive() -> torch.Tensor:
        s = (student @ head_s.T).float().log_softmax(-1)
        t = (teacher @ head_t.T).float().log_softmax(-1)
        return (s.exp() * (s - t)).sum(-1).mean()

    def chunked() -> torch.Tensor:
        return chunked_divergence(student, head_s, teacher, head_t, reverse_kl)[0].mean()

    def trl() -> torch.Tensor:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        return ChunkedDivergenceFunction.apply(student, head_s, None, teacher, head_t, None, 1.0)[0].mean()

    value: list[float] = []
    compute = {"naive": naive, "ours": chunked, "trl": trl}[case["side"]]

    def step() -> None:
        student.grad = None
        loss = compute()
        loss.backward()
        value.append(float(loss.detach()))

    measured = timed(step, case["repeats"])
    return {**measured, "loss": value[-1], "gradient_norm": float(student.grad.float().norm())}  # type: ignore[union-attr]


def error(case: dict[str, Any]) -> dict[str, Any]:
    from distill.objective import chunked_divergence, divergence_named

    exact = inputs(case, torch.float64, torch.device("cpu"))
    single = [tensor.float() for tensor in exact]
    found = {}
    for name in ("reverse_kl", "forward_kl", "jsd", "skew_kl", "topk"):
        pair = []
        for tensors in (single, exact):
            hidden = tensors[0].clone().requires_grad_()
            d, _ = chunked_divergence(hidden, tensors[1], tensors[2], tensors[3], divergence_named(name))
            d.sum().backward()
            pair.append((d.detach().double(), hidden.grad.double()))  # type: ignore[union-attr]
        (d1, g1), (d2, g2) = pair
        found[name] = {
            "value": float(((d1 - d2).abs() / d2.abs()).max()),
            "gradient": float((g1 - g2).norm() / g2.norm()),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        case = json.loads(given.case)
        print(json.dumps(error(case) if case["side"] == "error" else run(case)))
        return
    size = {"positions": given.positions, "vocabulary": given.vocabulary, "width": given.width}
    sides = {
        s: in_process_of_its_own(__file__, side=s, repeats=given.repeats, **size) for s in ("ours", "trl", "naive")
    }
    errors = in_process_of_its_own(__file__, side="error", **{**size, "positions": 64})
    worst = max(max(e.values()) for e in errors.values())
    ratio = {
        peer: {
            "faster": round(sides[peer]["seconds"] / sides["ours"]["seconds"], 3),
            "memory": round(sides["ours"]["rise_bytes"] / sides[peer]["rise_bytes"], 3),
        }
        for peer in ("trl", "naive")
    }
    print(
        json.dumps(
            {
                "name": "divergence",
                "ours": sides["ours"]["seconds"],
                "peer": sides["trl"]["seconds"],
                "ratio": ratio["trl"]["faster"],
                "target": {"error": 1e-5},
                "met": worst < 1e-5,
                "ratios": ratio,
                "cases": sides,
                "errors": errors,
                "worst_error": worst,
                **size,
                "machine": where(),
            }
        )
    )


if __name__ == "__main__":
    main()
