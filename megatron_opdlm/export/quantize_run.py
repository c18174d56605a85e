"""From a model in its own number format to a quantized folder and a report of what that cost.

    subject = Subject(model, engine, special, architecture, is_student=True, folder="student", write_assets=...)
    report = quantize_to_folder(Path("student-fp8"), "fp8", subject, prompts, config, score=lambda: {})
    print(report_table(report))

`score` scores the model as it is, and is called before and after: it belongs to a layer beside this one.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_opdlm.config.schema import Config
from megatron_opdlm.data.prompts import Prompt
from megatron_opdlm.data.special_tokens import SpecialTokens
from megatron_opdlm.export.quantize import FORMATS, Quantization, quantize
from megatron_opdlm.export.quantize_calibration import on_policy_calibration
from megatron_opdlm.export.quantize_folder import write_quantized_folder
from megatron_opdlm.models.pipeline import PipelineModel
from megatron_opdlm.models.qwen3 import Qwen3Architecture
from megatron_opdlm.rollout.engine import RolloutEngine

logger = logging.getLogger(__name__)

SHOWN = ("accuracy", "tokens_per_step", "response_length", "end_token_fraction")
"""Scores in the table; the report has all."""


@dataclass(frozen=True, eq=False)
class Subject:
    """The model to quantize, whole on this rank, and what belongs to it."""

    model: PipelineModel
    engine: RolloutEngine
    """Decodes with it."""
    special: SpecialTokens
    architecture: Qwen3Architecture
    is_student: bool
    folder: str
    """Where its weights come from."""
    write_assets: Callable[[Path], None]
    """Fills a folder with config and tokenizer."""


def quantize_to_folder(
    output: Path,
    quantization: Quantization,
    subject: Subject,
    prompts: list[Prompt],
    config: Config,
    score: Callable[[], dict[str, dict]],
) -> dict:
    """Scores, calibrates, quantizes, scores again and writes `output`. Returns the report.

    `score` gives, for each task file, `scores` by name. All data-parallel ranks must call it; the first one writes.
    ValueError if there are fewer prompts than ranks.
    """
    num_ranks = dist.get_world_size()
    if len(prompts) < num_ranks:
        raise ValueError(f"data.train_files has {len(prompts)} prompts to calibrate with, for {num_ranks} ranks")
    if quantization == "int8" and subject.architecture.mixture is not None:
        logger.warning("vLLM and SGLang read no int8 mixture whose inputs have a fixed scale, as here; they read fp8")
    logger.info("calibrating with responses to %d prompts / %d ranks", len(prompts), num_ranks)
    before = score()
    calibration = on_policy_calibration(subject.engine, prompts, config, subject.special, is_student=subject.is_student)
    probes = calibration.probe(subject.model)
    quantize(subject.model, quantization, lambda: calibration.run(subject.model))
    report = {
        "format": quantization,
        "algorithm": FORMATS[quantization].algorithm,
        "modelopt": importlib.metadata.version("nvidia-modelopt"),
        "source": subject.folder,
        "calibration": {"prompts": len(prompts)} | calibration.counts(),
        "kl_to_unquantized": calibration.divergence_from(probes, subject.model),
        "tasks": _compared(before, score()),
    }
    if dist.get_rank() == 0:
        write_quantized_folder(
            output,
            subject.model,
            subject.architecture,
            quantization,
            dtype=config.precision.dtype,
            write_assets=subject.write_assets,
            report=report,
        )
        logger.info("wrote %s", output)
    dist.barrier()
    return report


def _compared(before: dict[str, dict], after: dict[str, dict]) -> dict[str, dict]:
    return {file: {"unquantized": before[file]["scores"], "quantized": after[file]["scores"]} for file in before}


def report_table(report: dict) -> str:
    """The report as a Markdown table, a line for each task file and score."""
    lines = ["| tasks | score | unquantized | " + report["format"] + " |", "| --- | --- | --- | --- |"]
    for file, scores in report["tasks"].items():
        for name in SHOWN:
            values = (scores[which][name] for which in ("unquantized", "quantized"))
            lines.append(f"| {Path(file).name} | {name} | " + " | ".join(f"{value:.4g}" for value in values) + " |")
    calibration = report["calibration"]
    return "\n".join(
        [
            f"{report['source']}, calibrated with {calibration['tokens']} tokens of {calibration['prompts']} responses;"
            f" mean KL(unquantized || {report['format']}) {report['kl_to_unquantized']:.3g} nats over"
            f" {calibration['probed']} outputs",
            *(lines if report["tasks"] else []),
        ]
    )
