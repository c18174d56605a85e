"""Charts as inline SVG that takes all of its colours from the page's style sheet, and can be read out by its script.

    line_chart("Loss", [0, 1, 2], [0.9, 0.5, 0.4])                             # '<svg class="chart" role="img" ...'
    stacked_chart("Seconds", [0, 1], {"rollout": [2.0, 2.1], "teacher": [0.5, 0.5]})
    scatter_chart("Accuracy", {"blocks of 4": [(1.0, 0.89, "0.9")]}, "tokens per step", "accuracy")

The numbers stand in `data-chart` as they were given, so that a pointer can ask for them; the script draws no curve.
Curves of more than `MOST_POINTS` are thinned out evenly, the first and the last point stay.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 380, 210
LEFT, TOP, RIGHT, BOTTOM = 46.0, 12.0, 370.0, 174.0
"""The frame of the plot, in units of the SVG."""
FEW_POINTS = 30
"""A curve of at most so many has a dot at each."""
MOST_POINTS = 800
NUM_CURVE_COLORS = 9
"""The style sheet has so many; more curves begin anew."""
Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""x and y of each curve by its name."""


@dataclass(frozen=True)
class Axis:
    """A linear axis."""

    low: float
    high: float
    ticks: list[float]
    label: str = ""

    def share(self, value: float) -> float:
        """Where on the axis the value is: 0 at its low end, 1 at its high end."""
        return (value - self.low) / (self.high - self.low)


def line_chart(name: str, steps: Sequence[int], values: Sequence[float]) -> str:
    """One curve over training steps; a value of NaN leaves a gap."""
    steps, (values,) = _thinned(steps, [values])
    x, y = _step_axis(steps[0], steps[-1]), _value_axis(values)
    runs = _runs(steps, values)
    marks = [_path("line", 0, run, x, y) for run in runs]
    marks += [_dot(*point, x, y) for run in runs for point in run if len(steps) <= FEW_POINTS or len(run) == 1]
    spoken = f"{name}: from {values[0]:.4g} to {values[-1]:.4g}"
    return _svg(spoken, {"": (steps, values)}, "".join(marks), x, y)


def stacked_chart(name: str, steps: Sequence[int], layers: Mapping[str, Sequence[float]]) -> str:
    """The layers over training steps on top of each other, the first at the bottom; each value holds for its step."""
    steps, columns = _thinned(steps, list(layers.values()))
    x = _step_axis(steps[0], steps[-1] + 1)
    y = _value_axis([0.0, *(sum(column) for column in zip(*columns, strict=True))])
    marks, base = [], [0.0] * len(steps)
    for place, column in enumerate(columns):
        top = [low + value for low, value in zip(base, column, strict=True)]
        marks.append(_path("area", place, _outline(steps, base, top), x, y))
        base = top
    series = {label: (steps, column) for label, column in zip(layers, columns, strict=True)}
    return _svg(name, series, "".join(marks), x, y)


def scatter_chart(
    name: str, groups: Mapping[str, Sequence[tuple[float, float, str]]], x_label: str, y_label: str
) -> str:
    """Points (x, y, label) of each group, joined in their order by a thin line, each with its label beside it."""
    points = [point for group in groups.values() for point in group]
    x, y = _value_axis([x for x, _, _ in points], x_label), _value_axis([y for _, y, _ in points], y_label)
    marks = []
    for place, group in enumerate(groups.values()):
        marks.append(_path("thin", place, [(px, py) for px, py, _ in group], x, y))
        marks += [_dot(px, py, x, y, place, radius=3.4) + _label(px, py, label, x, y) for px, py, label in group]
    series = {label: ([p[0] for p in group], [p[1] for p in group]) for label, group in groups.items()}
    return _svg(name, series, "".join(marks), x, y)


