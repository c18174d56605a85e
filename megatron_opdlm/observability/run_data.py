"""What the report shows of a run directory, as plain numbers and words; how it looks is the business of `report`.

    run = read_run("runs/default")
    curves(run.records)                        # [Curve(title="Loss", steps=[0, 1], values=[2.0, 1.0], ...), ...]
    accuracy_points(run)                       # {"after training steps": [(1.9, 0.71, "50"), ...]}
    warnings(run)                              # ["Step 7: an optimizer step was left out, ...", ...]

Whatever file is not there is left out.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_opdlm.config.method import DivergenceKind
from megatron_opdlm.observability.collapse_watch import CollapseWatch
from megatron_opdlm.observability.trajectories import FILE, KeptTrajectory, read_trajectories
from megatron_opdlm.observability.writers import read_records

logger = logging.getLogger(__name__)

CURVES = {
    "train/loss": ("Loss", "Mean divergence from the teacher at trained positions, or cross-entropy of given tokens."),
    "train/teacher_agreement": ("Teacher agreement", "Share of trained positions with the same top token."),
    "train/token_accuracy": ("Given tokens hit", "Share of trained positions whose token is the student's top token."),
    "rollout/tokens_per_step": ("Tokens per step", "Counted response tokens per denoising step."),
    "rollout/response_length": ("Response length", "Tokens up to and including the end token."),
    "train/grad_norm": ("Gradient norm", "Before clipping."),
    "rollout/repetition_rate": ("Repetition", "Share of runs of four tokens that the response had before."),
    "train/student_entropy": ("Entropy", "Of the student's distribution at trained positions, in nats."),
    "train/on_policy_gap": ("On-policy gap", "Mean difference in log-probability between rollout and training."),
    "evaluation/accuracy": ("Accuracy", "Share of the evaluation's tasks solved, at temperature 0."),
    "evaluation/tokens_per_step": ("Tokens per step there", "Per denoising step, on the evaluation's tasks."),
}
"""Metric -> title and explanation of its curve."""

PHASES = (
    "rollout",
    "trajectories",
    "balance",
    "teacher",
    "scoring",
    "student",
    "optimizer",
    "checkpoint",
    "evaluation",
)

DIVERGENCES: dict[DivergenceKind, str] = {
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "mixture": "mixed KL",
    "jsd": "Jensen-Shannon divergence",
}
"""`divergence.kind` -> what people call it."""

MOST_SEQUENCES, MOST_TOKENS = 16, 512
"""So many sequences go onto a page, evenly spread over those kept, and so many tokens of each: under 2 MB of them."""
Points = list[tuple[float, float, str]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """The files of a run directory that the report reads."""

    directory: Path
    records: list[dict]
    """Of `metrics.jsonl`, a step each."""
    skipped: list[dict]
    """Of `skipped_steps.jsonl`."""
    settings: dict
    """Of `config.yaml`."""
    trajectories: list[KeptTrajectory]


def read_run(directory: str | os.PathLike) -> Run:
    """Reads the directory. ValueError if there is none, or if a file in it is of something else."""
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"logging.directory: there is no run directory {directory}")
    config = directory / "config.yaml"
    metrics, skipped = (directory / name for name in ("metrics.jsonl", "skipped_steps.jsonl"))
    return Run(
        directory=directory,
        records=read_records(metrics) if metrics.is_file() else [],
        skipped=read_records(skipped) if skipped.is_file() else [],
        settings=yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {},
        trajectories=read_trajectories(directory / FILE),
    )


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A metric over training steps; NaN where it was not finite."""

    title: str
    explanation: str
    steps: list[int]
    values: list[float]


def curves(records: list[dict]) -> list[Curve]:
    """The metrics of `CURVES` that some step has."""
    found = []
    for metric, (title, explanation) in CURVES.items():
        points = [(record["step"], record[metric]) for record in records if metric in record]
        if points:
            values = [float("nan") if value is None else value for _, value in points]
            steps = [step for step, _ in points]
            found.append(Curve(title=title, explanation=explanation, steps=steps, values=values))
    return found


def phase_seconds(records: list[dict]) -> dict[str, list[float]]:
    """Seconds of each phase in each step, for the phases that some step has; 0 where a step has it not."""
    return {
        phase: [record.get(f"perf/seconds_{phase}") or 0.0 for record in records]
        for phase in PHASES
        if any(f"perf/seconds_{phase}" in record for record in records)
    }


