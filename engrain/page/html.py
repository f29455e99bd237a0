"""A round's page as one HTML file: no script, no address, nothing fetched, and every text of a model or world escaped.

A content security policy stands in the file itself and allows one thing, its own style sheet by its digest. Should a
text ever get past the escaping, no browser would run or fetch anything for it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from engrain import svg
from engrain.gate import Rate
from engrain.page.facts import ReportPage
from engrain.page.words import counted, gained, options, rated
from engrain.terminal import printable
from envs.errors import UsageError

_HERE = Path(__file__).parent
_STUDENTS = {
    "bare": "bare",
    "in_context": "knowledge in context",
    "distilled": "distilled, nothing in context",
}


def render(page: ReportPage) -> str:
    """The whole file."""
    styles = (_HERE / "report.css").read_text(encoding="utf-8") + svg.CSS
    digest = base64.b64encode(hashlib.sha256(styles.encode()).digest()).decode()
    template = _environment().get_template("report.html")
    return template.render(
        page=page,
        styles=Markup(styles),  # noqa: S704 - our own files
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        charts=_charts(page),
        settings=json.dumps(page.settings, indent=2, ensure_ascii=False, default=str),
    )


def default_name(page: ReportPage) -> Path:
    """The file's usual name, in the current folder."""
    return Path(f"engrain-round-{page.number}.html")


def check_free(path: Path, *, force: bool) -> None:
    """Refuse a place where nothing can or shall be written, before any work is done.

    Raises:
        UsageError: a folder, or a file that is there already and `force` is not set.
    """
    if path.is_dir():
        raise UsageError(f"--out {path} is a folder; name a file in it")
    if path.exists() and not force:
        raise UsageError(f"{path} is there already; pass --force to replace it, or --out FILE")


def write(text: str, path: Path, *, force: bool) -> None:
    """Write the file whole or not at all.

    Raises:
        UsageError: it appeared meanwhile and `force` is not set, or its folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(prefix=f".{path.name[:80]}.", dir=path.parent)
    except OSError as error:
        raise UsageError(f"--out {path} cannot be written: {error.strerror}; name another file") from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(draft).chmod(0o666 & ~_umask())
        check_free(path, force=force)
        Path(draft).replace(path)
    finally:
        Path(draft).unlink(missing_ok=True)


def shown(value: Any) -> Any:
    """Text without control characters, such as those that turn the direction of writing; other values as they are."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else printable(value)


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "counted": counted,
        "gained": gained,
        "rated": rated,
        "options": options,
        "student": lambda name: _STUDENTS.get(name, name),
        "percent": lambda value: f"{value:.0%}",
        "points": lambda value: f"{100 * value:+.0f}",
        "thousands": lambda value: f"{value:,}",
        "short": lambda value: str(value)[:10],
        "minute": lambda value: f"{value:%Y-%m-%d %H:%M} UTC",
        "duration": duration,
    }
    return environment


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, _ = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _charts(page: ReportPage) -> dict[str, Markup]:
    """The pictures that this page has something to show in."""
    found = {}
    if page.measured:
        rows = [_estimate(_STUDENTS.get(row.student, row.student), row.rate) for row in page.measured]
        found["test"] = svg.estimates(
            rows, title="Accuracy on test tasks, 95% intervals", x_label="accuracy", x_range=(0, 1)
        )
    training = page.training
    if training is not None and training.validation:
        points = [
            svg.Point(step, rate.accuracy, rate.low, rate.high) for step, rate in sorted(training.validation.items())
        ]
        found["validation"] = svg.curve(
            [svg.Series("validation, bare", points)],
            title="Accuracy on validation tasks by training step, 95% intervals",
            x_label="training step",
            y_label="accuracy on validation tasks",
            y_range=(0, 1),
        )
    if training is not None and training.divergence:
        lines = [
            svg.Series(name, [svg.Point(step, value) for step, value in sorted(values.items())])
            for name, values in (("divergence", training.divergence), ("student's entropy", training.entropy))
        ]
        found["divergence"] = svg.curve(
            lines,
            title="Divergence to the teacher and entropy by training step",
            y_range=(0, 1.05 * max([1e-3, *training.divergence.values(), *training.entropy.values()])),
            x_label="training step",
            y_label="nats a token",
        )
    if len(page.rounds) > 1:
        found["rounds"] = svg.curve(
            [
                svg.Series(
                    name.replace("_", " "),
                    [
                        svg.Point(row.number, rate.accuracy, rate.low, rate.high)
                        for row in page.rounds
                        if (rate := row.scores.get(name))
                    ],
                )
                for name in _STUDENTS
            ],
            title="Accuracy on test tasks by round, 95% intervals",
            x_label="round",
            y_label="accuracy on test tasks",
            y_range=(0, 1),
        )
    rows = [
        svg.Estimate(item.text, item.effect, item.low, item.high)
        for item in page.items
        if item.effect is not None and item.low is not None and item.high is not None
    ]
    if rows:
        found["effects"] = svg.estimates(
            rows, title="Effect of each item on accuracy, 95% intervals", x_label="change of accuracy", mark=0
        )
    return found


def _estimate(label: str, rate: Rate) -> svg.Estimate:
    return svg.Estimate(label, rate.accuracy, rate.low, rate.high)


def _umask() -> int:
    """The mode bits that a new file does not get here."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
