"""The page of the evidence: tables and a plot of every run that `evidence.py` left, and what a person reads in them.

What the intervals are is in `clustered.py`. What is written by hand stands in `reading.md` and, of runs that have no
file, in `other.md` beside the runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from clustered import difference as paired
from clustered import rate as rated
from evidence_worlds import ARMS, WORLDS, planned
from rounds_page import section as rounds_in_a_row
from rounds_page import table

from engrain.gate import recovery

Row = Mapping[str, Any]
Runs = dict[str, dict[str, dict[int, Row]]]  # by world, arm, seed

_TITLES = {
    "sums": "Sums that count only as `<answer>12</answer>`",
    "products": 'Products that count only as `{"answer": 12}`',
    "chains": "Chains of three terms that count only as `\\boxed{12}`",
    "helpdesk": "A written prompt: sorting messages",
    "cooking": "TextWorld cooking, prepare and eat a meal",
    "frozenlake": "FrozenLake without its rules",
    "sokoban": "Sokoban without its rules",
}
_WATCHED = ("entropy", "distinct_2", "response_tokens", "leak_rate")
_OURS, _PEER = "opcd-forward_kl", "off_policy"
#: What is compared, each with what a user could take instead.
_PAIRS = (
    *((_OURS, other) for other in ("in-context", _PEER, "sft", "opcd-reverse_kl", "opcd-jsd", "opcd-live")),
    ("opcd-tokens", _PEER),
    (_OURS, "opcd-unfiltered"),
    ("in-context", "in-context-unfiltered"),
    ("opcd-unfiltered", "in-context-unfiltered"),
    *(("cross-size", other) for other in ("in-context-coach", "in-context", _OURS)),
)


def load(folder: Path) -> Runs:
    """All runs that are there."""
    runs: Runs = {}
    for path in sorted(folder.glob("*/*.json")):
        row = json.loads(path.read_text(encoding="utf-8"))
        runs.setdefault(row["world"], {}).setdefault(row["arm"], {})[row["seed"]] = row
    return {world: runs[world] for world in WORLDS if world in runs}


def pooled(rows: Mapping[int, Row], name: str) -> tuple[list[bool], list[Any]]:
    """Outcomes of all seeds, in the seeds' order, and which of them hang together."""
    outcomes: list[bool] = []
    groups: list[Any] = []
    for seed in sorted(rows):
        bits = rows[seed]["test"] if name == "test" else rows[seed]["other"].get(name, "")
        outcomes += [bit == "1" for bit in bits]
        if name == "test" and "groups" in rows[seed]:
            groups += rows[seed]["groups"]
        else:  # every seed is asked the same instructions, and tasks of its own otherwise
            groups += [i if name.startswith("instructions/") else (seed, i) for i in range(len(bits))]
    return outcomes, groups


def measured(rows: Mapping[int, Row]) -> dict[int, Row]:
    """Those runs that came to an end."""
    return {seed: row for seed, row in rows.items() if "test" in row}


def rate(rows: Mapping[int, Row], name: str) -> str:
    outcomes, groups = pooled(rows, name)
    return "{:.2f} [{:.2f}, {:.2f}]".format(*rated(outcomes, groups)) if outcomes else ""


def accuracy(row: Row) -> float:
    return mean(map(int, row["test"]))


def difference(rows: Mapping[int, Row], other: Mapping[int, Row], name: str = "test") -> str:
    """Paired difference on the tasks of the seeds that both have."""
    both = sorted(set(measured(rows)) & set(measured(other)))
    after, groups = pooled({seed: rows[seed] for seed in both}, name)
    before, _ = pooled({seed: other[seed] for seed in both}, name)
    if not both or len(before) != len(after):
        return ""
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*paired(before, after, groups))


def recoveries(arms: Mapping[str, Mapping[int, Row]], name: str) -> dict[int, float]:
    """(distilled - bare) / (in context - bare), by seed."""
    rows = [measured(arms.get(one, {})) for one in ("bare", "in-context", name)]
    both = sorted(set.intersection(*map(set, rows)))
    found = {seed: recovery(*(accuracy(some[seed]) for some in rows)) for seed in both}
    return {seed: value for seed, value in found.items() if value is not None}


