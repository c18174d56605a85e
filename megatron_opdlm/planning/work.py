"""Operations and messages of a training step, phase by phase, by the rules of `observability.throughput`.

    flops = step_flops(models, config, workload)
    flops.rollout, flops.teacher, flops.student, flops.recompute                # of all ranks together

The first three are what the method needs, as a run's metrics count it; `recompute` is what `training.recompute` adds.
Messages are bytes that one rank sends, for one micro-batch or one optimizer step, each with the group it goes over.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_opdlm.config.architecture import Qwen3Architecture
from megatron_opdlm.config.schema import Config
from megatron_opdlm.observability import throughput
from megatron_opdlm.planning.layout import Layout
from megatron_opdlm.planning.memory import Models
from megatron_opdlm.planning.parameters import gradient_buffers
from megatron_opdlm.planning.workload import Workload


def model_shape(architecture: Qwen3Architecture) -> throughput.ModelShape:
    """What decides the operations of a model."""
    mixture = architecture.mixture
    return throughput.ModelShape(
        num_layers=architecture.num_hidden_layers,
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_key_value_heads,
        head_dim=architecture.head_dim,
        ffn_hidden_size=architecture.intermediate_size if mixture is None else mixture.moe_intermediate_size,
        num_experts=1 if mixture is None else mixture.num_experts,
        num_experts_per_token=1 if mixture is None else mixture.num_experts_per_tok,
        vocab_size=architecture.vocab_size,
        has_qk_norm=architecture.qk_norm,
        has_qkv_bias=architecture.qkv_bias,
    )


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Floating-point operations of a whole training step on all ranks."""

    rollout: float
    teacher: float
    student: float
    """Forward and backward."""
    recompute: float

    @property
    def needed(self) -> float:
        """Of the method: what model FLOPs utilisation counts."""
        return self.rollout + self.teacher + self.student


def step_flops(models: Models, config: Config, workload: Workload) -> StepFlops:
    """Of sequences of the mean length, times their number."""
    num_rows = workload.num_responses * workload.rows_per_response
    tokens = whole_blocks(workload.prompt_tokens + workload.response_tokens, workload.block_size)
    trained = round(workload.trained_share * workload.response_tokens)
    shape = model_shape(models.student)
    teacher = 0
    if models.teacher is not None:
        teacher = num_rows * throughput.teacher_flops(model_shape(models.teacher), tokens, trained)
    recompute = 0
    if config.training.recompute == "full":
        pairs = 2 * throughput.block_causal_pairs(tokens, workload.block_size)
        recompute = throughput.linear_flops(shape, 2 * tokens) + throughput.attention_flops(shape, pairs)
    return StepFlops(
        rollout=workload.num_responses * rollout_flops(models, config, workload),
        teacher=teacher,
        student=num_rows * throughput.student_training_flops(shape, tokens, trained, workload.block_size),
        recompute=num_rows * recompute,
    )


def rollout_flops(models: Models, config: Config, workload: Workload) -> float:
    """Of one sequence of the mean length. A fraction of a denoising step is a fraction of its cost."""
    if not config.objective.needs_teacher:
        return 0.0
    num_blocks = whole_blocks(workload.response_tokens, workload.block_size) // workload.block_size
    predictions = round(workload.response_tokens * (workload.steps_per_block + 1) / 2)

    def with_steps(steps: int) -> float:
        return throughput.rollout_flops(
            model_shape(models.student),
            whole_blocks(workload.prompt_tokens, workload.block_size),
            [steps] * num_blocks,
            predictions,
            workload.block_size,
        )

    below = int(workload.steps_per_block)
    part = workload.steps_per_block - below
    return (1 - part) * with_steps(below) + part * with_steps(below + 1)


