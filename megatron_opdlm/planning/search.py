"""All layouts of a recipe on a number of GPUs: which are allowed, which fit, and which of these is fastest.

    found = search(models, config, num_gpus=64, gpu=GPUS["h100-80gb"], workload=workload, rates=Rates())
    found.fitting[0].prediction.layout.spelt(), found.misfits[0].reason, found.refused

What is allowed is decided where a run decides it: `config.check` and `config.check_architecture`. Batch sizes of the
method (prompts of a step, responses of an optimizer step) stay as the recipe has them. A layout that is smaller in
every size but no faster, or needs more memory and is no faster, is not sorted out: the list is sorted by seconds.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_opdlm.config.check import check_config
from megatron_opdlm.config.check_architecture import check_architecture, check_experts
from megatron_opdlm.config.schema import Config, ParallelConfig
from megatron_opdlm.observability.hardware import Gpu
from megatron_opdlm.planning.layout import Layout
from megatron_opdlm.planning.memory import GIB, Models
from megatron_opdlm.planning.prediction import Prediction, memory_budget, plan_stages, predict
from megatron_opdlm.planning.rates import Rates
from megatron_opdlm.planning.workload import Workload

MICRO_BATCHES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Candidate:
    """A choice of layout, recompute and micro-batch that fits."""

    config: Config
    prediction: Prediction


@dataclass(frozen=True)
class Misfit:
    """One that is allowed and does not fit."""

    config: Config
    layout: Layout
    peak: float
    reason: str


@dataclass(frozen=True)
class Search:
    """What there is to choose from."""

    fitting: list[Candidate]
    """The fastest first."""
    misfits: list[Misfit]
    """The closest first."""
    refused: Counter[str]
    """Rule -> layouts that it refuses."""


def search(models: Models, config: Config, *, num_gpus: int, gpu: Gpu, workload: Workload, rates: Rates) -> Search:
    """Tries every layout that divides the GPUs, with every recompute and micro-batch size."""
    fitting, misfits, refused = [], [], Counter()
    budget = memory_budget(gpu, rates)
    for choice in _choices(models, config, num_gpus, gpu):
        try:
            check_choice(models, choice, num_gpus)
        except ValueError as error:
            refused[_rule(str(error))] += 1
            continue
        layout = Layout.of(choice.parallel, num_gpus, gpu.per_node)
        fullest = max(plan_stages(models, choice, layout, workload), key=lambda plan: plan.peak)
        if fullest.peak > budget:
            reason = (
                f"{fullest.peak_phase} needs {fullest.peak / GIB:.0f} of {budget / GIB:.0f} GiB, most of it "
                f"{fullest.largest_part} ({fullest.parts[fullest.largest_part] / GIB:.0f})"
            )
            misfits.append(Misfit(choice, layout, fullest.peak, reason))
        else:
            fitting.append(Candidate(choice, predict(models, choice, layout, gpu, workload, rates)))
    fitting.sort(key=lambda candidate: candidate.prediction.seconds)
    misfits.sort(key=lambda misfit: misfit.peak)
    return Search(fitting, misfits, refused)


def check_choice(models: Models, config: Config, num_gpus: int) -> None:
    """ValueError if a run would refuse it."""
    check_config(config, num_gpus)
    architectures = [model for model in (models.student, models.teacher) if model is not None]
    for architecture in architectures:
        check_architecture(architecture, config.parallel)
    check_experts(config, *architectures)


def _choices(models: Models, config: Config, num_gpus: int, gpu: Gpu) -> Iterator[Config]:
    """Every combination whose sizes could divide the GPUs. Tensor parallelism stays within a server."""
    mixture = models.student.mixture
    tensor_sizes = [size for size in (1, 2, 4, 8) if size <= min(num_gpus, gpu.per_node)]
    stages = [size for size in range(1, 17) if models.student.num_hidden_layers % size == 0 and size <= num_gpus]
    experts = [1] if mixture is None else [size for size in (1, 2, 4, 8, 16, 32, 64) if size <= num_gpus]
    recomputes = dict.fromkeys(("none", "full")) if config.training.recompute != "selective" else ("selective",)
    for tensor, pipeline, chunks, context, expert in itertools.product(
        tensor_sizes, stages, (None, 2, 4), (1, 2, 4, 8), experts
    ):
        if num_gpus % (tensor * pipeline * context) or (chunks and pipeline == 1):
            continue
        for expert_tensor in dict.fromkeys((None, 1) if mixture is not None and tensor > 1 else (None,)):
            parallel = _parallel(config.parallel, tensor, pipeline, chunks, context, expert, expert_tensor)
            for recompute, micro_batch in itertools.product(recomputes, MICRO_BATCHES):
                training = replace(config.training, recompute=recompute, micro_batch_size=micro_batch)
                yield replace(config, parallel=parallel, training=training)


def _parallel(
    parallel: ParallelConfig,
    tensor: int,
    pipeline: int,
    chunks: int | None,
    context: int,
    expert: int,
    expert_tensor: int | None,
) -> ParallelConfig:
    return replace(
        parallel,
        tensor_model_parallel_size=tensor,
        sequence_parallel=tensor > 1,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=chunks,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
    )


def _rule(message: str) -> str:
    """A message without its numbers, so that like ones are counted together."""
    return re.sub(r"\d+", "n", re.sub(r" \(\w+\)| = \d+$", "", message))
