"""A run as one HTML page that needs nothing else: results, curves, warnings, how responses were written, settings.

    write_report("runs/default", {"Accuracy": {"teacher": {"chain_sum": 0.91}, "student": {"chain_sum": 0.88}}})

It reads what is there of `metrics.jsonl`, `config.yaml`, `trajectories.jsonl`, `skipped_steps.jsonl`, evaluations and
sweeps in the run directory (`run_data`), and writes `report.html`. Template, style sheet and scripts lie in `page/`.

Nothing on the page asks a network for anything, and its policy for browsers forbids that: the only style sheet and
script that run are those written here, by their hashes. Text of the data is escaped where it stands in HTML, and what
scripts read is JSON in which no character can end its element; they put it in place as text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

from megatron_opdlm.config.settings import SECTIONS, SETTINGS
from megatron_opdlm.observability.charts import NUM_CURVE_COLORS, line_chart, scatter_chart, stacked_chart
from megatron_opdlm.observability.run_data import (
    Run,
    accuracy_points,
    curves,
    page_trajectories,
    phase_seconds,
    read_run,
    warnings,
)

PAGE = Path(__file__).with_name("page")
SCRIPTS = ("theme.js", "charts.js", "viewer.js")


def write_report(
    run_directory: str | os.PathLike,
    extra: Mapping[str, object] | None = None,
    output: str | os.PathLike | None = None,
) -> Path:
    """Writes the page and returns its path: `output`, by default `report.html` in the run directory.

    `extra` has a table per title: `{row: {column: value}}` or `{name: value}`; a plain value gets a row in "Results".
    ValueError if there is no such run directory, or if a file in it is of something else.
    """
    run = read_run(run_directory)
    name = run.directory.resolve().name
    trajectories = page_trajectories(run)
    body = _tiles(run.records) + _warnings(run) + _results(extra or {}) + _curves(run)
    body += (PAGE / "viewer.html").read_text(encoding="utf-8") if trajectories else ""
    data = _data_element("trajectories-data", trajectories) if trajectories else ""
    page = Path(output) if output else run.directory / "report.html"
    page.write_text(_page(name, _facts(run), body + _settings(run.settings), data), encoding="utf-8")
    return page


def _page(title: str, facts: str, body: str, data: str) -> str:
    style = (PAGE / "report.css").read_text(encoding="utf-8")
    script = "".join((PAGE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    parts = {"title": escape(title), "facts": escape(facts), "policy": policy, "style": style, "script": script}
    parts |= {"body": body, "data": data}
    template = (PAGE / "report.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda name: parts[name[1]], template)  # once, so no part is looked into


def _hash(content: str) -> str:
    """What a policy calls the one inline element that it allows (https://www.w3.org/TR/CSP3/#grammardef-hash-source)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _data_element(name: str, value: object) -> str:
    """JSON for the page's script. Within strings `<`, `>` and `&` are spelt as escapes, so nothing ends the element."""
    text = json.dumps(value, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def _facts(run: Run) -> str:
    records = run.records
    facts = [f"{len(records):,} training steps"]
    if any("rollout/tokens" in record for record in records):
        facts.append(f"{sum(record.get('rollout/tokens') or 0 for record in records):,.0f} response tokens")
    if any("perf/seconds_total" in record for record in records):
        facts.append(f"{sum(record.get('perf/seconds_total') or 0 for record in records) / 3600:.2f} hours")
    objective = run.settings.get("objective", {}).get("name")
    return ", ".join([*facts, *([objective.replace("_", "-")] if objective else [])])


def _tiles(records: list[dict]) -> str:
    """Where the most telling curves ended, and began."""
    wanted = ("Loss", "Teacher agreement", "Tokens per step", "Response length", "Accuracy")
    tiles = [
        f'<div class="card tile"><span>{escape(curve.title)}</span><b>{_short(curve.values[-1])}</b>'
        f"<span>{_short(curve.values[0])} at the start</span></div>\n"
        for curve in curves(records)
        if curve.title in wanted
    ]
    return f'<div class="tiles">\n{"".join(tiles)}</div>\n' if tiles else ""


def _warnings(run: Run) -> str:
    messages = warnings(run)
    if not messages:
        return ""
    items = "".join(f"<li>{escape(message)}</li>\n" for message in messages)
    return f'<section class="card warnings"><h2>Warnings</h2>\n<ul>\n{items}</ul></section>\n'


def _results(extra: Mapping[str, object]) -> str:
    tables = {title: value for title, value in extra.items() if isinstance(value, Mapping)}
    plain = {title: value for title, value in extra.items() if title not in tables}
    if plain:
        tables = {"Results": plain} | tables
    return "".join(
        f'<h2>{escape(title)}</h2>\n<div class="card">{_table(table)}</div>\n' for title, table in tables.items()
    )


def _curves(run: Run) -> str:
    figures = [
        _figure(
            line_chart(curve.title, curve.steps, curve.values), curve.title, curve.explanation, _change(curve.values)
        )
        for curve in curves(run.records)
    ]
    if points := accuracy_points(run):
        picture = scatter_chart("Accuracy against speed", points, "tokens per denoising step", "accuracy")
        explanation = "Labels: training steps, names of evaluations, thresholds of sweeps."
        figures.append(_figure(picture, "Accuracy against speed", explanation, keys=list(points)))
    if layers := phase_seconds(run.records):
        picture = stacked_chart("Seconds per step", [record["step"] for record in run.records], layers)
        explanation = "Wall-clock time of each phase, and its share of all of them."
        figures.append(_figure(picture, "Seconds per step", explanation, keys=_phase_names(layers)))
    return f'<h2>Training</h2>\n<div class="curves">\n{"".join(figures)}</div>\n' if figures else ""


def _change(values: list[float]) -> str:
    return f"{_short(values[0])} → {_short(values[-1])}"


def _short(value: float) -> str:
    """Three digits, for a glance; the charts have them all."""
    mantissa, _, exponent = f"{value:.3g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def _phase_names(layers: Mapping[str, list[float]]) -> list[str]:
    """Each phase with its share of all seconds."""
    total = sum(sum(values) for values in layers.values()) or 1.0
    return [f"{phase} {sum(values) / total:.1%}" for phase, values in layers.items()]


def _figure(picture: str, title: str, explanation: str, readout: str = "", keys: list[str] | None = None) -> str:
    caption = f'<div class="caption"><b>{escape(title)}</b><span class="readout">{escape(readout)}</span></div>'
    items = "".join(
        f'<li><i class="c{place % NUM_CURVE_COLORS}"></i>{escape(name)}</li>' for place, name in enumerate(keys or [])
    )
    legend = f'<ul class="keys">{items}</ul>\n' if items else ""
    return (
        f'<figure class="card">\n<figcaption>{caption}<p>{escape(explanation)}</p></figcaption>\n'
        f"{picture}{legend}</figure>\n"
    )


def _settings(sections: Mapping[str, Mapping[str, object]]) -> str:
    values = {name: value for section, fields in sections.items() for name, value in _by_setting(section, fields)}
    if not values:
        return ""
    written = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    changed = {name: written[name] for name in SETTINGS if name in values and values[name] != SETTINGS[name].default}
    return (
        f'<h2>Settings that differ from the defaults</h2>\n<div class="card">{_table(changed)}'
        f"<details><summary>All settings</summary>\n{_table(written)}</details></div>\n"
    )


def _by_setting(section: str, fields: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Dotted names and values; a section inside a section is taken apart."""
    for name, value in fields.items():
        if f"{section}.{name}" in SECTIONS:
            yield from _by_setting(f"{section}.{name}", value)
        else:
            yield f"{section}.{name}", value


def _table(table: Mapping[str, object]) -> str:
    """Rows of `{name: value}`, or a grid of `{row: {column: value}}` with all columns that occur."""
    columns = dict.fromkeys(name for row in table.values() if isinstance(row, Mapping) for name in row)
    is_grid = bool(columns) and all(isinstance(row, Mapping) for row in table.values())
    head = "".join(f"<th>{escape(str(name))}</th>" for name in ("", *columns)) if is_grid else ""
    rows = []
    for name, row in table.items():
        cells = [row.get(column, "") for column in columns] if is_grid else [row]
        data = "".join(f"<td>{escape(_text(cell))}</td>" for cell in cells)
        rows.append(f"<tr><th>{escape(str(name))}</th>{data}</tr>\n")
    return f'<div class="wide"><table>\n{f"<tr>{head}</tr>" if head else ""}{"".join(rows)}</table></div>\n'


def _text(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{int(value):,}" if float(value).is_integer() else f"{value:.4g}"