def accuracy_points(run: Run) -> dict[str, Points]:
    """Tokens per step, accuracy and a label, by what they have in common: scores in training, evaluations, sweeps."""
    scored = [
        (record["evaluation/tokens_per_step"], record["evaluation/accuracy"], f"{record['step'] + 1}")
        for record in run.records
        if record.get("evaluation/tokens_per_step") and record.get("evaluation/accuracy") is not None
    ]
    groups = {"after training steps": scored, "evaluations": list(_evaluations(run.directory))}
    for path in sorted(run.directory.glob("*/sweep.json")):
        groups |= _sweep(_read_object(path).get("points", []))
    return {name: points for name, points in groups.items() if points}


def _evaluations(directory: Path) -> Iterator[tuple[float, float, str]]:
    """Of the files of `evaluation.output` in the run directory, each by its name."""
    for path in sorted(directory.glob("*.json")):
        for task in _read_object(path).values():
            scores = task.get("scores") if isinstance(task, dict) else None
            if isinstance(scores, dict) and scores.get("tokens_per_step") and "accuracy" in scores:
                yield scores["tokens_per_step"], scores["accuracy"], path.stem


def _read_object(path: Path) -> dict:
    """The JSON object in a file that may be anybody's; empty if it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not text
        logger.warning("the report leaves out %s: %s", path, error)
        return {}
    return content if isinstance(content, dict) else {}


def _sweep(points: list[dict]) -> dict[str, Points]:
    """A group for each task and block size; the labels are thresholds."""
    groups: dict[str, Points] = {}
    tasks = {task for point in points for task in point["tasks"]}
    for point in points:
        rollout = point["rollout"]
        for task, scores in point["tasks"].items():
            name = f"blocks of {rollout['block_size']}" + (f", {Path(task).stem}" if len(tasks) > 1 else "")
            place = (scores["tokens_per_step"], scores["accuracy"], f"{rollout['dynamic_threshold']:g}")
            groups.setdefault(name, []).append(place)
    return groups


def warnings(run: Run) -> list[str]:
    """What went wrong: steps left out, sequences without numbers, and what the collapse watch says."""
    messages = [
        f"Step {step}: {count} optimizer step{'s' * (count > 1)} left out, loss or gradient was not finite."
        for step, count in sorted(Counter(entry["step"] for entry in run.skipped).items())
    ]
    messages += [
        f"Step {record['step']}: {record['rollout/not_finite']:g} responses broke off at a logit that was not finite."
        for record in run.records
        if record.get("rollout/not_finite")
    ]
    watch = CollapseWatch()
    for record in run.records:
        messages += [f"Step {record['step']}: {message}." for message in watch.follow(record)]
    return messages


def page_trajectories(run: Run) -> dict | None:
    """The sequences as the page's script reads them; None if there are none."""
    kept = run.trajectories
    if not kept:
        return None
    if len(kept) > MOST_SEQUENCES:
        kept = [kept[round(place * (len(kept) - 1) / (MOST_SEQUENCES - 1))] for place in range(MOST_SEQUENCES)]
    sequences = [_sequence(trajectory) for trajectory in kept]
    used = {token_id for some in sequences for token_id in (*some["prompt"], *some["ids"])}
    used |= {token_id for some in sequences for pairs in some["alternatives"] for token_id, _ in pairs}
    texts = {name: text for trajectory in kept for name, text in trajectory.texts.items() if int(name) in used}
    kind = run.settings.get("divergence", {}).get("kind", "forward_kl")
    return {"divergence": DIVERGENCES.get(kind, kind), "texts": texts, "sequences": sequences}


def _sequence(kept: KeptTrajectory) -> dict:
    """The first `MOST_TOKENS` tokens of a sequence, and of its prompt the last so many, in whole blocks."""
    rest = len(kept.prompt_ids) % kept.block_size
    end = min(len(kept.token_ids), (MOST_TOKENS + rest) // kept.block_size * kept.block_size - rest)
    prompt_begin = max(0, len(kept.prompt_ids) - MOST_TOKENS) // kept.block_size * kept.block_size
    columns = {
        "ids": kept.token_ids,
        "order": kept.commit_order,
        "stepMap": kept.step_map,
        "logProbs": [_rounded(value) for value in kept.log_probs],
        "teacher": [_rounded(value) for value in kept.teacher_log_probs],
        "divergence": [_rounded(value) for value in kept.divergence],
        "alternatives": [[(token_id, _rounded(value)) for token_id, value in pairs] for pairs in kept.alternatives],
    }
    return {
        "step": kept.step,
        "blockSize": kept.block_size,
        "counted": min(kept.response_length, end),
        "length": kept.response_length,
        "stopReason": kept.stop_reason,
        "prompt": kept.prompt_ids[prompt_begin:],
        **{name: values[:end] for name, values in columns.items()},
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
