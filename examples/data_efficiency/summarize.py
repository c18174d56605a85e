"""The study's table and figure.

    python examples/data_efficiency/summarize.py --scores runs/data_efficiency/scores.jsonl

writes `summary.json`, `accuracy.png` and `table.md` beside this file, or into `--output`.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean

LABELS = {
    "on_policy_distillation": "on-policy distillation",
    "random_mask_kl": "KL at random masks",
    "sft_sdar": "SFT, preset sdar",
    "lift": "LIFT",
}
COLORS = {
    "on_policy_distillation": "#3f86d2",
    "random_mask_kl": "#e0861c",
    "sft_sdar": "#2a9d72",
    "lift": "#b565cc",
}
TICKS = (20_000, 50_000, 100_000, 200_000, 300_000)
TARGET = 0.9
"""Share of the teacher's accuracy that a student should reach."""


def tokens_until(points: list[dict], accuracy: float) -> int | None:
    """Trained tokens at the first checkpoint of a run with at least this accuracy; None if there is none."""
    reached = [point["trained_tokens"] for point in points if point["accuracy"] >= accuracy]
    return min(reached, default=None)


def summarize(scores: list[dict], teacher_accuracy: float) -> dict:
    """By method: the last accuracy, and the tokens until the target, of each seed and on average."""
    runs: dict[str, dict[int, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for point in sorted(scores, key=lambda point: point["step"]):
        runs[point["method"]][point["seed"]].append(point)
    methods = {}
    for method, by_seed in runs.items():
        until = [tokens_until(points, TARGET * teacher_accuracy) for points in by_seed.values()]
        last = [points[-1] for points in by_seed.values()]
        methods[method] = {
            "seeds": sorted(by_seed),
            "last_accuracy": round(mean(point["accuracy"] for point in last), 4),
            "last_accuracies": [point["accuracy"] for point in last],
            "trained_tokens": round(mean(point["trained_tokens"] for point in last)),
            "response_tokens": round(mean(point["response_tokens"] for point in last)),
            "trained_tokens_until_target": until,
            "mean_trained_tokens_until_target": None if None in until else round(mean(until)),
        }
    return {"teacher_accuracy": teacher_accuracy, "target": round(TARGET * teacher_accuracy, 4), "methods": methods}


def table(summary: dict) -> str:
    """Markdown. Where not all seeds of a method get there, the ratio says how far it was followed."""
    lines = [
        "| method | last accuracy, mean of seeds | trained tokens, all | until 90 % of the teacher | ratio |",
        "| --- | --- | --- | --- | --- |",
    ]
    ours = summary["methods"].get("on_policy_distillation", {}).get("mean_trained_tokens_until_target")
    for method, figures in summary["methods"].items():
        until = figures["mean_trained_tokens_until_target"]
        reached = sum(tokens is not None for tokens in figures["trained_tokens_until_target"])
        said = f"{until:,}" if until else f"{reached} of {len(figures['seeds'])} seeds reach it"
        at_least = "" if until else "> "
        ratio = f"{at_least}{(until or figures['trained_tokens']) / ours:.2f}" if ours else ""
        lines.append(
            f"| {LABELS[method]} | {figures['last_accuracy']:.3f} | {figures['trained_tokens']:,} | {said} | {ratio} |"
        )
    return "\n".join(lines) + "\n"


def draw(scores: list[dict], summary: dict, path: Path) -> None:
    """Accuracy against trained tokens: a line for the mean of the seeds, a dot for each of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for method in summary["methods"]:
        mine = [point for point in scores if point["method"] == method]
        steps = sorted({point["step"] for point in mine})
        means = [
            [mean(point[key] for point in mine if point["step"] == step) for step in steps]
            for key in ("trained_tokens", "accuracy")
        ]
        axes.plot(*means, color=COLORS[method], label=LABELS[method])
        dots = [[point[key] for point in mine] for key in ("trained_tokens", "accuracy")]
        axes.scatter(*dots, color=COLORS[method], s=8, alpha=0.5)
    axes.axhline(summary["teacher_accuracy"], color="#8a8f98", linewidth=1, label="teacher")
    axes.axhline(summary["target"], color="#8a8f98", linewidth=1, linestyle=":", label="90 % of it")
    axes.set_xscale("log")
    axes.set_xticks(TICKS, [f"{tokens // 1000}k" for tokens in TICKS])
    axes.minorticks_off()
    axes.set_xlabel("trained tokens")
    axes.set_ylabel("held-out tasks solved")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scores", type=Path, required=True, help="what study.py wrote")
    parser.add_argument("--teacher-accuracy", type=float, default=0.94921875, help="on the same tasks")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder to write into")
    arguments = parser.parse_args()
    scores = [json.loads(line) for line in arguments.scores.read_text().splitlines()]
    summary = summarize(scores, arguments.teacher_accuracy)
    (arguments.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (arguments.output / "table.md").write_text(table(summary))
    draw(scores, summary, arguments.output / "accuracy.png")
    print(table(summary))


if __name__ == "__main__":
    main()