def section(title: str, arms: Mapping[str, Mapping[int, Row]]) -> list[str]:
    """One world: what was learned, what it cost elsewhere, and every run that did not end in a student."""
    there = {name: measured(arms[name]) for name in ARMS if measured(arms.get(name, {}))}
    seeds = sorted({seed for rows in there.values() for seed in rows})
    names = sorted({other for rows in there.values() for row in rows.values() for other in row["other"]})
    learned, cost, watched = [], [], []
    for name, rows in there.items():
        marks = [word for word in ("stopped", "forced") if any(row.get(word) for row in rows.values())]
        arm = ARMS[name].title + (f" ({', '.join(marks)})" if marks else "")
        by_seed = " ".join(f"{accuracy(rows[seed]):.2f}" if seed in rows else "–" for seed in seeds)
        tokens = [row["sampled_tokens"] for row in rows.values() if "sampled_tokens" in row]
        steps = " ".join(str(rows[seed].get("best_step") or "–") if seed in rows else "–" for seed in seeds)
        peer = difference(rows, arms.get(_PEER, {})) if name != _PEER else ""
        learned.append(
            (arm, rate(rows, "test"), by_seed, peer, *((f"{mean(tokens):.0f}", steps) if tokens else ("", "")))
        )
        bare = [difference(rows, arms.get("bare", {}), other) if name != "bare" else "" for other in names]
        rates = [rate(rows, other) for other in names]
        cost.append((arm, *(cell for pair in zip(rates, bare, strict=True) for cell in pair)))
        sampled = [row["sampled"] for row in rows.values()]
        watched.append((arm, *(f"{mean(s[key] for s in sampled):.2f}" for key in _WATCHED)))
    lines = [f"## {title}", ""]
    if not there:
        return [*lines, "Nothing was measured yet.", "", *said(arms)]
    lines += [f"Seeds: {', '.join(map(str, seeds))}; 128 test tasks a seed.", ""]
    head = ("student", "test", "by seed", "against off-policy", "tokens sampled", "best step by seed")
    lines += table(head, learned)
    lines += table(("student", *(cell for other in names for cell in (other, "against bare"))), cost)
    lines += table(("student", "entropy", "distinct-2", "length", "leaks"), watched)
    lines += said(arms)
    return lines


def side_by_side(runs: Runs) -> list[str]:
    """What a way gains or loses beside another one."""
    rows = []
    for world, arms in runs.items():
        for name, peer in _PAIRS:
            ours = measured(arms.get(name, {}))
            if both := set(ours) & set(measured(arms.get(peer, {}))):
                asked = sorted({other for seed in both for other in ours[seed]["other"]})
                found = {one: difference(ours, arms[peer], one) for one in ("test", *asked)}
                rows.append((world, ARMS[name].title, ARMS[peer].title, str(len(both)), found))
    if not rows:
        return []
    columns = list(dict.fromkeys(name for *_, found in rows for name in found))
    cells = [(*front, *(found.get(name, "") for name in columns)) for *front, found in rows]
    what = "What the first is better (+) or worse (-) by than the second, paired by task, on the seeds that both have."
    return ["## Side by side", "", what, "", *table(("world", "first", "second", "seeds", *columns), cells)]


