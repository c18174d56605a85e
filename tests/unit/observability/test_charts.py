"""Charts as SVG: where the marks are, which ticks an axis has, and what numbers can be asked for."""

from __future__ import annotations

import json
import math
import re
import xml.dom.minidom

import pytest

from megatron_opdlm.observability.charts import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    line_chart,
    nice_ticks,
    scatter_chart,
    stacked_chart,
)


def parsed(svg: str):
    return xml.dom.minidom.parseString(svg).documentElement


def numbers(svg: str) -> dict:
    return json.loads(parsed(svg).getAttribute("data-chart"))


def paths(svg: str, kind: str) -> list[list[tuple[float, float]]]:
    """The corners of the paths of a kind, without their colour."""
    found = [
        element.getAttribute("d")
        for element in parsed(svg).getElementsByTagName("path")
        if element.getAttribute("class").split()[0] == kind
    ]
    return [[tuple(map(float, point.split())) for point in d[1:].split("L")] for d in found]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 6.9, [0, 2, 4, 6, 8]),
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.81, 0.98, [0.8, 0.85, 0.9, 0.95, 1.0]),
        (-3.0, 4.0, [-4, -2, 0, 2, 4]),
        (0.0, 4.1e-7, [0, 1e-7, 2e-7, 3e-7, 4e-7, 5e-7]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low, high, ticks):
    assert nice_ticks(low, high) == pytest.approx(ticks, abs=1e-12)


@pytest.mark.parametrize("last", [1, 2, 3, 12, 99, 209])
def test_training_steps_have_whole_ticks(last):
    labels = re.findall(r'text-anchor="middle"[^>]*>([\d,.e]+)<', line_chart("Loss", [0, last], [1.0, 2.0]))
    assert len(labels) >= 2
    assert all(label.replace(",", "").isdigit() for label in labels)


def test_a_curve_is_where_its_numbers_are():
    svg = line_chart("Loss", [0, 1, 4], [4.0, 2.0, 0.0])
    quarter = LEFT + (RIGHT - LEFT) / 4
    assert paths(svg, "line") == [[(LEFT, TOP), (quarter, (TOP + BOTTOM) / 2), (RIGHT, BOTTOM)]]
    assert numbers(svg)["curves"] == [{"name": "", "x": [0, 1, 4], "y": [4.0, 2.0, 0.0]}]
    assert parsed(svg).getAttribute("aria-label") == "Loss: from 4 to 0"


def test_a_value_that_is_not_finite_leaves_a_gap():
    svg = line_chart("Loss", [0, 1, 2, 3], [1.0, math.nan, 3.0, 2.0])
    assert [len(path) for path in paths(svg, "line")] == [1, 2]
    assert numbers(svg)["curves"][0]["y"] == [1.0, None, 3.0, 2.0]
    assert paths(line_chart("Loss", [0], [math.nan]), "line") == []


def test_layers_lie_on_top_of_each_other_each_for_its_whole_step():
    svg = stacked_chart("Seconds", [0, 1], {"rollout": [1.0, 3.0], "student": [1.0, 1.0]})
    lower, upper = paths(svg, "area")
    middle, height = (LEFT + RIGHT) / 2, (BOTTOM - TOP) / 4
    assert lower[:4] == [
        (LEFT, BOTTOM - height),
        (middle, BOTTOM - height),
        (middle, TOP + height),
        (RIGHT, TOP + height),
    ]
    assert upper[:4] == [(LEFT, BOTTOM - 2 * height), (middle, BOTTOM - 2 * height), (middle, TOP), (RIGHT, TOP)]
    assert upper[:3:-1] == lower[:4], "the upper one begins where the lower one ends"


def test_points_have_labels_with_text_escaped():
    svg = scatter_chart(
        "Accuracy", {"a<b": [(1.0, 0.5, "x&y"), (2.0, 0.9, "")], "c": [(1.5, 0.7, "z")]}, "speed", "right"
    )
    assert len(parsed(svg).getElementsByTagName("circle")) == 3
    assert "x&amp;y" in svg and "<b" not in svg
    assert [curve["name"] for curve in numbers(svg)["curves"]] == ["a<b", "c"]


def test_long_curves_are_thinned_to_their_first_and_last_points_and_some_between():
    curve = numbers(line_chart("Loss", range(10_000), [float(step) for step in range(10_000)]))["curves"][0]
    assert curve["x"] == curve["y"]
    assert curve["x"][0] == 0 and curve["x"][-1] == 9999 and 500 < len(curve["x"]) <= 1000
