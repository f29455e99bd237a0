"""What the site takes from the program itself: one page a command, and every number out of docs/results.

In a page `{{demo.distilled.accuracy:.2f}}` is a value of docs/results/demo.json in a Python format,
`{{rate demo.bare}}` a rate with its interval and count, `{{minutes recovery}}` the time of all its runs, and
`{{table NAME}}` one of the tables below. What is not there stops the build.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import typer.cli
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from engrain.cli import COMMANDS, app
from engrain.gate import wilson

RESULTS = Path(__file__).parent / "results"
_HOLE = re.compile(r"\{\{(?:(rate|table|minutes) )?([\w.]+)(:[^}]*)?\}\}")


# -- the command line ---------------------------------------------------------------------------------------------


def command_page(name: str) -> str:
    """The page of one command and all its subcommands, from the same words as `engrain NAME --help`."""
    group: Any = typer.main.get_group(app)
    root = group.context_class(group, info_name="engrain")
    command = group.get_command(root, name)
    context = group.context_class(command, info_name=name, parent=root)
    page = typer.cli.get_docs_for_click(obj=command, ctx=context, call_prefix="engrain", name=name)
    return page.replace("\\[", "[")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the commands in the menu."""
    for entry in config.nav or []:
        if "Command line" in entry:
            entry["Command line"] = [{f"engrain {name}": f"cli/{name}.md"} for name in COMMANDS]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the commands' pages."""
    for name in COMMANDS:
        files.append(File.generated(config, f"cli/{name}.md", content=command_page(name)))
    return files


def on_post_build(config: MkDocsConfig) -> None:
    """Take out the addresses from which the theme's script would fetch what diagrams and old browsers need."""
    for script in Path(config.site_dir, "assets", "javascripts").glob("bundle.*.js"):
        script.write_text(script.read_text(encoding="utf-8").replace("https://unpkg.com/", ""), encoding="utf-8")


# -- numbers ------------------------------------------------------------------------------------------------------


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in the numbers."""
    try:
        return _HOLE.sub(_filled, markdown)
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise PluginError(f"{page.file.src_uri}: a number is not in docs/results: {error!r}") from error


def _filled(hole: re.Match[str]) -> str:
    kind, path, style = hole.groups()
    if kind == "table":
        return TABLES[path]()
    found = _value(path)
    if kind == "minutes":
        return f"{sum(row['seconds'] for row in found['rows']) / 60:.0f}"
    return _rate(found) if kind == "rate" else format(found, (style or ":")[1:])


@cache
def _results(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _value(path: str) -> Any:
    name, *keys = path.split(".")
    found = _results(name)
    for key in keys:
        found = found[int(key)] if isinstance(found, list) else found[key]
    return found


def _rate(found: Mapping[str, Any]) -> str:
    return f"{found['accuracy']:.2f} [{found['low']:.2f}, {found['high']:.2f}] (n={found['n']})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = (head, ["---"] * len(head), *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _round(name: str) -> str:
    found = _results(name)
    rows = [
        (f"{found['world']['env']}/test", title, _rate(found[key]))
        for key, title in (("bare", "bare"), ("in_context", "knowledge in context"), ("distilled", "distilled"))
    ]
    for world, moments in found["ood_worlds"].items():
        for key, title in (("before", "bare"), ("in_context", "knowledge in context"), ("after", "distilled")):
            rows.append((f"{world}, not trained on", title, _rate(moments[key])))
    return _table(("tasks", "student", "accuracy, 95% interval"), rows)


def _recovery() -> str:
    found = _results("recovery")
    rows: list[tuple[str, str, str]] = []
    played = {method: [row for row in found["rows"] if row["method"] == method] for method in found["mean_recovery"]}
    first = next(iter(played.values()))
    shown = [("bare", first, "bare", "ood_before"), ("knowledge in context", first, "in_context", "ood_in_context")]
    shown += [(method, seeds, "distilled", "ood_after") for method, seeds in played.items()]
    for title, seeds, key, other in shown:
        rows.append((title, _pooled(seeds, key), _pooled(seeds, other)))
    return _table(("method and objective", "held-out sums", "related problems"), rows)


def _crossing() -> str:
    """Forward KL against the objective that crosses over to reverse KL, by world."""
    rows: list[tuple[str, str, str, str, str]] = []
    for name, crossing in (("recovery", "auto"), ("recovery_products", "crossing"), ("recovery_chains", "crossing")):
        found = _results(name)
        for method, title in (("opcd:forward_kl", "forward KL"), (f"opcd:{crossing}", "crossing")):
            seeds = [row for row in found["rows"] if row["method"] == method]
            each = " ".join(f"{row['distilled']['accuracy']:.2f}" for row in seeds)
            rows.append((found["world"], title, _pooled(seeds, "distilled"), each, _pooled(seeds, "ood_after")))
    return _table(("world", "objective", "held-out tasks", "by seed", "related problems"), rows)


def _pooled(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    """One rate over all seeds, from each one's accuracy and count."""
    outcomes: list[bool] = []
    for rate in (row[key] for row in rows):
        solved = round(rate["accuracy"] * rate["n"])
        outcomes += [True] * solved + [False] * (rate["n"] - solved)
    return _rate(wilson(outcomes).model_dump())