def whole_blocks(num_tokens: float, block_size: int) -> int:
    """Tokens rounded up to the block grid."""
    return -(-round(num_tokens) // block_size) * block_size


@dataclass(frozen=True, kw_only=True)
class Message:
    """Bytes that one rank sends over a group."""

    name: str
    num_bytes: float
    stride: int
    size: int
    is_exchange: bool = False
    """All to all, instead of a reduction or a gathering in a ring."""
    num_collectives: int = 1
    """That share the bytes, one after the other: each has its latency."""


def layer_messages(architecture: Qwen3Architecture, layout: Layout, num_tokens: float, itemsize: int) -> list[Message]:
    """What one layer's forward sends for `num_tokens` tokens of a context-parallel rank; its backward sends as much.

    Tensor parallelism: an all-reduce behind attention and one behind the MLP, or as a gathering before and a
    reduce-scatter behind under sequence parallelism, which is as much. Context parallelism: queries, keys and values to
    the rank that has their heads, and outputs back. A mixture's experts have messages of their own.
    """
    stream, found = num_tokens * architecture.hidden_size * itemsize, []
    if layout.tensor > 1:
        share = (layout.tensor - 1) / layout.tensor
        num_reduced = 1 if architecture.mixture is not None else 2
        found.append(
            Message(
                name="tensor",
                num_bytes=num_reduced * 2 * share * stream,
                stride=1,
                size=layout.tensor,
                num_collectives=num_reduced * (2 if layout.sequence_parallel else 1),
            )
        )
    if layout.context > 1:
        heads = 2 * architecture.num_attention_heads + 2 * architecture.num_key_value_heads
        moved = num_tokens * heads * architecture.head_dim // layout.tensor * itemsize
        found.append(
            Message(
                name="context",
                num_bytes=moved * (layout.context - 1) / layout.context,
                stride=layout.tensor,
                size=layout.context,
                is_exchange=True,
                num_collectives=2,
            )
        )
    return found + _expert_messages(architecture, layout, stream)


def _expert_messages(architecture: Qwen3Architecture, layout: Layout, stream: float) -> list[Message]:
    """Of a mixture (`MoEAlltoAllTokenDispatcher` in Megatron-Core's transformer/moe/token_dispatcher.py): a copy of
    each token for each of its experts goes to the ranks that have them, and back; and where ranks share every expert,
    each of these gathers the copies of all, and their outputs are reduced and scattered. Counts and weights of the
    copies are messages too, of next to no bytes."""
    mixture, found = architecture.mixture, []
    if mixture is None:
        return found
    copies = stream * mixture.num_experts_per_tok / (layout.tensor if layout.sequence_parallel else 1)
    if layout.expert > 1:
        found.append(
            Message(
                name="expert",
                num_bytes=2 * copies * (layout.expert - 1) / layout.expert,
                stride=layout.expert_tensor,
                size=layout.expert,
                is_exchange=True,
                num_collectives=4,
            )
        )
    if layout.expert_tensor > 1:
        found.append(
            Message(
                name="expert tensor",
                num_bytes=2 * copies * (layout.expert_tensor - 1),
                stride=1,
                size=layout.expert_tensor,
                num_collectives=3,
            )
        )
    return found


def optimizer_messages(
    models: Models, config: Config, layout: Layout, stage: int
) -> tuple[list[Message], list[Message]]:
    """Of one optimizer step: the reduction of float32 gradients, and the gathering of updated weights."""
    itemsize, gradients, weights = (4 if config.precision.dtype == "float32" else 2), [], []
    padded, overlap = models.padded_vocab_size(config), config.parallel.overlap_grad_reduce
    for buffer in gradient_buffers(models.student, layout, padded, stage, overlap):
        size = buffer.num_ranks
        if size == 1:
            continue
        is_expert = size != layout.optimizer_size
        stride = layout.expert_tensor * layout.expert if is_expert else layout.stride_of_data
        moved = buffer.num_elements * (size - 1) / size
        gradients.append(Message(name="gradients", num_bytes=4 * moved, stride=stride, size=size))
        weights.append(Message(name="weights", num_bytes=itemsize * moved, stride=stride, size=size))
    return gradients, weights


def stage_message(architecture: Qwen3Architecture, layout: Layout, num_tokens: float, itemsize: int) -> Message | None:
    """What a pipeline stage hands to the next one for a micro-batch; None with one stage."""
    if layout.pipeline == 1:
        return None
    part = layout.tensor if layout.sequence_parallel else 1
    num_bytes = num_tokens * architecture.hidden_size * itemsize / part
    stride = layout.num_ranks // layout.pipeline
    return Message(name="pipeline", num_bytes=num_bytes * layout.chunks, stride=stride, size=layout.pipeline)
