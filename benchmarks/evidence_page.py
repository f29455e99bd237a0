"""The page of the evidence: tables and a plot of every run that `evidence.py` left, and what a person reads in them.

Accuracies come with Wilson's 95% interval over all seeds' tasks, differences with Newcombe's paired one; both speak of
these trained checkpoints on new tasks, and the figures by seed show how far a new training may lie from them. What is
written by hand stands in `reading.md` beside the runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from evidence_worlds import ARMS, WORLDS, arms_of

from engrain.gate import paired_gain, recovery, wilson

SEEDS = (0, 1, 2)
Row = Mapping[str, Any]
Runs = dict[str, dict[str, dict[int, Row]]]  # by world, arm, seed

_TITLES = {
    "sums": "Sums that count only as `<answer>12</answer>`",
    "products": 'Products that count only as `{"answer": 12}`',
    "chains": "Chains of three terms that count only as `\\boxed{12}`",
    "helpdesk": "A written prompt: sorting messages",
    "cooking": "TextWorld cooking",
    "frozenlake": "FrozenLake without its rules",
    "sokoban": "Sokoban without its rules",
}
_OURS, _PEER = "opcd-forward_kl", "off_policy"


def load(folder: Path) -> Runs:
    """All runs that are there."""
    runs: Runs = {}
    for path in sorted(folder.glob("*/*.json")):
        row = json.loads(path.read_text(encoding="utf-8"))
        runs.setdefault(row["world"], {}).setdefault(row["arm"], {})[row["seed"]] = row
    return {world: runs[world] for world in WORLDS if world in runs}


def solved(bits: str) -> list[bool]:
    return [bit == "1" for bit in bits]


def pooled(rows: Mapping[int, Row], name: str) -> list[bool]:
    """Outcomes of all seeds, in the seeds' order."""
    return [
        outcome
        for seed in sorted(rows)
        for outcome in solved(rows[seed]["test"] if name == "test" else rows[seed]["other"].get(name, ""))
    ]


def measured(rows: Mapping[int, Row]) -> dict[int, Row]:
    """Those runs that came to an end."""
    return {seed: row for seed, row in rows.items() if "test" in row}


def rate(rows: Mapping[int, Row], name: str) -> str:
    found = wilson(pooled(rows, name))
    return f"{found.accuracy:.2f} [{found.low:.2f}, {found.high:.2f}]" if found.n else ""


def accuracy(row: Row) -> float:
    return mean(map(int, row["test"]))


def difference(rows: Mapping[int, Row], other: Mapping[int, Row]) -> str:
    """Paired difference on the test tasks of the seeds that both have."""
    both = sorted(set(measured(rows)) & set(measured(other)))
    if not both:
        return ""
    gain = paired_gain(
        pooled({seed: other[seed] for seed in both}, "test"), pooled({seed: rows[seed] for seed in both}, "test")
    )
    return f"{gain.difference:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]"


def recoveries(arms: Mapping[str, Mapping[int, Row]], name: str) -> list[float]:
    """(distilled - bare) / (in context - bare), seed by seed."""
    rows = [measured(arms.get(one, {})) for one in ("bare", "in-context", name)]
    both = sorted(set.intersection(*map(set, rows)))
    found = [recovery(*(accuracy(some[seed]) for some in rows)) for seed in both]
    return [value for value in found if value is not None]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)] + [""]


def section(world: str, arms: Mapping[str, Mapping[int, Row]]) -> list[str]:
    """One world: what was learned, what it cost elsewhere, and every run that did not end in a student."""
    there = {name: measured(arms[name]) for name in ARMS if measured(arms.get(name, {}))}
    learned, cost = [], []
    for name, rows in there.items():
        by_seed = " ".join(f"{accuracy(rows[seed]):.2f}" for seed in sorted(rows))
        tokens = [row["sampled_tokens"] for row in rows.values() if "sampled_tokens" in row]
        peer = difference(rows, arms.get(_PEER, {})) if name != _PEER else ""
        learned.append((ARMS[name].title, rate(rows, "test"), by_seed, peer, f"{mean(tokens):.0f}" if tokens else ""))
        sampled = [row["sampled"] for row in rows.values()]
        watched = [f"{mean(s[key] for s in sampled):.2f}" for key in ("entropy", "distinct_2", "response_tokens")]
        others = [rate(rows, other) for other in sorted({o for row in rows.values() for o in row["other"]})]
        cost.append((ARMS[name].title, *others, *watched, f"{mean(s['leak_rate'] for s in sampled):.2f}"))
    names = sorted({o for rows in there.values() for row in rows.values() for o in row["other"]})
    seeds = sorted({seed for rows in there.values() for seed in rows})
    lines = [f"## {_TITLES[world]}", "", f"Seeds made: {', '.join(map(str, seeds))}; 128 test tasks a seed.", ""]
    lines += table(("student", "test", "by seed", "against off-policy", "tokens sampled"), learned)
    lines += table(("student", *names, "entropy", "distinct-2", "length", "leaks"), cost)
    lines += said(arms)
    return lines


