"""The chunked exact divergence against naive full logits and TRL's chunked kernel: time, peak memory, error.

    python benchmarks/divergence.py [--positions 4096] [--vocabulary 151936] [--width 896] [--repeats 3]

Each case is forward and backward of reverse KL from hidden states, in a process of its own, bfloat16 inputs where the
machine computes in it. Naive full logits hold six tensors of positions x vocabulary in float32, 15 GB at the full size:
`--naive-positions` runs them on fewer, and our own again on as many to compare with. The error is ours in float32
against the definitions in float64, on a sample of the positions. The last line is JSON.
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


def naive(student: torch.Tensor, head_s: torch.Tensor, teacher: torch.Tensor, head_t: torch.Tensor) -> torch.Tensor:
    s = (student @ head_s.T).float().log_softmax(-1)
    t = (teacher @ head_t.T).float().log_softmax(-1)
    return (s.exp() * (s - t)).sum(-1).mean()


def ours(*tensors: torch.Tensor) -> torch.Tensor:
    from distill.chunked import chunked_divergence
    from distill.objective import reverse_kl

    return chunked_divergence(*tensors, reverse_kl)[0].mean()


def trl(student: torch.Tensor, head_s: torch.Tensor, teacher: torch.Tensor, head_t: torch.Tensor) -> torch.Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedDivergenceFunction.apply(student, head_s, None, teacher, head_t, None, 1.0)[0].mean()


def run(case: dict[str, Any]) -> dict[str, Any]:
    from agent.engines.transformers import pick_device, pick_dtype

    device = pick_device()
    dtype = pick_dtype("auto", device)
    compute = {"naive": naive, "ours": ours, "trl": trl}[case["side"]]
    tensors: list[torch.Tensor] = []
    value: list[float] = []

    def step() -> None:
        tensors[0].grad = None
        loss = compute(*tensors)
        loss.backward()
        value.append(float(loss.detach()))

    for size in ({"positions": 4, "vocabulary": 64, "width": 32}, case):  # what is loaded at the first use is not ours
        tensors[:] = inputs(size, dtype, device)
        tensors[0].requires_grad_()
        measured = timed(step, case["repeats"])
    gradient = tensors[0].grad
    assert gradient is not None
    return {**measured, "loss": value[-1], "gradient_norm": float(gradient.float().norm())}


def definition(name: str, z_s: torch.Tensor, z_t: torch.Tensor) -> torch.Tensor:
    """The divergences with their usual parameters as they are written in the papers, left to autograd."""
    s, t = z_s.log_softmax(-1), z_t.log_softmax(-1)
    if name == "topk":
        index = s.topk(256, -1).indices
        s, t = s.gather(-1, index), t.gather(-1, index)
        s, t = (torch.cat([x, (1 - x.exp().sum(-1, keepdim=True)).log()], -1) for x in (s, t))

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (p.exp() * (p - q)).sum(-1)

    if name == "forward_kl":
        return kl(t, s)
    if name == "jsd":
        m = ((s.exp() + t.exp()) / 2).log()
        return (kl(s, m) + kl(t, m)) / 2
    if name == "skew_kl":
        return kl(t, (0.1 * t.exp() + 0.9 * s.exp()).log())
    return kl(s, t)


def error(case: dict[str, Any]) -> dict[str, Any]:
    """Largest relative error of a value, and the gradient's as a share of its norm, on a sample of the positions."""
    from distill.chunked import chunked_divergence
    from distill.objective import divergence_named

    student, head_s, teacher, head_t = inputs(case, torch.float32, torch.device("cpu"))
    every = max(1, case["positions"] // case["sample"])
    student, teacher = student[::every], teacher[::every]
    found = {}
    for name in ("reverse_kl", "forward_kl", "jsd", "skew_kl", "topk"):
        hidden = student.clone().requires_grad_()
        d, _ = chunked_divergence(hidden, head_s, teacher, head_t, divergence_named(name))
        d.sum().backward()
        assert hidden.grad is not None
        exact_d, exact_grad = _exact(name, student, head_s, teacher, head_t)
        found[name] = {
            "value": float(((d.detach().double() - exact_d).abs() / exact_d.abs()).max()),
            "gradient": float((hidden.grad.double() - exact_grad).norm() / exact_grad.norm()),
        }
    return {"positions": len(student), **found}


def _exact(
    name: str, student: torch.Tensor, head_s: torch.Tensor, teacher: torch.Tensor, head_t: torch.Tensor, chunk: int = 16
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and gradients in float64, a few positions at a time."""
    wide_s, wide_t = head_s.double(), head_t.double()
    values, grads = [], []
    for part_s, part_t in zip(student.split(chunk), teacher.split(chunk), strict=True):
        hidden = part_s.double().requires_grad_()
        d = definition(name, hidden @ wide_s.T, part_t.double() @ wide_t.T)
        d.sum().backward()
        values.append(d.detach())
        grads.append(hidden.grad)
    return torch.cat(values), torch.cat(grads)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--naive-positions", type=int, help="Fewer for naive full logits; 6 x 4 x this x vocabulary.")
    parser.add_argument("--sample", type=int, default=128, help="Positions whose error is measured in float64.")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        case = json.loads(given.case)
        print(json.dumps(error(case) if case["side"] == "error" else run(case)))
        return
    size = {"positions": given.positions, "vocabulary": given.vocabulary, "width": given.width}
    few = {**size, "positions": min(given.naive_positions or given.positions, given.positions)}

    def measured(side: str, size: dict[str, int]) -> dict[str, Any]:
        return in_process_of_its_own(__file__, side=side, repeats=given.repeats, **size)

    sides = {"ours": measured("ours", size), "trl": measured("trl", size), "naive": measured("naive", few)}
    beside_naive = sides["ours"] if few == size else measured("ours", few)
    errors = in_process_of_its_own(__file__, side="error", sample=given.sample, **size)
    sampled = errors.pop("positions")
    worst = max(max(e.values()) for e in errors.values())
    ratio = {
        peer: {
            "positions": at["positions"],
            "faster": round(sides[peer]["seconds"] / ours["seconds"], 3),
            "memory": round(ours["rise_bytes"] / sides[peer]["rise_bytes"], 4),
        }
        for peer, ours, at in (("trl", sides["ours"], size), ("naive", beside_naive, few))
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
                "ours_beside_naive": beside_naive,
                "errors": errors,
                "error_positions": sampled,
                "worst_error": worst,
                **size,
                "machine": where(),
            }
        )
    )


if __name__ == "__main__":
    main()