def _step() -> str:
    gib = 2**30
    rows = [
        (
            str(row["knowledge_tokens"]),
            f"{row['ours']['seconds']:.1f} s",
            f"{row['peer']['seconds']:.1f} s",
            f"{row['faster']:.1f}x",
            f"{row['ours']['rise_bytes'] / gib:.2f} GiB",
            f"{row['peer']['rise_bytes'] / gib:.2f} GiB",
            f"{row['loss_difference']:.1%}",
        )
        for row in _results("opcd_step")["rows"]
    ]
    head = ("knowledge tokens", "Engrain", "TRL", "faster", "memory, Engrain", "memory, TRL", "losses differ by")
    return _table(head, rows)


def _files() -> str:
    """Every file of results, so that none is without a place here."""
    rows = []
    for path in sorted(RESULTS.glob("*.json")):
        found = json.loads(path.read_text())
        machine = found.get("machine", {}) if isinstance(found, dict) else {}
        made = found.get("command") if isinstance(found, dict) else None
        made = made or COMMANDS_OF.get(path.stem, "not noted in the file")
        where = f"{machine.get('processor', '?')}, {machine.get('cores', '?')} cores" if machine else "not noted"
        rows.append((f"[`{path.name}`](results/{path.name})", f"`{made}`" if " " in made else made, where))
    return _table(("file", "made by", "machine"), rows)


#: For files that do not name their command.
COMMANDS_OF = {
    "demo": "engrain improve --demo",
    "demo_reverse_kl": "engrain improve --demo --objective reverse_kl",
    "divergence": "python benchmarks/divergence.py --naive-positions 2048 --repeats 1",
    "extraction": "python benchmarks/extraction.py",
    "opcd_step": "python benchmarks/opcd_step.py --repeats 2 --modes full_logits",
    "opcd_step_topk": "python benchmarks/opcd_step.py --repeats 2 --knowledge 512 2048 --modes topk_logits",
    "recovery": "python benchmarks/recovery.py",
    "recovery_chains": "python benchmarks/recovery.py --world chains --methods opcd:forward_kl opcd:crossing",
    "recovery_products": "python benchmarks/recovery.py --world products --methods opcd:forward_kl opcd:crossing",
    "rollout": "python benchmarks/rollout.py",
    "rounds": "python benchmarks/rounds.py --ungated --json docs/results/rounds.json --png docs/results/rounds.png",
    "sampling": "python benchmarks/sampling.py --models smollm2-135m --repeats 3",
    "scaling": "python benchmarks/scaling.py",
    "store": "python benchmarks/store.py",
    "ui": "python benchmarks/ui.py",
}

TABLES = {
    "demo": lambda: _round("demo"),
    "reverse": lambda: _round("demo_reverse_kl"),
    "recovery": _recovery,
    "crossing": _crossing,
    "opcd_step": _step,
    "files": _files,
}
