"""A run as one HTML page that needs nothing else: curves, results, settings.

    write_report("runs/default", {"Accuracy": {"teacher": {"chain_sum": 0.91}, "student": {"chain_sum": 0.88}}})

It reads `metrics.jsonl` and `config.yaml` of the run directory, as far as they are there, and writes `report.html`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

import yaml

from megatron_opdlm.config.settings import SECTIONS, SETTINGS
from megatron_opdlm.observability.plots import line_plot, stacked_plot
from megatron_opdlm.observability.writers import read_records

CURVES = {
    "train/loss": ("Loss", "Mean divergence from the teacher at trained positions, or cross-entropy of given tokens."),
    "train/teacher_agreement": ("Agreement with the teacher", "Share of trained positions with the same top token."),
    "train/token_accuracy": ("Given tokens hit", "Share of trained positions whose token is the student's top token."),
    "rollout/tokens_per_step": ("Tokens per denoising step", "Counted response tokens per forward of the student."),
    "rollout/response_length": ("Response length", "Tokens up to and including the end token."),
    "train/grad_norm": ("Gradient norm", "Before clipping."),
    "train/on_policy_gap": ("On-policy gap", "Mean difference in log-probability between rollout and training."),
    "evaluation/accuracy": ("Accuracy", "Share of the tasks of `evaluation.files` solved, at temperature 0."),
    "evaluation/tokens_per_step": ("Tokens per denoising step on these tasks", "At temperature 0."),
}
"""Metric -> title and explanation of its curve."""

PHASES = ("rollout", "balance", "teacher", "scoring", "student", "optimizer", "checkpoint", "evaluation")

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --text: #1c1f23; --quiet: #5d646d; --line: #dfe3e8; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --text: #e4e7ea; --quiet: #9aa2ab; --line: #30353b; } }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--page); color: var(--text);
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem; } p, figcaption span { color: var(--quiet); }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1.25rem; }
figure { margin: 0; min-width: 0; } figcaption { font-size: 0.9rem; } svg { width: 100%; height: auto; display: block; }
svg text { font-family: inherit !important; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.3rem 0.8rem 0.3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; } summary { cursor: pointer; margin: 0.75rem 0; }
"""


def write_report(run_directory: str | os.PathLike, extra: Mapping[str, object] | None = None) -> Path:
    """Writes `report.html` and returns its path.

    `extra` has a table per title: `{row: {column: value}}` or `{name: value}`; a plain value gets a row in "Results".
    ValueError if there is no such run directory.
    """
    directory = Path(run_directory)
    if not directory.is_dir():
        raise ValueError(f"logging.directory: there is no run directory {directory}")
    metrics, config = directory / "metrics.jsonl", directory / "config.yaml"
    records = read_records(metrics) if metrics.is_file() else []
    settings = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    body = _heading(directory, records) + _results(extra or {}) + _curves(records) + _settings(settings)
    page = directory / "report.html"
    page.write_text(_page(directory.resolve().name, body), encoding="utf-8")
    return page


def _page(title: str, body: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def _heading(directory: Path, records: list[dict]) -> str:
    facts = [f"{len(records):,} training steps"]
    if any("rollout/tokens" in record for record in records):
        facts.append(f"{sum(record.get('rollout/tokens') or 0 for record in records):,.0f} response tokens")
    if any("perf/seconds_total" in record for record in records):
        facts.append(f"{sum(record.get('perf/seconds_total') or 0 for record in records) / 3600:.2f} hours")
    return f"<h1>{escape(directory.resolve().name)}</h1>\n<p>{', '.join(facts)}</p>\n"


def _results(extra: Mapping[str, object]) -> str:
    tables = {title: value for title, value in extra.items() if isinstance(value, Mapping)}
    plain = {title: value for title, value in extra.items() if title not in tables}
    if plain:
        tables = {"Results": plain} | tables
    return "".join(f"<h2>{escape(title)}</h2>\n{_table(table)}" for title, table in tables.items())


def _curves(records: list[dict]) -> str:
    figures = []
    for metric, (title, explanation) in CURVES.items():
        steps, values = _series(records, metric)
        if steps:
            change = f"{_text(values[0])} → {_text(values[-1])}"
            figures.append(_figure(line_plot(title, steps, values), title, f"{change}. {explanation}"))
    figures += _phase_figure(records)
    return f'<h2>Training</h2>\n<div class="curves">\n{"".join(figures)}</div>\n' if figures else ""


def _series(records: list[dict], metric: str) -> tuple[list[int], list[float]]:
    """Steps that have the metric, and its values; one that was not finite is NaN."""
    points = [(record["step"], record[metric]) for record in records if metric in record]
    return [step for step, _ in points], [float("nan") if value is None else value for _, value in points]


def _phase_figure(records: list[dict]) -> list[str]:
    metrics = {phase: f"perf/seconds_{phase}" for phase in PHASES}
    layers = {
        phase: [record.get(metric) or 0.0 for record in records]
        for phase, metric in metrics.items()
        if any(metric in record for record in records)
    }
    if not layers:
        return []
    picture = stacked_plot("Seconds per step", [record["step"] for record in records], layers)
    return [_figure(picture, "Seconds per step", "Wall-clock time of each phase.")]


def _figure(picture: str, title: str, explanation: str) -> str:
    caption = f"<b>{escape(title)}</b> <span>{escape(explanation)}</span>"
    return f"<figure>\n{picture}<figcaption>{caption}</figcaption>\n</figure>\n"


def _settings(sections: Mapping[str, Mapping[str, object]]) -> str:
    values = {name: value for section, fields in sections.items() for name, value in _by_setting(section, fields)}
    if not values:
        return ""
    written = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    changed = {name: written[name] for name in SETTINGS if name in values and values[name] != SETTINGS[name].default}
    return (
        f"<h2>Settings that differ from the defaults</h2>\n{_table(changed)}"
        f"<details><summary>All settings</summary>\n{_table(written)}</details>\n"
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
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
