"""The results of an evaluation as files: `results.json`, and `results.md` for people, beside the paper's figures.

write_results(results, Path("runs/mine/evaluation"))
print(results_table(results))
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

from megatron_opdlm.evaluation.benchmarks import paper_scores

HEADLINE = "accuracy"
"""The metric that the paper's scores are compared with, where a task has it; otherwise its first one."""
SETTINGS = {
    "remasking_strategy": "strategy",
    "dynamic_threshold": "threshold",
    "block_size": "block",
    "denoising_steps_per_block": "steps",
    "temperature": "temperature",
    "top_k": "top-k",
    "top_p": "top-p",
    "max_new_tokens": "new tokens",
}
"""Setting -> its column."""
COMPARED = ("SDAR-4B", "OPDLM-4B", "SDAR-8B", "OPDLM-8B")
"""Models of the paper that have a column, if it reports any of the tasks."""


def write_results(results: dict[str, Any], folder: Path) -> None:
    """Writes both files; each appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write_atomically(folder / "results.md", results_table(results) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file in place of what is there, also while another job does the same."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def results_table(results: dict[str, Any]) -> str:
    """Scores in percent, what decoding took, and the settings that every score holds for, as Markdown."""
    model, thinking = results["model"], results["enable_thinking"]
    rows = results["tasks"] | results["groups"]
    parts = [
        f"Model: {model['role']} of {model['folder']} ({model['fingerprint']}), "
        f"{'with' if thinking else 'without'} thinking.",
        _scores_table(rows, results["seconds"]),
        _settings_table(results["tasks"]),
    ]
    parts += [part for part in (_categories_table(results["tasks"]), _paper_table(rows, thinking)) if part]
    return "\n\n".join(parts)


def headline(scores: dict[str, dict]) -> str:
    """The name of the score that stands for a task."""
    return next((key for key in scores if key.partition(",")[0] == HEADLINE), next(iter(scores)))


def _scores_table(rows: dict[str, Any], seconds: dict[str, float]) -> str:
    lines = []
    for name, row in rows.items():
        took = row["responses"]
        costs = [f"{took[column]:.4g}" for column in ("length", "tokens_per_step", "forwards")]
        costs += [_percent(took["end_token_rate"]), f"{seconds[name]:.1f}" if name in seconds else "-"]
        for key, scores in row["scores"].items():
            others = [f"{kind} {_percent(value)}" for kind, value in scores.items() if kind not in ("mean", "stderr")]
            mean = [_percent(scores["mean"]), _percent(scores.get("stderr")), ", ".join(others) or "-"]
            lines.append([name, key.replace(",none", ""), *mean, *costs])
    header = ["task", "score", "%", "±", "of several", "length", "tokens per step", "forwards", "ended %", "seconds"]
    return markdown(header, lines)


def _settings_table(tasks: dict[str, Any]) -> str:
    lines = [
        [
            name,
            *(task["decoding"][setting] for setting in SETTINGS),
            task["responses_per_document"],
            task["num_documents"],
            task["responses"]["num_prompts_too_long"],
        ]
        for name, task in tasks.items()
    ]
    return markdown(["task", *SETTINGS.values(), "responses each", "documents", "prompts too long"], lines)


def _categories_table(tasks: dict[str, Any]) -> str | None:
    lines = [
        [name, category, scores["num_documents"], _percent(scores.get(headline(task["scores"])))]
        for name, task in tasks.items()
        for category, scores in task["categories"].items()
    ]
    return markdown(["task", "category", "documents", "%"], lines) if lines else None


def _paper_table(rows: dict[str, Any], thinking: bool) -> str | None:
    """Ours beside the paper's, for the tasks that it reports; its settings are not always ours."""
    lines = []
    for name, row in rows.items():
        paper = paper_scores(name, thinking=thinking)
        if paper:
            ours = _percent(row["scores"][headline(row["scores"])]["mean"])
            lines.append([name, ours, *(paper.get(model, "-") for model in COMPARED)])
    return markdown(["task", "this model", *(f"{model} (paper)" for model in COMPARED)], lines) if lines else None


def markdown(header: list[str], lines: list[list[Any]]) -> str:
    """A table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