def said(arms: Mapping[str, Mapping[int, Row]]) -> list[str]:
    """The texts with their gaps, refusals and failures."""
    lines, texts = [], {}
    for rows in arms.values():
        for seed, row in sorted(rows.items()):
            if "knowledge" in row:
                texts.setdefault((row["knowledge"], seed), row["gap"])
            if why := row.get("refused") or row.get("error") or row.get("stopped"):
                lines.append(f"- {ARMS[row['arm']].title}, seed {seed}: {why}")
    for (text, seed), gap in texts.items():
        short = text if len(text) <= 300 else text[:300] + " …"
        found = f"{gap['difference']:+.2f} [{gap['low']:+.2f}, {gap['high']:+.2f}], n={gap['n']}"
        verdict = "passed" if gap["low"] > 0 else "refused"
        lines.append(
            f"- seed {seed}, gap on validation {found}, gap test {verdict}: `{' / '.join(short.split(chr(10)))}`"
        )
    return [*lines, ""]


def draw(runs: Runs, path: Path) -> None:
    """Test accuracy of every student, with its interval; one panel a world."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(runs), figsize=(3.2 + 2.6 * len(runs), 5.6), dpi=130, sharey=True, layout="constrained", squeeze=False
    )
    names = [name for name in ARMS if any(measured(arms.get(name, {})) for arms in runs.values())]
    for axis, (world, arms) in zip(axes[0], runs.items(), strict=True):
        for place, name in enumerate(names):
            rows = measured(arms.get(name, {}))
            if not rows:
                continue
            found = wilson(pooled(rows, "test"))
            colour = "#1f6f8b" if ARMS[name].distill else "#888888"
            axis.errorbar(
                found.accuracy, place, xerr=[[found.accuracy - found.low], [found.high - found.accuracy]],
                fmt="o", color=colour, capsize=2,
            )  # fmt: skip
            axis.plot([accuracy(row) for row in rows.values()], [place] * len(rows), "|", color=colour, alpha=0.6)
        axis.set(title=world, xlim=(-0.03, 1.03), xlabel="accuracy on test tasks")
        axis.grid(axis="x", linewidth=0.3)
    axes[0][0].set_yticks(range(len(names)), [ARMS[name].title for name in names], fontsize=7)
    axes[0][0].invert_yaxis()
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def build(folder: Path) -> dict[str, Any]:
    """Write `evidence.md` and `evidence.png` beside the folder of runs, and return the result as one JSON object."""
    runs = load(folder)
    asked = [world for world in WORLDS if world in runs or not WORLDS[world].large]
    mean_recovery = {
        world: {
            name: round(mean(found), 3)
            for name in ARMS
            if ARMS[name].distill is not None and (found := recoveries(arms, name))
        }
        for world, arms in runs.items()
    }
    page, reading = folder.with_suffix(".md"), folder / "reading.md"
    if runs:
        draw(runs, folder.with_suffix(".png"))
        lines = [
            "# Evidence",
            "",
            "Made by `python benchmarks/evidence.py`; each run is a JSON file in `evidence/`.",
            "",
        ]
        lines += [reading.read_text(encoding="utf-8"), ""] if reading.exists() else []
        made = sum(len(rows) for arms in runs.values() for rows in arms.values())
        planned = sum(len(arms_of(world)) for world in asked) * len(SEEDS)
        lines += [f"{made} of {planned} planned runs have been made; the others wait for the same command.", ""]
        lines += [f"![Accuracy of every student]({folder.name}.png)", ""]
        for world, arms in runs.items():
            lines += section(world, arms)
        page.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    ours, peer = ([found[name] for found in mean_recovery.values() if name in found] for name in (_OURS, _PEER))
    mine, theirs = (mean(values) if values else None for values in (ours, peer))
    missing = [
        f"{world}/{name}-{seed}"
        for world in asked
        for name in arms_of(world)
        for seed in SEEDS
        if seed not in runs.get(world, {}).get(name, {})
    ]
    return {
        "name": "evidence",
        "ours": mine,
        "peer": theirs,
        "ratio": mine / theirs if mine is not None and theirs else None,
        "target": {"recovery": 0.8},
        "met": mine is not None and mine >= 0.8 and not missing,
        "missing": len(missing),
        "mean_recovery": mean_recovery,
        "runs": sum(len(rows) for arms in runs.values() for rows in arms.values()),
    }