def nice_ticks(low: float, high: float, least_step: float = 0.0) -> list[float]:
    """About five round numbers, at least `least_step` apart, from at or below `low` to at or above `high`.

    Example:
        >>> nice_ticks(0.0, 6.9)
        [0.0, 2.0, 4.0, 6.0, 8.0]
    """
    rough = max((high - low) / 5, least_step)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    if least_step and step % least_step:
        step = math.ceil(step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _step_axis(low: float, high: float) -> Axis:
    """From the first to the last training step, with ticks at round steps in between."""
    low, high = (low, high) if high > low else (low - 1, high + 1)
    return Axis(low, high, [tick for tick in nice_ticks(low, high, 1) if low <= tick <= high], "training step")


def _value_axis(values: Sequence[float], label: str = "") -> Axis:
    """Ends at ticks. It begins at 0 unless all values are negative or lie close together."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    if 0 <= low <= 0.6 * high:
        low = 0.0
    if high - low < 1e-9 * max(abs(high), 1.0):
        low, high = (low - 0.5 * abs(low), high + 0.5 * abs(high)) if low else (0.0, 1.0)
    ticks = nice_ticks(low, high)
    return Axis(ticks[0], ticks[-1], ticks, label)


def _svg(name: str, series: Series, marks: str, x: Axis, y: Axis) -> str:
    """Axes, marks and the numbers."""
    curves = [
        {"name": label, "x": list(xs), "y": [_finite(value) for value in ys]} for label, (xs, ys) in series.items()
    ]
    data = {"frame": [LEFT, TOP, RIGHT, BOTTOM], "x": [x.low, x.high], "y": [y.low, y.high]}
    data |= {"xLabel": x.label, "curves": curves}
    return (
        f'<svg class="chart" role="img" tabindex="0" aria-label="{escape(name)}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'data-chart="{escape(json.dumps(data))}">{_axes(x, y)}{marks}</svg>\n'
    )


def _axes(x: Axis, y: Axis) -> str:
    parts = [f'<text text-anchor="middle" x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 4}">{escape(x.label)}</text>']
    if y.label:
        parts.append(f'<text x="2" y="{TOP - 3}">{escape(y.label)}</text>')
    for tick in y.ticks:
        _, py = _place(x.low, tick, x, y)
        parts.append(f'<path class="grid" d="M{LEFT} {py:.1f}H{RIGHT}"/>')
        parts.append(f'<text text-anchor="end" x="{LEFT - 6}" y="{py + 3.5:.1f}">{_number(tick)}</text>')
    for tick in x.ticks:
        px, _ = _place(tick, y.low, x, y)
        parts.append(f'<path class="tick" d="M{px:.1f} {BOTTOM}v4"/>')
        parts.append(f'<text text-anchor="middle" x="{px:.1f}" y="{BOTTOM + 15}">{_number(tick)}</text>')
    return "".join(parts)


def _place(value_x: float, value_y: float, x: Axis, y: Axis) -> tuple[float, float]:
    return LEFT + x.share(value_x) * (RIGHT - LEFT), BOTTOM - y.share(value_y) * (BOTTOM - TOP)


def _path(kind: str, color: int, points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> str:
    placed = "L".join("{:.1f} {:.1f}".format(*_place(*point, x, y)) for point in points)
    return f'<path class="{kind} c{color % NUM_CURVE_COLORS}" d="M{placed}"/>'


def _dot(value_x: float, value_y: float, x: Axis, y: Axis, color: int = 0, radius: float = 2.2) -> str:
    px, py = _place(value_x, value_y, x, y)
    return f'<circle class="dot c{color % NUM_CURVE_COLORS}" cx="{px:.1f}" cy="{py:.1f}" r="{radius}"/>'


def _label(value_x: float, value_y: float, text: str, x: Axis, y: Axis) -> str:
    """Beside the point, on the side that has more room."""
    px, py = _place(value_x, value_y, x, y)
    anchor, shift = ("start", 6) if x.share(value_x) < 0.6 else ("end", -6)
    return f'<text class="label" text-anchor="{anchor}" x="{px + shift:.1f}" y="{py - 5:.1f}">{escape(text)}</text>'


def _outline(steps: Sequence[float], low: Sequence[float], high: Sequence[float]) -> list[tuple[float, float]]:
    """Stairs along the top from left to right and back along the bottom."""
    ends = [*steps[1:], steps[-1] + 1]
    above, below = (
        [
            point
            for begin, end, value in zip(steps, ends, values, strict=True)
            for point in ((begin, value), (end, value))
        ]
        for values in (high, low)
    )
    return [*above, *reversed(below)]


def _runs(xs: Sequence[float], ys: Sequence[float]) -> list[list[tuple[float, float]]]:
    """The stretches of finite values."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(xs, ys, strict=True):
        if math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _thinned(xs: Sequence[float], columns: list[Sequence[float]]) -> tuple[list[float], list[list[float]]]:
    """At most about `MOST_POINTS` of them, every so manieth from the first on, and the last."""
    stride = -(-len(xs) // MOST_POINTS)
    kept = [place for place in range(len(xs)) if place % stride == 0 or place == len(xs) - 1]
    return [xs[place] for place in kept], [[column[place] for place in kept] for column in columns]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,g}"
