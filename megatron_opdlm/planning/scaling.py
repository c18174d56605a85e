"""Predictions over sizes, GPUs and lengths: the tables and plots of this folder's README.

    for line in by_gpus(PAPER, (8, 64, 512)): ...

Each study is a list of rows; `tools/plan_scaling.py` prints and draws them. Nothing here is measured on GPUs; the one
measured thing is `QUICKSTART_LENGTHS`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace

from megatron_opdlm.config.schema import Config, DivergenceConfig, ParallelConfig, RolloutConfig, TrainingConfig
from megatron_opdlm.observability.hardware import GPUS
from megatron_opdlm.planning.decode_step import DecodeStep
from megatron_opdlm.planning.decoding import Finish, Sharing, simulate
from megatron_opdlm.planning.layout import Layout
from megatron_opdlm.planning.memory import Models
from megatron_opdlm.planning.prediction import Prediction, predict
from megatron_opdlm.planning.published import published
from megatron_opdlm.planning.rates import Rates
from megatron_opdlm.planning.workload import Workload

H100 = GPUS["h100-80gb"]
QUICKSTART_LENGTHS = {
    6: 9, 7: 13, 12: 40, 13: 32, 14: 14, 15: 27, 16: 9, 18: 21, 19: 12,
    20: 27, 21: 19, 22: 2, 23: 24, 24: 2, 25: 2, 26: 3,
}  # fmt: skip
"""Tokens of a response -> how many of the quickstart's 256 held-out tasks its trained student answered with as many."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A layout and the batch that it trains."""

    tensor: int
    pipeline: int = 1
    expert: int = 1
    recompute: str = "none"
    prompts: int = 128
    global_batch: int = 8

    def config(self, longest: int = 4000) -> Config:
        """The general recipe so laid out."""
        return Config(
            parallel=ParallelConfig(
                tensor_model_parallel_size=self.tensor,
                sequence_parallel=self.tensor > 1,
                pipeline_model_parallel_size=self.pipeline,
                expert_model_parallel_size=self.expert,
            ),
            rollout=RolloutConfig(max_new_tokens=longest),
            divergence=DivergenceConfig(top_k=16),
            training=TrainingConfig(
                recompute=self.recompute, num_prompts_per_step=self.prompts, global_batch_size=self.global_batch
            ),
        )


SIZES = {
    "qwen3-0.6b": (8, Scale(tensor=1)),
    "qwen3-1.7b": (8, Scale(tensor=1)),
    "qwen3-4b": (8, Scale(tensor=4)),
    "qwen3-8b": (8, Scale(tensor=4)),
    "qwen3-14b": (8, Scale(tensor=8)),
    "qwen3-32b": (16, Scale(tensor=8, recompute="full")),
    "qwen3-30b-a3b": (16, Scale(tensor=4, expert=4, recompute="full")),
    "qwen3-235b-a22b": (
        128,
        Scale(tensor=4, pipeline=2, expert=16, recompute="full", prompts=256, global_batch=16),
    ),
}
"""Model -> the GPUs and the layout of its recipe."""

GPUS_OF_8B = [
    (8, Scale(tensor=4)),
    (64, Scale(tensor=8)),
    (64, Scale(tensor=4, prompts=1024, global_batch=64)),
    (512, Scale(tensor=8, prompts=4096, global_batch=256)),
    (4096, Scale(tensor=4, prompts=16384, global_batch=1024)),
]
"""GPUs, layout and batch; the first two with the paper's batch, the others with more than that."""


def prediction_of(
    model: str, num_gpus: int, scale: Scale, rates: Rates | None = None, **lengths: float
) -> tuple[Prediction, Workload]:
    """Of a published model that teaches itself. `lengths` go to `Workload.of`; `longest` is the limit."""
    config = scale.config(int(lengths.pop("longest", 4000)))
    workload = Workload.of(config, **lengths)
    models, layout = Models(published(model), published(model)), Layout.of(config.parallel, num_gpus)
    return predict(models, config, layout, H100, workload, rates or Rates()), workload


def imbalance_of(lengths: list[int], *, num_ranks: int, num_slots: int, sharing: Sharing, limit: int = 4000) -> Finish:
    """A rollout of the 8B under tensor parallelism 4, whose ranks decode responses of these lengths."""
    config = replace(
        Scale(tensor=4).config(limit), parallel=ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True)
    )
    workload = Workload.of(config, response_tokens=sum(lengths) / len(lengths))
    models, layout = Models(published("qwen3-8b"), None), Layout.of(config.parallel, 4 * num_ranks)
    step = DecodeStep(models, config, layout, H100, workload, Rates())
    seconds = {active: step.seconds(active) for active in range(1, num_slots + 1)}
    return simulate(
        lengths,
        num_ranks=num_ranks,
        num_slots=num_slots,
        seconds_per_forward=seconds.__getitem__,
        tokens_per_step=workload.tokens_per_step,
        sharing=sharing,
    )


def lengths_like_quickstart(num: int, mean: float, seed: int) -> list[int]:
    """The quickstart's measured lengths, stretched to this mean, in whole blocks."""
    generator = random.Random(seed)
    measured = [length for length, number in QUICKSTART_LENGTHS.items() for _ in range(number)]
    stretch = mean / (sum(measured) / len(measured))
    return [max(1, round(generator.choice(measured) * stretch / 4)) * 4 for _ in range(num)]


def lengths_log_normal(num: int, mean: float, spread: float, seed: int, limit: int = 4000) -> list[int]:
    """Log-normal lengths, cut off at the limit."""
    workload = Workload.of(Scale(tensor=1).config(limit), response_tokens=mean, spread=spread)
    return workload.sample_lengths(num, seed)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(header) + " |"]
    lines.append("|" + " --- |" * lines[0].count(" | ") + " --- |")
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
