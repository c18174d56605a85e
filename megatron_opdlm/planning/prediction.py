"""Seconds of a training step, phase by phase, and what bounds each phase. Predictions: nothing here is measured.

    prediction = predict(models, config, layout, gpu, workload, Rates())
    prediction.seconds, prediction.mfu, prediction.phases["student"].bound

A phase takes as long as its slowest resource where they overlap, and their sum where they do not:
operations of linear layers and attention at a share of the GPU's peak, then what moves tensors through memory, then the
messages that nothing hides; or, if that is longer, launching the kernels one by one. `Rates` has every number that is
assumed, with its reason.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from statistics import fmean

from megatron_opdlm.config.architecture import Qwen3Architecture
from megatron_opdlm.config.schema import Config
from megatron_opdlm.observability import throughput
from megatron_opdlm.observability.hardware import Gpu
from megatron_opdlm.planning.activations import TokenShape
from megatron_opdlm.planning.decode_step import DecodeStep
from megatron_opdlm.planning.decoding import row_imbalance, simulate
from megatron_opdlm.planning.layout import Layout
from megatron_opdlm.planning.memory import GIB, MemoryPlan, Models, num_micro_batches, plan_memory
from megatron_opdlm.planning.rates import Rates, message_seconds
from megatron_opdlm.planning.work import (
    StepFlops,
    layer_messages,
    model_shape,
    optimizer_messages,
    stage_message,
    step_flops,
    whole_blocks,
)
from megatron_opdlm.planning.workload import Workload

NUM_DRAWS = 5
"""Steps with random lengths whose mean a prediction is."""


@dataclass(frozen=True)
class Phase:
    """Part of a training step on the busiest rank."""

    seconds: float
    by_resource: dict[str, float]
    """`compute`, `memory bandwidth`, `network`, `launches`, `waiting` -> seconds, before they overlap."""
    num_bytes: float = 0.0
    """Sent by one rank."""

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(self.by_resource, key=self.by_resource.get)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Of one training step of a layout on a number of GPUs."""

    layout: Layout
    memory: list[MemoryPlan]
    """By pipeline stage."""
    budget: float
    """Bytes that a rank may plan with."""
    phases: dict[str, Phase] = field(default_factory=dict)
    flops: StepFlops
    mfu: float
    """Operations that the method needs over what the GPUs could do in the time."""
    num_decoded_together: int
    """Sequences in a rank's rollout at one time."""
    imbalance: float
    """Tokens of the busiest rank of a global batch over their mean."""
    tokens_per_second: float
    """Response tokens, learned from, of all ranks."""

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases.values())

    @property
    def peak(self) -> float:
        """Bytes in use at most, on the fullest stage."""
        return max(plan.peak for plan in self.memory)

    @property
    def bound(self) -> str:
        """`phase: resource` of the longest phase."""
        name = max(self.phases, key=lambda name: self.phases[name].seconds)
        return f"{name}: {self.phases[name].bound}"


def memory_budget(gpu: Gpu, rates: Rates) -> float:
    """Bytes of a GPU that tensors may take."""
    return (1 - rates.fragmentation) * gpu.memory_gib * GIB - rates.reserved_gib * GIB


def plan_stages(models: Models, config: Config, layout: Layout, workload: Workload) -> list[MemoryPlan]:
    """The first, second and last stage: of those between, the earliest needs most."""
    stages = sorted({0, min(1, layout.pipeline - 1), layout.pipeline - 1})
    return [plan_memory(models, config, layout, workload, stage) for stage in stages]


