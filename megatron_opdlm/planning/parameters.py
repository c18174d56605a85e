"""The parameters that a rank holds, one by one, and the buffers that Megatron makes of them. Exact, to the byte.

    chunks = rank_parameters(architecture, layout, padded_vocab_size, stage=0)
    buffers = gradient_buffers(architecture, layout, padded_vocab_size, stage=0, overlap_grad_reduce=True)
    sum(buffer.num_elements for buffer in buffers)              # gradients that the rank allocates, with padding

The order is that of `named_parameters` of Megatron's local layers, since padding depends on it: Megatron-Core's
`_ParamAndGradBuffer` (core/distributed/param_and_grad_buffer.py) fills its buffers from the last parameter to the
first, each beginning at a multiple of 64 elements, and each bucket ending at a multiple of 128 and of the ranks that
share it.
Transformer Engine's layers hold as many numbers in another order; their padding may differ by some hundred elements.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_opdlm.config.architecture import Qwen3Architecture
from megatron_opdlm.planning.layout import Layout

START, END = 64, 128
"""Elements that a parameter's begin and a bucket's end are rounded up to."""
BUCKET, BUCKET_PER_RANK = 40_000_000, 1_000_000
"""Elements of a bucket at least, and for each data-parallel rank."""


@dataclass(frozen=True)
class Parameter:
    """A tensor of a rank."""

    name: str
    num_elements: int
    is_expert: bool = False
    is_shared_embedding: bool = False
    """Tied to the one of another stage: it has a bucket of its own."""


@dataclass(frozen=True)
class Buffer:
    """Parameters of one kind in one chunk, side by side with their padding."""

    num_elements: int
    num_shared_out: int
    """Of its parameters without padding, those that the first rank of `num_ranks` updates."""
    num_ranks: int


@functools.lru_cache(maxsize=4096)
def rank_parameters(
    architecture: Qwen3Architecture, layout: Layout, padded_vocab_size: int, stage: int
) -> tuple[tuple[Parameter, ...], ...]:
    """What each chunk of layers of a pipeline stage holds on any one of its ranks."""
    num_chunks = layout.pipeline * layout.chunks
    layers_of_chunk = architecture.num_hidden_layers // num_chunks
    return tuple(
        tuple(
            _chunk(
                architecture,
                layout,
                padded_vocab_size // layout.tensor * architecture.hidden_size,
                layers_of_chunk,
                is_first=stage == 0 and place == 0,
                is_last=stage == layout.pipeline - 1 and place == layout.chunks - 1,
            )
        )
        for place in range(layout.chunks)
    )


def _chunk(
    architecture: Qwen3Architecture, layout: Layout, vocabulary: int, num_layers: int, is_first: bool, is_last: bool
) -> Iterator[Parameter]:
    tied = architecture.tie_word_embeddings
    if is_first:
        yield Parameter("embedding", vocabulary, is_shared_embedding=tied and not is_last)
    for layer in range(num_layers):
        yield from _layer(architecture, layout, f"layers.{layer}.")
    if is_last:
        yield Parameter("final_layernorm", architecture.hidden_size)
        if not (tied and is_first):
            yield Parameter("output_layer", vocabulary, is_shared_embedding=tied)


def _layer(architecture: Qwen3Architecture, layout: Layout, prefix: str) -> Iterator[Parameter]:
    hidden, head_dim, size = architecture.hidden_size, architecture.head_dim, layout.tensor
    query = architecture.num_attention_heads * head_dim // size
    all_heads = query + 2 * architecture.num_key_value_heads * head_dim // size
    yield Parameter(prefix + "input_layernorm", hidden)
    yield Parameter(prefix + "linear_proj", hidden * query)
    yield Parameter(prefix + "linear_qkv", hidden * all_heads)
    if architecture.qkv_bias:
        yield Parameter(prefix + "linear_qkv.bias", all_heads)
    if architecture.qk_norm:
        yield Parameter(prefix + "q_layernorm", head_dim)
        yield Parameter(prefix + "k_layernorm", head_dim)
    yield Parameter(prefix + "pre_mlp_layernorm", hidden)
    mixture = architecture.mixture
    if mixture is None:
        yield Parameter(prefix + "linear_fc1", 2 * hidden * architecture.intermediate_size // size)
        yield Parameter(prefix + "linear_fc2", hidden * architecture.intermediate_size // size)
        return
    yield Parameter(prefix + "router", mixture.num_experts * hidden)
    matrix = hidden * mixture.moe_intermediate_size // layout.expert_tensor
    # where nobody shares experts out, Megatron reduces their gradients with all others
    is_expert = layout.expert > 1
    for expert in range(mixture.num_experts // layout.expert):
        yield Parameter(f"{prefix}experts.{expert}.linear_fc1", 2 * matrix, is_expert)
        yield Parameter(f"{prefix}experts.{expert}.linear_fc2", matrix, is_expert)


@functools.lru_cache(maxsize=4096)
def count(architecture: Qwen3Architecture, layout: Layout, padded_vocab_size: int, stage: int) -> int:
    """Elements of a rank, without padding."""
    chunks = rank_parameters(architecture, layout, padded_vocab_size, stage)
    return sum(parameter.num_elements for chunk in chunks for parameter in chunk)


@functools.lru_cache(maxsize=4096)
def largest(architecture: Qwen3Architecture, layout: Layout, padded_vocab_size: int, stage: int) -> int:
    """Elements of a rank's largest parameter."""
    chunks = rank_parameters(architecture, layout, padded_vocab_size, stage)
    return max(parameter.num_elements for chunk in chunks for parameter in chunk)


@functools.lru_cache(maxsize=4096)
def gradient_buffers(
    architecture: Qwen3Architecture, layout: Layout, padded_vocab_size: int, stage: int, overlap_grad_reduce: bool
) -> tuple[Buffer, ...]:
    """Megatron's buffers of a stage's chunks; experts that are shared out have buffers of their own."""
    chunks = rank_parameters(architecture, layout, padded_vocab_size, stage)
    whole = max(BUCKET, BUCKET_PER_RANK * layout.data_parallel_size)
    found = []
    for place, chunk in enumerate(chunks):
        bucket_size = whole if overlap_grad_reduce and stage == 0 and place == 0 else None
        for is_expert, num_ranks in ((False, layout.optimizer_size), (True, layout.expert_optimizer_size)):
            kind = [parameter for parameter in chunk if parameter.is_expert == is_expert]
            if kind:
                found.append(_fill(kind, num_ranks, bucket_size))
    return tuple(found)


def _fill(parameters: list[Parameter], num_ranks: int, bucket_size: int | None) -> Buffer:
    end = bucket_start = num_first = 0
    pending: list[tuple[int, int]] = []

    def close(bucket_end: int) -> int:
        """Ends a bucket; of it the first rank updates what lies in its first part."""
        nonlocal bucket_start, num_first, pending
        padded = _round_up(bucket_end, math.lcm(num_ranks, END))
        first_part = bucket_start + (padded - bucket_start) // num_ranks
        num_first += sum(max(0, min(stop, first_part) - start) for start, stop in pending)
        bucket_start, pending = padded, []
        return padded

    for parameter in reversed(parameters):
        start = _round_up(end, START)
        if parameter.is_shared_embedding and pending:
            start = close(start)
        end = start + parameter.num_elements
        pending.append((start, end))
        if parameter.is_shared_embedding or (bucket_size is not None and end - bucket_start >= bucket_size):
            end = close(end)
    return Buffer(close(end) if pending else end, num_first, num_ranks)


def _round_up(value: int, divisor: int) -> int:
    return -(-value // divisor) * divisor
