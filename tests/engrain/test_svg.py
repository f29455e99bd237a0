"""Charts: what is drawn, where, and that no text of a stranger becomes markup."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from engrain.svg import CSS, Estimate, Point, Series, curve, estimates, ticks

HOSTILE = '</svg><script>alert(1)</script>" onload="x\x00\ud800'


def drawn(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def labels(svg: str) -> list[str]:
    return [element.text or "" for element in drawn(svg).iter("text")]


def test_a_curve_draws_each_point_with_its_interval_and_names_its_series() -> None:
    bare = Series("bare", [Point(1, 0.1, 0.0, 0.3), Point(2, 0.2, 0.1, 0.4)])
    distilled = Series("distilled", [Point(1, 0.7), Point(2, 0.9)])

    svg = curve([bare, distilled], title="Rounds", x_label="round", y_label="accuracy", y_range=(0, 1))

    assert isinstance(svg, Markup)
    root = drawn(svg)
    assert len(list(root.iter("polyline"))) == 2
    assert len(list(root.iter("circle"))) == 2 + 1  # one of them in the legend
    reaches = [line for line in root.iter("line") if line.get("class") == "reach s0"]
    assert len(reaches) == 2
    assert {"bare", "distilled", "round", "accuracy", "1", "2"} <= set(labels(svg))
    assert "bare, 2: 0.2 [0.1, 0.4]" in [title.text for title in root.iter("title")]


def test_higher_values_stand_higher_and_what_is_beyond_the_axis_stands_on_its_end() -> None:
    svg = curve(
        [Series("a", [Point(0, 0.2), Point(1, 0.8), Point(2, 7.0)])],
        title="",
        x_label="",
        y_label="",
        y_range=(0, 1),
        height=300,
    )

    low, high, beyond = (float(circle.get("cy", "")) for circle in drawn(svg).iter("circle"))
    assert beyond < high < low
    assert beyond == pytest.approx(28)  # the plot's upper end


def test_estimates_stand_in_rows_with_a_line_at_no_effect() -> None:
    rows = [Estimate("knock first", 0.2, 0.1, 0.3), Estimate("run", -0.1, -0.2, 0.05)]

    root = drawn(svg := estimates(rows, title="Effects", x_label="accuracy", mark=0))

    first, second = root.iter("circle")
    assert float(first.get("cx", "")) > float(second.get("cx", ""))
    assert float(first.get("cy", "")) < float(second.get("cy", ""))
    assert len([line for line in root.iter("line") if line.get("class") == "mark"]) == 1
    assert "knock first" in labels(svg)


@pytest.mark.parametrize("points", [[], [Point(math.nan, 1)], [Point(1, math.inf)]])
def test_with_nothing_to_draw_the_frame_says_so(points: list[Point]) -> None:
    assert "nothing measured yet" in curve([Series("a", points)], title="t", x_label="x", y_label="y")
    assert "nothing measured yet" in estimates([], title="t", x_label="x")


def test_hostile_names_are_text() -> None:
    svg = curve(
        [Series(HOSTILE, [Point(0, 1)]), Series("b", [Point(0, 2)])], title=HOSTILE, x_label=HOSTILE, y_label=""
    )
    svg += estimates([Estimate(HOSTILE, 0, -1, 1)], title=HOSTILE, x_label="")

    assert "<script" not in svg
    svg.encode()  # no lone surrogates
    root = drawn(f"<x>{svg}</x>")
    assert not {name for element in root.iter() for name in element.attrib if name.startswith("on") or name == "style"}
    assert {element.tag for element in root.iter()} <= {"x", "svg", "title", "text", "line", "circle", "polygon"}


def test_the_style_sheet_asks_nobody_for_anything() -> None:
    assert "url(" not in CSS
    assert "@import" not in CSS


def test_whole_numbers_on_an_axis_that_counts() -> None:
    assert ticks(1, 3, whole=True) == [1, 2, 3]
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])


finite = st.floats(-1e9, 1e9)


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=6))
def test_any_finite_points_are_drawn_within_the_picture(points: list[tuple[float, float]]) -> None:
    svg = curve([Series("a", [Point(x, y, y, y) for x, y in points])], title="t", x_label="x", y_label="y")

    circles = list(drawn(svg).iter("circle"))
    assert len(circles) == len(points)
    for circle in circles:
        assert -1 <= float(circle.get("cx", "")) <= 641
        assert -1 <= float(circle.get("cy", "")) <= 301
    assert len(labels(svg)) < 40