def predict(models: Models, config: Config, layout: Layout, gpu: Gpu, workload: Workload, rates: Rates) -> Prediction:
    """A step at the full length of responses."""
    memory, budget = plan_stages(models, config, layout, workload), memory_budget(gpu, rates)
    draws = [workload.sample_lengths(workload.num_responses, seed) for seed in range(NUM_DRAWS)]
    phases, num_together = {}, 0
    if config.objective.needs_teacher:
        phases["rollout"], num_together = _rollout(models, config, layout, gpu, workload, rates, memory, budget, draws)
    training, rows_of_rank = config.training, num_micro_batches(config, layout)
    imbalance = fmean(
        row_imbalance(
            [workload.prompt_tokens + length for length in lengths for _ in range(workload.rows_per_response)],
            num_ranks=layout.data_parallel_size,
            global_batch_size=training.global_batch_size * workload.rows_per_response,
            # the interleaved schedule pads all micro-batches of a rank to the widest: they are as one
            micro_batch_size=training.micro_batch_size * (rows_of_rank if layout.chunks > 1 else 1),
            pad_to_multiple=training.pad_to_multiple,
            is_balanced=training.balance_rows,
        )
        for lengths in draws
    )
    passes = _Passes(models, config, layout, gpu, workload, rates, imbalance)
    num_steps = workload.num_responses // training.global_batch_size
    if models.teacher is not None:
        phases["teacher"] = _times(passes.teacher(), num_steps)
    phases["student"] = _times(passes.student(), num_steps)
    phases["optimizer"] = _times(passes.optimizer(phases.get("teacher"), num_steps), num_steps)
    flops, seconds = step_flops(models, config, workload), sum(phase.seconds for phase in phases.values())
    return Prediction(
        layout=layout,
        memory=memory,
        budget=budget,
        phases=phases,
        flops=flops,
        mfu=flops.needed / (seconds * layout.num_ranks * gpu.flops),
        num_decoded_together=num_together,
        imbalance=imbalance,
        tokens_per_second=workload.num_responses * workload.response_tokens / seconds,
    )


