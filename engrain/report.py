"""What a finished round shows: a table, a JSON file, a learning curve."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from distill.checkpoint import versions
from engrain.config import ImproveConfig
from engrain.evaluate import outcomes
from engrain.gate import Rate, recovery, wilson
from engrain.rounds import RoundResult
from memory.records import EvaluationRecord

#: How an `OodResult` was measured, in the order of the report.
MOMENTS = ("before", "in_context", "after")


def machine() -> dict[str, Any]:
    """What the numbers were made on: processor, cores this process may use, memory, accelerator."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return {
        "processor": _processor(),
        "cores": cores,
        "memory_gib": round(pages / 2**30, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def summary(result: RoundResult, config: ImproveConfig) -> dict[str, Any]:
    """The round as plain data, as `report.json` holds it. Accuracies come with their 95% Wilson interval and count.

    After an early stop (fewer tasks than there are, see `looks`) only the gain's interval allows for it.
    """
    found = {name: _rate(evaluation) for name, evaluation in result.evaluations.items()}
    pooled = {
        moment: wilson([outcome for other in result.ood.values() for outcome in outcomes(getattr(other, moment))])
        for moment in MOMENTS
    }
    return {
        "round": result.round.number,
        "status": result.status,
        "promoted": bool(result.verdict and result.verdict.promoted),
        "reason": result.reason,
        "model": config.model,
        "world": config.world.model_dump(mode="json"),
        **{name: rate.model_dump() for name, rate in found.items()},
        "recovery": _recovery(found),
        "gain": result.verdict.gain.model_dump() if result.verdict else None,
        "looks": [look.model_dump(mode="json") for look in result.verdict.looks] if result.verdict else [],
        "validation_gap": result.gap.model_dump() if result.gap else None,
        **{f"ood_{moment}": rate.model_dump() for moment, rate in pooled.items()},
        "ood_worlds": {
            world: {
                moment: {**_rate(found).model_dump(), "mean_score": found.mean_score}
                for moment, found in ((moment, getattr(other, moment)) for moment in MOMENTS)
            }
            for world, other in result.ood.items()
        },
        "knowledge": result.knowledge.text if result.knowledge else None,
        "method": config.distill.method,
        "objective": config.distill.objective,
        "steps": config.distill.steps,
        "validation": result.validation,
        "checkpoint": result.checkpoint.id if result.checkpoint else None,
        "seed": config.seed,
        "seconds": round(result.seconds, 1),
        "machine": machine(),
        "versions": versions(),
    }


def table(result: RoundResult) -> Table:
    """Bare, in context and distilled on test tasks, then the other worlds before and after."""
    view = Table(title=f"Round {result.round.number}", title_justify="left")
    for column, justify in (("tasks", "left"), ("student", "left"), ("accuracy", "right"), ("95% interval", "right")):
        view.add_column(column, justify=justify)  # type: ignore[arg-type]
    view.add_column("n", justify="right")
    titles = {"bare": "bare", "in_context": "knowledge in context", "distilled": "distilled, nothing in context"}
    for name, evaluation in result.evaluations.items():
        view.add_row(f"{evaluation.env}/{evaluation.split}", titles.get(name, name), *_cells(evaluation))
    for world, other in result.ood.items():
        view.add_section()
        for moment, title in zip(MOMENTS, (titles["bare"], titles["in_context"], titles["distilled"]), strict=True):
            view.add_row(
                f"{world}, not trained on" if moment == "before" else "", title, *_cells(getattr(other, moment))
            )
    return view


def write(result: RoundResult, config: ImproveConfig, folder: Path) -> Path:
    """Write `report.json` and `curve.png` into `folder`; returns the JSON's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.json"
    path.write_text(json.dumps(summary(result, config), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if result.history:
        curve(result, folder / "curve.png")
    return path


def curve(result: RoundResult, path: Path) -> None:
    """Learning curve: accuracy on validation tasks and the divergence to the teacher, by training step."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, left = plt.subplots(figsize=(7, 4), dpi=130, layout="constrained")
    steps = sorted(result.validation)
    left.plot(steps, [result.validation[s] for s in steps], "o-", color="#1f6f8b", label="validation accuracy, bare")
    if result.gap is not None and "in_context" in result.evaluations:
        for name, style in (("in_context", "--"), ("bare", ":")):
            rate = result.evaluations[name].accuracy
            left.axhline(rate, color="#555555", linestyle=style, linewidth=1, label=f"test, {name.replace('_', ' ')}")
    left.set(xlabel="training step", ylabel="accuracy", ylim=(-0.03, 1.03))
    right = left.twinx()
    right.plot(
        [m.step for m in result.history],
        [m.divergence for m in result.history],
        color="#d1495b",
        alpha=0.7,
        linewidth=1,
    )
    right.set_ylabel("divergence to the teacher (nats a token)", color="#d1495b")
    right.set_ylim(bottom=0)
    left.legend(loc="center right", frameon=False, fontsize=8)
    left.set_title(f"Round {result.round.number}: knowledge moves into the weights", loc="left", fontsize=10)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def _cells(evaluation: EvaluationRecord) -> Sequence[str]:
    return (f"{evaluation.accuracy:.2f}", f"{evaluation.low:.2f} - {evaluation.high:.2f}", str(evaluation.n))


def _rate(evaluation: EvaluationRecord) -> Rate:
    return Rate(accuracy=evaluation.accuracy, low=evaluation.low, high=evaluation.high, n=evaluation.n)


def _recovery(found: dict[str, Rate]) -> float | None:
    if not {"bare", "in_context", "distilled"} <= set(found):
        return None
    return recovery(*(found[name].accuracy for name in ("bare", "in_context", "distilled")))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
