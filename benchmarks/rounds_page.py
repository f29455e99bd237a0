"""How series of rounds look, from the rows that `rounds.py` leaves: the table of the evidence page, and the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from clustered import Interval, difference, rate

Row = Mapping[str, Any]  # one round; round 0 is the base model
Series = Mapping[str, Any]  # {"gated": bool, "seed": int, "rounds": rows}

_TITLES = {False: "Without the gate: every trained checkpoint is taken on", True: "With the gate"}
_WATCHED = {"entropy": "entropy", "distinct_2": "distinct-2", "response_tokens": "length", "leak_rate": "leaks"}
_COLOURS = {
    "sums": "#1f6f8b",
    "products": "#d1495b",
    "chains": "#e9a03b",
    "differences": "#6a4c93",
    "plain": "#555555",
    "instructions": "#3a7d44",
}
_ABOUT = """\
Six rounds, each from twelve played tasks of one family to a text and, where the text helps on validation tasks, to OPCD
with forward KL for 8 steps; a round goes on from the weights of the last. One that finds no text that helps trains
nothing, and its row is of the same weights as the row above. After each, the same questions: 48 test tasks of each of
four families, 48 plain problems whose answer counts in any form, a hundred instructions, 40 replies at temperature 1.
`python benchmarks/rounds.py --ungated` makes them without the gate, `python benchmarks/rounds.py` with it; `--json`
writes [`rounds.json`](rounds.json), `--png` the picture.

![Accuracy and the collapse monitor after every round](rounds.png)"""


def pooled(rows: Mapping[int, Row], worlds: Sequence[str]) -> tuple[list[bool], list[Any]]:
    """Outcomes of all seeds on some worlds, and which of them hang together: one instruction, asked for every seed."""
    outcomes: list[bool] = []
    groups: list[Any] = []
    for seed, row in sorted(rows.items()):
        for world in worlds:
            bits = row["probe"][world]
            outcomes += [bit == "1" for bit in bits]
            groups += [(world, i if world == "instructions" else (seed, i)) for i in range(len(bits))]
    return outcomes, groups


def by_round(series: Sequence[Series], *, gated: bool) -> list[dict[int, Row]]:
    """Rows by seed, for each round that any seed has come to."""
    found: dict[int, dict[int, Row]] = {}
    for one in series:
        if one["gated"] is gated:
            for row in one["rounds"]:
                found.setdefault(row["round"], {})[one["seed"]] = row
    return [found[number] for number in sorted(found)]


def accuracy(rows: Mapping[int, Row], worlds: Sequence[str]) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*rate(*pooled(rows, worlds))) if worlds else ""


def families(rounds: Sequence[Mapping[int, Row]]) -> list[str]:
    """The family of each round; none for the base model."""
    return [next((row["family"] for row in rows.values() if "family" in row), "") for rows in rounds]


def change(rounds: Sequence[Mapping[int, Row]], world: str) -> Interval:
    """The last round against the base model, paired by task, on the seeds that both have."""
    both = {seed: rounds[0][seed] for seed in rounds[-1]}
    before, groups = pooled(both, [world])
    return difference(before, pooled(rounds[-1], [world])[0], groups)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, and an empty one after it."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)] + [""]


def section(series: Sequence[Series]) -> list[str]:
    """What is learned, forgotten and lost over rounds, one table with the gate and one without."""
    lines = ["## Rounds in a row", "", *_ABOUT.split("\n"), ""]
    for gated, title in _TITLES.items():
        rounds = by_round(series, gated=gated)
        if not rounds:
            continue
        met = families(rounds)
        lines += [f"### {title}", "", f"Seeds: {', '.join(map(str, sorted(rounds[0])))}.", ""]
        head = ["round", "family", "taken on", "this family", "families before", "plain", "instructions"]
        cells = []
        for number, rows in enumerate(rounds):
            family = met[number]
            before = [name for name in dict.fromkeys(met[1:number]) if name != family]
            taken = f"{sum(row['taken'] for row in rows.values())} of {len(rows)}" if family else ""
            known = [accuracy(rows, [family] if family else []), accuracy(rows, before)]
            other = [accuracy(rows, [name]) for name in ("plain", "instructions")]
            seen = [f"{mean(row['probe']['sampled'][key] for row in rows.values()):.2f}" for key in _WATCHED]
            cells.append([str(number), family or "(the base model)", taken, *known, *other, *seen])
        lines += table([*head, *_WATCHED.values()], cells)
        changed = ["{} {:+.2f} [{:+.2f}, {:+.2f}]".format(name, *change(rounds, name)) for name in _COLOURS]
        lines += [f"Round {len(rounds) - 1} against the base model, paired by task: {', '.join(changed)}.", ""]
    return lines


def draw(series: Sequence[Series], path: Path) -> None:
    """Accuracy after each round over all seeds, and the collapse monitor below; with the gate and without."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    columns = {gated: rounds for gated in _TITLES if (rounds := by_round(series, gated=gated))}
    figure, grid = plt.subplots(
        2, len(columns), figsize=(6.4 * len(columns), 6.4), dpi=130, layout="constrained", sharex=True, squeeze=False,
        height_ratios=(3, 2),
    )  # fmt: skip
    for column, (gated, rounds) in enumerate(columns.items()):
        top, bottom = grid[0][column], grid[1][column]
        x = range(len(rounds))
        for world, colour in _COLOURS.items():
            found = [rate(*pooled(rows, [world])) for rows in rounds]
            errors = [[p - low for p, low, _ in found], [high - p for p, _, high in found]]
            style = "--" if world in ("plain", "instructions") else "-"
            top.errorbar(
                x, [p for p, *_ in found], yerr=errors, fmt=f"o{style}", capsize=2, color=colour, linewidth=1.4,
                label=world,
            )  # fmt: skip
        for number, family in enumerate(families(rounds)):
            if family:
                taken = sum(row["taken"] for row in rounds[number].values())
                top.annotate(
                    f"{family}\n{taken} of {len(rounds[number])} taken", (number, 1.12), ha="center", fontsize=7
                )
        top.set(ylim=(-0.04, 1.3), ylabel="accuracy, nothing in context" if column == 0 else "")
        top.set_yticks([0, 0.25, 0.5, 0.75, 1])
        top.legend(frameon=False, fontsize=7, ncols=len(_COLOURS), loc="upper center", bbox_to_anchor=(0.5, -0.03))
        top.set_title(_TITLES[gated], loc="left", fontsize=10)
        for key, label in _WATCHED.items():
            values = [mean(row["probe"]["sampled"][key] for row in rows.values()) for rows in rounds]
            if key == "leak_rate":
                bottom.plot(x, values, "x:", label="cites its experience, share")
            elif values[0]:
                relative = [value / values[0] for value in values]
                bottom.plot(x, relative, "o-", linewidth=1.2, markersize=3, label=f"{label}, base model = 1")
        bottom.set(xlabel="round", ylabel="at temperature 1" if column == 0 else "", ylim=(-0.05, None))
        bottom.legend(frameon=False, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
