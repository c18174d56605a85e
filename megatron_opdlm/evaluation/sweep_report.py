"""What a sweep shows: a Markdown table of its points, and accuracy against tokens per step as a picture.

    sweep_table(points, {"student": "runs/mine/checkpoints/best"})            # "# Decoding sweep ..."
    draw_sweep(points, Path("sweep.png"))                   # a line per block size, a point per threshold

A point is `{"rollout": {"block_size": 4, "dynamic_threshold": 0.9, ...}, "tasks": {"heldout.jsonl": {"accuracy": 0.87,
"tokens_per_step": 2.06, ...}}}`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "accuracy": ("accuracy", "{:.3f}".format),
    "standard_error": ("standard error", "{:.3f}".format),
    "tokens_per_step": ("tokens per step", "{:.2f}".format),
    "response_length": ("response length", "{:.1f}".format),
    "end_token_fraction": ("ended by themselves", "{:.3f}".format),
    "forwards": ("forwards", "{:,.0f}".format),
    "seconds": ("seconds", "{:.1f}".format),
}
"""Score -> its heading, and how it is written. A score that no point has gets no column."""

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, which people who see colours differently can tell apart. Markers differ as well."""
MARKERS = "os^Dv*X"
PANEL_INCHES = (5.6, 4.0)
PANELS_PER_ROW = 2


def sweep_table(points: list[dict], subject: dict) -> str:
    """A heading, what all points have in common, and a table for each task."""
    common = points[0]["rollout"]
    lines = ["# Decoding sweep", "", *(f"- {name}: {_words(value)}" for name, value in subject.items())]
    lines += [
        "- decoding: low_confidence_dynamic, as many denoising steps per block as a block has positions; temperature "
        f"{common['temperature']:g}, top-k {common['top_k']}, top-p {common['top_p']:g}, at most "
        f"{common['max_new_tokens']} tokens, logit shift {common['logit_shift']}, further stop tokens "
        f"{common['stop_token_ids'] or 'none'}, where a task does not ask for its own",
        "",
    ]
    for task in _tasks(points):
        lines += [f"## {task}", "", *_rows(points, task), ""]
    return "\n".join(lines)


def draw_sweep(points: list[dict], path: Path) -> None:
    """Writes the picture, with a panel for each task; a bar is one standard error to either side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = _tasks(points)
    num_columns = min(len(tasks), PANELS_PER_ROW)
    num_rows = -(-len(tasks) // num_columns)
    size = (PANEL_INCHES[0] * num_columns, PANEL_INCHES[1] * num_rows)
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    panels = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for axes in panels[len(tasks) :]:
        axes.remove()
    for task, axes in zip(tasks, panels, strict=False):
        _draw_task(axes, points, task)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png", metadata={"Software": None})
    partial.replace(path)


def _draw_task(axes: Any, points: list[dict], task: str) -> None:
    block_sizes = sorted({point["rollout"]["block_size"] for point in points})
    for place, block_size in enumerate(block_sizes):
        line = [point for point in points if point["rollout"]["block_size"] == block_size and task in point["tasks"]]
        _draw_line(axes, line, task, f"blocks of {block_size}", place)
    axes.set_title(Path(task).name, fontsize=10)
    axes.set_xlabel("tokens per denoising step")
    axes.set_ylabel("accuracy")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.08)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title="label: threshold", fontsize=9, title_fontsize=9)


def _draw_line(axes: Any, line: list[dict], task: str, label: str, place: int) -> None:
    """The points of one block size, by rising threshold, each with its threshold beside it."""
    speeds = [point["tasks"][task]["tokens_per_step"] for point in line]
    accuracies = [point["tasks"][task]["accuracy"] for point in line]
    errors = [point["tasks"][task].get("standard_error", 0.0) for point in line]
    color, marker = COLORS[place % len(COLORS)], MARKERS[place % len(MARKERS)]
    axes.errorbar(
        speeds, accuracies, errors, color=color, marker=marker, markersize=5, linewidth=1.4, elinewidth=0.7, label=label
    )
    for point, speed, accuracy in zip(line, speeds, accuracies, strict=True):
        text = f"{point['rollout']['dynamic_threshold']:g}"
        axes.annotate(text, (speed, accuracy), (4, 5), textcoords="offset points", fontsize=7.5, color=color)


def _rows(points: list[dict], task: str) -> list[str]:
    scored = [point for point in points if task in point["tasks"]]
    columns = {name: column for name, column in COLUMNS.items() if any(name in p["tasks"][task] for p in scored)}
    headings = ["block size", "threshold", *(heading for heading, _ in columns.values())]
    rows = [f"| {' | '.join(headings)} |", "| --- " * len(headings) + "|"]
    for point in scored:
        scores, rollout = point["tasks"][task], point["rollout"]
        cells = [str(rollout["block_size"]), f"{rollout['dynamic_threshold']:g}"]
        cells += [write(scores[name]) if name in scores else "" for name, (_, write) in columns.items()]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _tasks(points: list[dict]) -> list[str]:
    """Names of the tasks, in the order in which the first points have them."""
    return list(dict.fromkeys(task for point in points for task in point["tasks"]))


def _words(value: object) -> str:
    return ", ".join(f"{name} {part}" for name, part in value.items()) if isinstance(value, dict) else str(value)