def said(arms: Mapping[str, Mapping[int, Row]]) -> list[str]:
    """The texts with their gaps, refusals, failures, and episodes that broke."""
    lines: list[str] = []
    texts: dict[tuple[str | None, int, str], Row] = {}
    ended: dict[tuple[int, str], list[str]] = {}
    for name in ARMS:
        for seed, row in sorted(arms.get(name, {}).items()):
            if "knowledge" in row:
                written = row["knowledge"] == WORLDS[row["world"]].written
                kind = "written" if written else ARMS[name].text
                kind = f"{kind}, read by the larger model" if "teacher" in (ARMS[name].distill or {}) else kind
                texts.setdefault((kind, seed, row["knowledge"]), row["gap"])
            if why := row.get("refused") or row.get("error") or row.get("stopped"):
                ended.setdefault((seed, why), []).append(ARMS[name].title)
            if broken := {**row.get("broken", {}), **({"training": n} if (n := row.get("dropped")) else {})}:
                lines.append(f"- {ARMS[name].title}, seed {seed}: episodes without a reply or with a fault: {broken}")
    slow = []
    for name in ARMS:
        rows = sorted(arms.get(name, {}).items())
        if seeds := [str(seed) for seed, row in rows if row.get("machine", {}).get("dtype") == "float32"]:
            slow.append(f"{ARMS[name].title} (seeds {', '.join(seeds)})")
    lines += [f"- computed in float32, on a processor that has no bfloat16: {'; '.join(slow)}"] if slow else []
    lines += [f"- seed {seed}, {why}: {'; '.join(titles)}" for (seed, why), titles in sorted(ended.items())]
    for (kind, seed, text), gap in texts.items():
        short = text if len(text) <= 300 else text[:300] + " …"
        found = f"{gap['difference']:+.2f} [{gap['low']:+.2f}, {gap['high']:+.2f}], n={gap['n']}"
        verdict = "passed" if gap["low"] > 0 else "refused"
        lines.append(
            f"- text {kind}, seed {seed}, gap on validation {found}, gap test {verdict}: "
            f"`{' / '.join(short.split(chr(10)))}`"
        )
    return [*lines, ""]


def draw(runs: Runs, path: Path) -> None:
    """Test accuracy of every student, with its interval; one panel a world."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in ARMS if any(measured(arms.get(name, {})) for arms in runs.values())]
    runs = {world: arms for world, arms in runs.items() if any(map(measured, arms.values()))}
    figure, axes = plt.subplots(
        1, len(runs), figsize=(3.2 + 2.6 * len(runs), 5.6), dpi=130, sharey=True, layout="constrained", squeeze=False
    )
    for axis, (world, arms) in zip(axes[0], runs.items(), strict=True):
        for place, name in enumerate(names):
            rows = measured(arms.get(name, {}))
            if not rows:
                continue
            middle, low, high = rated(*pooled(rows, "test"))
            colour = "#1f6f8b" if ARMS[name].distill else "#888888"
            axis.errorbar(
                middle, place, xerr=[[middle - low], [high - middle]],
                fmt="o", color=colour, capsize=2,
            )  # fmt: skip
            axis.plot([accuracy(row) for row in rows.values()], [place] * len(rows), "|", color=colour, alpha=0.6)
        axis.set(title=world, xlim=(-0.03, 1.03), xlabel="accuracy on test tasks")
        axis.grid(axis="x", linewidth=0.3)
    axes[0][0].set_yticks(range(len(names)), [ARMS[name].title for name in names], fontsize=7)
    axes[0][0].invert_yaxis()
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


_INTERVALS = """\
Brackets are 95% intervals over all seeds' tasks, and speak of these trained checkpoints on new tasks; the figures by
seed show how far another training may lie from them. Messages from one template of `helpdesk`, and one instruction
asked for every seed, count for what they are worth together (`benchmarks/clustered.py`). Intervals are not corrected
for the number of comparisons. Settings are the demo's, chosen for OPCD with forward KL on sums; nothing was tuned for
the other methods.

All students were trained for 12 steps of 16 episodes, or until the guard stopped them: as many episodes for every
method, not as many tokens. `tokens sampled` counts those, and one student of OPCD ends with the step in which it has
sampled as many as off-policy did. Of checkpoints that are equal on validation the earliest is measured, so a student
that never had a validation task right is that of step 4, in every column.

