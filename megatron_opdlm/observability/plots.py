"""Curves over training steps as inline SVG that takes its text colour from the page around it.

    line_plot("Loss", [0, 1, 2], [0.9, 0.5, 0.4])                              # '<svg role="img" ...'
    stacked_plot("Seconds", [0, 1], {"rollout": [2.0, 2.1], "teacher": [0.5, 0.5]})

Matplotlib draws the foreground in a colour that no curve has, which then becomes `currentColor`; so one picture serves
a light and a dark page. No display, no global figure.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

FOREGROUND = "#010203"
CURVE_COLORS = ("#3f86d2", "#e0861c", "#2a9d72", "#b565cc", "#d3506a", "#8a8f98")
SIZE_INCHES = (4.4, 2.5)
FEW_POINTS = 30
"""A curve of at most this many steps has a dot at each."""


def line_plot(name: str, steps: Sequence[int], values: Sequence[float]) -> str:
    """One curve; a value of NaN leaves a gap."""
    marker = "o" if len(steps) <= FEW_POINTS else None

    def draw(axes: Any) -> None:
        axes.plot(steps, values, color=CURVE_COLORS[0], marker=marker, markersize=3, linewidth=1.4)

    return _svg(name, draw)


def stacked_plot(name: str, steps: Sequence[int], layers: Mapping[str, Sequence[float]]) -> str:
    """The layers on top of each other, the first at the bottom, with a legend; each value holds for a whole step."""
    ends = [*steps, steps[-1] + 1]
    heights = [[*values, values[-1]] for values in layers.values()]

    def draw(axes: Any) -> None:
        axes.stackplot(ends, *heights, labels=list(layers), colors=CURVE_COLORS, step="post", alpha=0.85)
        axes.set_ylim(bottom=0)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(layers), frameon=False, handlelength=1)

    return _svg(name, draw)


def _svg(name: str, draw: Callable[[Any], None]) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    picture = io.StringIO()
    with matplotlib.rc_context(_style() | {"svg.hashsalt": name}):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        axes.set_xlabel("training step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(picture, format="svg", transparent=True, metadata=metadata)
    return _embedded(picture.getvalue(), name)


def _style() -> dict[str, Any]:
    colors = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    return dict.fromkeys(colors, FOREGROUND) | {
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.grid": True,
        "grid.alpha": 0.15,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }


def _embedded(document: str, name: str) -> str:
    """The `<svg>` element alone: no fixed size, and no ids but those it refers to, since a page holds several."""
    svg = document[document.index("<svg") :].replace(FOREGROUND, "currentColor")
    svg = re.sub(
        r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg role="img" aria-label="{escape(name)}" viewBox="\1">', svg
    )
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL).replace("xlink:href", "href")
    referenced = set(re.findall(r"#([\w.-]+)", svg))
    return re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in referenced else "", svg)
