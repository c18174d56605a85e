"""What a run left behind about one of its checkpoints: settings, totals, scores.

    run = read_run(Path("runs/mine/checkpoints/step_00000480"))
    run.step, run.totals["rollout/total_tokens"], run.scores

All of it is for people to read, in a model card; what is not there is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_opdlm.checkpointing.pretrained import RUN_CONFIG
from megatron_opdlm.config.load import load_config
from megatron_opdlm.config.schema import Config
from megatron_opdlm.observability.writers import read_records


@dataclass(frozen=True)
class Score:
    """A row of the model card."""

    task: str
    metric: str
    value: float
    """A share, from 0 to 1."""
    decoding: str
    """The settings that it holds for."""


@dataclass(frozen=True)
class RunRecord:
    """Of the training up to a checkpoint."""

    config: Config
    step: int
    """Training steps that the checkpoint has behind it."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last of these steps, with totals over all of them; empty if the metrics are gone."""
    trained_tokens: int = 0
    """Positions that a loss was taken at, over all of these steps."""
    scores: list[Score] = field(default_factory=list)


def read_run(folder: Path) -> RunRecord | None:
    """Of the checkpoint `folder`, or of the one that it links to; None if no run wrote it."""
    folder = folder.resolve()  # `best` is a link
    found = re.fullmatch(r"step_(\d+)", folder.name)
    if not found or not (folder / RUN_CONFIG).is_file():
        return None
    config, step = load_config(["--config", str(folder / RUN_CONFIG)]), int(found[1])
    beside = folder.parents[1]  # where a run is by default, also one that was moved
    directory = beside if (beside / "metrics.jsonl").is_file() else Path(config.logging.directory)
    if not (directory / "metrics.jsonl").is_file():
        return RunRecord(config, step)
    records = [record for record in read_records(directory / "metrics.jsonl") if record["step"] < step]
    if not records or records[-1]["step"] != step - 1:
        return RunRecord(config, step)
    trained = sum(int(record.get("train/trained_tokens", 0)) for record in records)
    scores = [*_own_scores(config, records[-1]), *_task_scores(directory / "evaluation" / "results.json", folder.name)]
    return RunRecord(config, step, records[-1], trained, scores)


def _own_scores(config: Config, metrics: dict[str, float]) -> Iterator[Score]:
    """Of the evaluation that was part of the run, if there was one at this very step."""
    if "evaluation/accuracy" in metrics:
        tasks = ", ".join(Path(file).name for file in config.evaluation.files)
        decoding = _decoding(vars(config.rollout) | {"temperature": 0})
        yield Score(tasks, "accuracy", metrics["evaluation/accuracy"], decoding)


def _task_scores(path: Path, checkpoint: str) -> Iterator[Score]:
    """Of `evaluation.tasks`, where the student of this checkpoint answered them."""
    if not path.is_file():
        return
    results = json.loads(path.read_text(encoding="utf-8"))
    if results["model"]["role"] != "student" or Path(results["model"]["folder"]).resolve().name != checkpoint:
        return
    for name, row in results["tasks"].items():
        for metric, scores in row["scores"].items():
            yield Score(name, metric.partition(",")[0], scores["mean"], _decoding(row["decoding"]))


def _decoding(settings: dict) -> str:
    is_dynamic = settings["remasking_strategy"] == "low_confidence_dynamic"
    strategy = settings["remasking_strategy"] + (f" {settings['dynamic_threshold']}" if is_dynamic else "")
    steps = f"{settings['denoising_steps_per_block']} steps for {settings['block_size']}"
    return f"{strategy}, {steps}, temperature {settings['temperature']:g}"