Replies to the two other sets are cut at 32 tokens: `math/ood`, plain problems of the families that the world does not
have, whose answer counts in any form, and `instructions/test`, a hundred instructions that code checks. A student is
not asked the other worlds' conventions: the bare model has 0.00 on each, so nothing can be lost there; the rounds in a
row below ask for all of them. Cooking has no placebos and no larger model, because its students take
by far the longest to measure. An objective `auto` is none of Engrain's:
[what was measured of it](../numbers.md#objectives)."""


def build(folder: Path) -> dict[str, Any]:
    """Write `evidence.md` and `evidence.png` beside the folder of runs, and return the result as one JSON object."""
    everything = load(folder)
    runs, pilots = parted(everything)
    asked = [world for world in WORLDS if world in runs or not WORLDS[world].extra]
    wanted = [(world, name, seed) for world in asked for name in planned(world) for seed in WORLDS[world].seeds]
    done = [row for world, name, seed in wanted if (row := runs.get(world, {}).get(name, {}).get(seed)) is not None]
    missing = len(wanted) - len(done)
    recovered = {
        world: {name: found for name in ARMS if ARMS[name].distill is not None and (found := recoveries(arms, name))}
        for world, arms in runs.items()
    }
    faults = sum("error" in row for arms in runs.values() for rows in arms.values() for row in rows.values())
    page, rounds = folder.with_suffix(".md"), folder.with_name("rounds.json")
    if everything:
        made = f"Made by `python benchmarks/evidence.py`; each run is a JSON file in `{folder.name}/`."
        lines = ["# Evidence", "", made, ""]
        lines += by_hand(folder / "reading.md")
        count = f"{len(done)} of {len(wanted)} planned runs have been made: "
        count += f"{sum('test' in row for row in done)} measured, "
        count += f"{sum('refused' in row for row in done)} refused by the gap test, {faults} failed"
        rest = " The others wait for the same command." if len(done) < len(wanted) else ""
        lines += [f"{count}.{rest}", "", _INTERVALS, ""]
        if any(measured(rows) for arms in runs.values() for rows in arms.values()):
            draw(runs, folder.with_suffix(".png"))
            lines += [f"![Accuracy of every student]({folder.name}.png)", ""]
        lines += side_by_side(runs)
        for world, arms in runs.items():
            lines += section(_TITLES[world], arms)
        lines += rounds_in_a_row(json.loads(rounds.read_text(encoding="utf-8"))["series"]) if rounds.exists() else []
        for world, arms in pilots.items():
            lines += section(f"{_TITLES[world]}: other seeds", arms)
        lines += by_hand(folder / "other.md")
        page.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    both = [
        (arms[_OURS][seed], arms[_PEER][seed])
        for arms in recovered.values()
        for seed in arms.get(_OURS, {})
        if seed in arms.get(_PEER, {})
    ]
    mine, theirs = (mean(values) for values in zip(*both, strict=True)) if both else (None, None)
    return {
        "name": "evidence",
        "ours": mine,
        "peer": theirs,
        "ratio": mine / theirs if mine is not None and theirs else None,
        "pairs": len(both),
        "target": {"recovery": 0.8},
        "met": mine is not None and mine >= 0.8 and not missing and not faults,
        "missing": missing,
        "faults": faults,
        "mean_recovery": {
            world: {name: round(mean(found.values()), 3) for name, found in arms.items()}
            for world, arms in recovered.items()
            if arms
        },
        "runs": sum(len(rows) for arms in everything.values() for rows in arms.values()),
    }


def by_hand(path: Path) -> list[str]:
    """What a person wrote for the page."""
    return [path.read_text(encoding="utf-8"), ""] if path.exists() else []


def parted(runs: Runs) -> tuple[Runs, Runs]:
    """Runs of the seeds that are asked for, and all others."""
    parts: tuple[Runs, Runs] = {}, {}
    for world, arms in runs.items():
        for name, rows in arms.items():
            for seed, row in rows.items():
                part = parts[seed not in WORLDS[world].seeds]
                part.setdefault(world, {}).setdefault(name, {})[seed] = row
    return parts