def _rollout(
    models: Models,
    config: Config,
    layout: Layout,
    gpu: Gpu,
    workload: Workload,
    rates: Rates,
    memory: list[MemoryPlan],
    budget: float,
    draws: list[list[int]],
) -> tuple[Phase, int]:
    """The mean over the draws of a simulation in which ranks share the work."""
    cache = min(plan.cache_bytes(budget) / plan.cache_bytes_per_token for plan in memory)
    wanted = min(config.rollout.batch_size, -(-workload.num_responses // layout.rollout_size))
    num_slots = max(1, min(wanted, int(cache / (workload.prompt_tokens + workload.response_tokens))))
    step = DecodeStep(models, config, layout, gpu, workload, rates)
    seconds_per_forward = functools.cache(step.seconds)
    ways = [
        simulate(
            lengths,
            num_ranks=layout.rollout_size,
            num_slots=num_slots,
            seconds_per_forward=seconds_per_forward,
            tokens_per_step=workload.tokens_per_step,
        )
        for lengths in draws
    ]
    seconds, busy = fmean(way.seconds for way in ways), fmean(fmean(way.seconds_by_rank) for way in ways)
    typical = step.by_resource(max(1, round(fmean(way.mean_active for way in ways))))
    forwards = busy / seconds_per_forward(max(1, round(fmean(way.mean_active for way in ways))))
    by_resource = {name: forwards * value for name, value in typical.items()}
    return Phase(seconds, by_resource | {"waiting": seconds - busy}), num_slots


def _times(phase: Phase, number: int) -> Phase:
    by_resource = {name: number * value for name, value in phase.by_resource.items()}
    return Phase(number * phase.seconds, by_resource, number * phase.num_bytes)


class _Passes:
    """Forward and backward passes of one optimizer step, over the micro-batches of the busiest rank."""

    def __init__(
        self,
        models: Models,
        config: Config,
        layout: Layout,
        gpu: Gpu,
        workload: Workload,
        rates: Rates,
        imbalance: float,
    ) -> None:
        self.models, self.config, self.layout, self.gpu, self.rates = models, config, layout, gpu, rates
        self.workload, self.imbalance = workload, imbalance
        self.rows = config.training.micro_batch_size
        tokens = workload.prompt_tokens + workload.response_tokens
        self.row = whole_blocks(tokens, workload.block_size)
        self.trained = workload.trained_share * workload.response_tokens
        self.num_micro_batches = num_micro_batches(config, layout)
        self.itemsize = 4 if config.precision.dtype == "float32" else 2

    def teacher(self) -> Phase:
        """A forward without gradients, with the logits that the loss asks for."""
        shape = model_shape(self.models.teacher)
        streams = 2 if self.config.teacher.fill == "argmax" else 1
        pairs = streams * throughput.causal_pairs(self.row)
        phase = self._pipeline(
            self.models.teacher, streams, pairs, self.config.precision.teacher_fp8, num_passes=1, num_matmul_passes=1
        )
        if not self.config.teacher.offload:
            return phase
        copied = throughput.num_parameters(shape, False) * self.itemsize / self.layout.tensor / self.layout.pipeline
        seconds = copied / self.rates.host_bandwidth
        return Phase(phase.seconds + seconds, phase.by_resource | {"host memory": seconds}, phase.num_bytes)

    def student(self) -> Phase:
        """Both streams forward and backward; with full recompute the layers' forward once more."""
        again = 1 if self.config.training.recompute == "full" else 0
        pairs = 2 * throughput.block_causal_pairs(self.row, self.workload.block_size)
        return self._pipeline(
            self.models.student, 2, pairs, self.config.precision.fp8, num_passes=3, num_matmul_passes=3 + again
        )

    def _pipeline(
        self,
        architecture: Qwen3Architecture,
        streams: int,
        pairs: int,
        fp8: str,
        num_passes: int,
        num_matmul_passes: int,
    ) -> Phase:
        """All micro-batches through all stages. `num_passes`: 1 forward; 3 with a backward, which is twice one."""
        layout, gpu, rates, shape = self.layout, self.gpu, self.rates, model_shape(architecture)
        shards = layout.tensor * layout.context * layout.pipeline
        peak = gpu.fp8_flops if fp8 != "off" and gpu.fp8_flops else gpu.flops
        linear = throughput.linear_flops(shape, streams * self.row) / shards / (peak * rates.matmul)
        attention = throughput.attention_flops(shape, pairs) / shards / (gpu.flops * rates.attention)
        head = throughput.head_flops(shape, round(self.trained)) / (layout.tensor * layout.context)
        compute = self.rows * (
            num_matmul_passes * (linear + attention) + num_passes * head / (gpu.flops * rates.matmul)
        )
        tokens = self.rows * streams * self.row / layout.context
        layers = architecture.num_hidden_layers / layout.pipeline
        token = TokenShape.of(architecture, layout, self.models.layers, self.itemsize)
        moved = 2 * num_matmul_passes * tokens * layers * token.layer_bytes()
        memory = moved / (gpu.memory_bandwidth * rates.memory)
        messages = layer_messages(architecture, layout, tokens, self.itemsize)
        to_next = stage_message(architecture, layout, tokens, self.itemsize)
        network = num_matmul_passes * layers * sum(message_seconds(m, layout, gpu, rates) for m in messages)
        sent = num_matmul_passes * layers * sum(message.num_bytes for message in messages)
        if to_next is not None:
            network += min(num_passes, 2) * message_seconds(to_next, layout, gpu, rates)
            sent += min(num_passes, 2) * to_next.num_bytes
        launches = layers * num_matmul_passes * rates.launch_seconds(architecture.mixture is not None)
        one = max(self.imbalance * (compute + memory + network), launches)
        rounds, idle = self.num_micro_batches, (layout.pipeline - 1) / layout.chunks
        by_resource = {
            "compute": rounds * compute,
            "memory bandwidth": rounds * memory,
            "network": rounds * network,
            "launches": rounds * launches,
            "waiting": idle * one + rounds * (self.imbalance - 1) * (compute + memory + network),
        }
        return Phase((rounds + idle) * one, by_resource, rounds * sent)

    def optimizer(self, teacher: Phase | None, num_steps: int) -> Phase:
        """The update, and of reducing gradients and gathering weights what nothing hides."""
        layout, gpu, rates, parallel = self.layout, self.gpu, self.rates, self.config.parallel
        to_reduce, to_gather = optimizer_messages(self.models, self.config, layout, stage=0)
        reducing, gathering = (
            sum(message_seconds(message, layout, gpu, rates) for message in messages)
            for messages in (to_reduce, to_gather)
        )
        if parallel.overlap_grad_reduce:  # beside the backward pass of the last micro-batch
            reducing = max(0.0, reducing - 2 / 3 * self.student().seconds / self.num_micro_batches)
        if parallel.overlap_param_gather and teacher is not None:
            gathering = max(0.0, gathering - teacher.seconds / num_steps)
        elements = sum(plan.parts["optimizer"] for plan in self._first_stage()) / (8 if self.itemsize == 4 else 12)
        updating = rates.update_bytes * elements / (gpu.memory_bandwidth * rates.memory)
        seconds = updating + reducing + gathering + rates.seconds_per_update
        by_resource = {
            "memory bandwidth": updating,
            "network": reducing + gathering,
            "launches": rates.seconds_per_update,
        }
        return Phase(seconds, by_resource, sum(m.num_bytes for m in [*to_reduce, *to_gather]))

    def _first_stage(self) -> list[MemoryPlan]:
        return [plan_memory(self.models, self.config, self.layout, self.workload, stage=0)]
