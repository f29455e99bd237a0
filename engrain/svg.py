"""Charts as inline SVG: curves with 95% intervals, and rows of estimates with theirs.

What comes out stands in a page as it is: no script, no style attribute, no address, every text escaped. Colours are
classes, so that the page's `CSS` decides them, in the light and in the dark; series differ in shape and dash besides,
so that print in grey and eyes that tell no colours apart read them too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from markupsafe import Markup

_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 12.0, 12.0, 42.0  # margins around the plot, in pixels
_ROW = 26.0  # height of a row of estimates
_TICKS = 5
_SHAPES = 4

#: What a page needs for these charts; put it into its style sheet.
CSS = """
.chart { --s0: #1f6f8b; --s1: #b45f06; --s2: #6b6b6b; --s3: #8e3b6e; max-width: 100%; height: auto; }
.chart text { fill: currentColor; font: 12px system-ui, sans-serif; }
.chart .grid { stroke: currentColor; stroke-opacity: .15; }
.chart .mark { stroke: currentColor; stroke-opacity: .6; stroke-dasharray: 3 3; }
.chart .line { fill: none; stroke-width: 2; }
.chart .band { fill-opacity: .15; stroke: none; }
.chart .reach { stroke-width: 1.5; }
.chart .s0 { stroke: var(--s0); fill: var(--s0); }
.chart .s1 { stroke: var(--s1); fill: var(--s1); }
.chart .s2 { stroke: var(--s2); fill: var(--s2); }
.chart .s3 { stroke: var(--s3); fill: var(--s3); }
.chart .line.s1 { stroke-dasharray: 7 3; }
.chart .line.s2 { stroke-dasharray: 2 3; }
.chart .line.s3 { stroke-dasharray: 9 3 2 3; }
.chart .line { fill: none; }
@media screen and (prefers-color-scheme: dark) {
  .chart { --s0: #63b9d6; --s1: #f0a04b; --s2: #b0b0b0; --s3: #d78cbb; }
}
"""


@dataclass(frozen=True)
class Point:
    """A value at `x`, with its interval where there is one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points under one name, in the order of `x`."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Estimate:
    """One row of `estimates`: a value with its interval."""

    label: str
    value: float
    low: float
    high: float


def curve(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    whole: bool = True,
    width: int = 640,
    height: int = 300,
) -> Markup:
    """Lines with markers, a whisker at each point that has an interval, and a legend.

    Points that are not finite are left out; so are series without any. With nothing to draw the frame says so.

    Args:
        series: at most as many as tell apart; from the fifth on the looks repeat.
        title: what a screen reader says.
        x_label: under the axis.
        y_label: above the axis.
        y_range: ends of the axis; by default what the points and their intervals span.
        whole: whether `x` counts something, so that the axis has whole numbers only.
        width: in pixels of the drawing; the page may show it smaller.
        height: the same.
    """
    drawn = [(place, one.name, kept) for place, one in enumerate(series) if (kept := _finite(one.points))]
    legend = 22.0 if len(drawn) > 1 else 0.0
    root = _root(title, width, height)
    left, right, top, bottom = _LEFT, width - _RIGHT, _TOP + legend + 16, height - _BOTTOM
    _text(root, 8, top - 8, y_label)
    _text(root, (left + right) / 2, height - 8, x_label, anchor="middle")
    if not drawn:
        _text(root, (left + right) / 2, (top + bottom) / 2, "nothing measured yet", anchor="middle")
        return _markup(root)
    points = [point for _, _, kept in drawn for point in kept]
    x_low, x_high = _span([point.x for point in points])
    y_low, y_high = y_range or _span([v for p in points for v in (p.y, p.low, p.high) if v is not None])

    def at(x: float, y: float) -> tuple[float, float]:
        """Pixels of a point; what lies beyond the axis stands on its end."""
        share = min(1.0, max(0.0, (y - y_low) / (y_high - y_low)))
        return left + (x - x_low) / (x_high - x_low) * (right - left), bottom - share * (bottom - top)

    for tick in ticks(y_low, y_high):
        _line(root, (left, at(x_low, tick)[1]), (right, at(x_low, tick)[1]), "grid")
        _text(root, left - 6, at(x_low, tick)[1] + 4, _number(tick), anchor="end")
    for tick in ticks(x_low, x_high, whole=whole):
        _text(root, at(tick, y_low)[0], bottom + 16, _number(tick), anchor="middle")
    across = left
    for place, name, kept in drawn:
        look = f"s{place % _SHAPES}"
        for p in kept:
            if p.low is not None and p.high is not None:
                _line(root, at(p.x, p.low), at(p.x, p.high), f"reach {look}")
        if len(kept) > 1:
            path = " ".join(",".join(map(_pixel, at(p.x, p.y))) for p in kept)
            ElementTree.SubElement(root, "polyline", {"class": f"line {look}", "points": path})
        for p in kept:
            _marker(root, *at(p.x, p.y), place, _said(name, p))
        if legend:
            _marker(root, across + 6, _TOP + 6, place, "")
            _text(root, across + 16, _TOP + 10, name)
            across += 34 + 7 * len(name)
    return _markup(root)


def estimates(
    rows: Sequence[Estimate],
    *,
    title: str,
    x_label: str,
    x_range: tuple[float, float] | None = None,
    mark: float | None = None,
    width: int = 640,
) -> Markup:
    """One row an estimate: a dot with its interval, in the order given.

    Args:
        rows: what is drawn; those that are not finite are left out.
        title: what a screen reader says.
        x_label: under the axis.
        x_range: ends of the axis; by default what the rows span, with `mark`.
        mark: a value of interest, such as no effect: a dashed line.
        width: in pixels of the drawing.
    """
    kept = [row for row in rows if all(map(math.isfinite, (row.value, row.low, row.high)))]
    labels = min(0.45 * width, 16 + 7 * max((len(row.label) for row in kept), default=0))
    height = _TOP + _ROW * max(1, len(kept)) + _BOTTOM
    root = _root(title, width, round(height))
    left, right, bottom = labels, width - _RIGHT, height - _BOTTOM
    _text(root, (left + right) / 2, height - 8, x_label, anchor="middle")
    if not kept:
        _text(root, (left + right) / 2, bottom - 8, "nothing measured yet", anchor="middle")
        return _markup(root)
    also = [] if mark is None else [mark]
    low, high = x_range or _span([value for row in kept for value in (row.low, row.high, row.value)] + also)

    def at(x: float) -> float:
        return left + min(1.0, max(0.0, (x - low) / (high - low))) * (right - left)

    for tick in ticks(low, high):
        _line(root, (at(tick), _TOP), (at(tick), bottom), "grid")
        _text(root, at(tick), bottom + 16, _number(tick), anchor="middle")
    if mark is not None and low <= mark <= high:
        _line(root, (at(mark), _TOP), (at(mark), bottom), "mark")
    room = max(4, int((labels - 16) / 7))
    for place, row in enumerate(kept):
        y = _TOP + _ROW * (place + 0.5)
        _text(root, 4, y + 4, row.label if len(row.label) <= room else row.label[: room - 1] + "…")
        _line(root, (at(row.low), y), (at(row.high), y), "reach s0")
        _marker(root, at(row.value), y, 0, f"{row.label}: {_reached(row.value, row.low, row.high)}")
    return _markup(root)


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Round numbers from `low` to `high`, about five of them: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    if whole:
        step = max(1.0, step)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _finite(points: Sequence[Point]) -> list[Point]:
    """Points that can be drawn; an interval that cannot is left out."""
    return [
        p if all(v is not None and math.isfinite(v) for v in (p.low, p.high)) else Point(p.x, p.y)
        for p in points
        if math.isfinite(p.x) and math.isfinite(p.y)
    ]


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis that holds these values; never of no length."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(1.0, abs(low), abs(high)):
        room = max(0.5, 1e-6 * abs(low))
        return low - room, high + room
    return low, high


def _root(title: str, width: int, height: int) -> ElementTree.Element:
    size = {"viewBox": f"0 0 {width} {height}", "width": str(width), "height": str(height)}
    root = ElementTree.Element("svg", {"class": "chart", "role": "img", **size})
    ElementTree.SubElement(root, "title").text = _clean(title)
    return root


def _text(root: ElementTree.Element, x: float, y: float, text: str, *, anchor: str = "start") -> None:
    place = {"x": _pixel(x), "y": _pixel(y), "text-anchor": anchor}
    ElementTree.SubElement(root, "text", place).text = _clean(text)


def _line(root: ElementTree.Element, start: tuple[float, float], end: tuple[float, float], look: str) -> None:
    ends = {name: _pixel(v) for name, v in zip(("x1", "y1", "x2", "y2"), (*start, *end), strict=True)}
    ElementTree.SubElement(root, "line", {"class": look, **ends})


def _marker(root: ElementTree.Element, x: float, y: float, place: int, said: str) -> None:
    """A small shape of the series' own; `said` shows when the pointer rests on it."""
    look = {"class": f"s{place % _SHAPES}"}
    if place % _SHAPES == 0:
        shape = ElementTree.SubElement(root, "circle", {**look, "cx": _pixel(x), "cy": _pixel(y), "r": "4"})
    else:
        path = " ".join(f"{_pixel(x + dx)},{_pixel(y + dy)}" for dx, dy in _corners(place % _SHAPES))
        shape = ElementTree.SubElement(root, "polygon", {**look, "points": path})
    if said:
        ElementTree.SubElement(shape, "title").text = _clean(said)


def _corners(shape: int) -> Iterator[tuple[float, float]]:
    """A square, a triangle, a diamond."""
    corners = {
        1: ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        2: ((-5, 4), (5, 4), (0, -5)),
        3: ((0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)),
    }
    yield from corners[shape]


def _said(name: str, point: Point) -> str:
    value = _number(point.y)
    if point.low is not None and point.high is not None:
        value = _reached(point.y, point.low, point.high)
    return f"{name}, {_number(point.x)}: {value}"


def _reached(value: float, low: float, high: float) -> str:
    return f"{_number(value)} [{_number(low)}, {_number(high)}]"


def _number(value: float) -> str:
    return f"{value + 0.0:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _pixel(value: float) -> str:
    return f"{value:.1f}"


def _clean(text: str) -> str:
    """Text without control characters and lone surrogates, which no page may hold."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def _markup(root: ElementTree.Element) -> Markup:
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # noqa: S704 - ElementTree escaped every text
