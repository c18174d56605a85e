"""Floating-point operations of a training step, from plain integers.

    shape = ModelShape(num_layers=36, hidden_size=4096, num_attention_heads=32, num_query_groups=8, head_dim=128,
                       ffn_hidden_size=12288, vocab_size=151936)
    num_parameters(shape, tied_embeddings=False)                            # 8190735360, Qwen3-8B
    paper_flops(8_000_000_000, 8_000_000_000, 66_000_000)                   # 4.2e18, the paper's account

A multiplication and an addition count as two operations. Norms, RoPE, softmax and the embedding look-up are left out
(well below 1 %), and so is padding: this is the work the method needs, not what a kernel does with it. Attention counts
the pairs (query, key) that may attend each other. In the formulas T: tokens of a terminal sequence, K: block size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_opdlm.observability.hardware import GPUS


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What decides the cost of a forward. Names are Megatron's."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int
    """Of one expert, where there are several."""
    vocab_size: int
    num_experts: int = 1
    """Of each layer. One, the MLP, has no router."""
    num_experts_per_token: int = 1
    has_qk_norm: bool = True
    has_qkv_bias: bool = False


def matrix_weights_per_layer(shape: ModelShape) -> int:
    """Weights of the matrices of one layer that a token meets: query, key, value and output projections, the three of
    the gated MLP or of each of the token's experts, and the router."""
    query_heads, key_value_heads = shape.num_attention_heads, 2 * shape.num_query_groups
    attention = (2 * query_heads + key_value_heads) * shape.head_dim * shape.hidden_size
    router = shape.num_experts if shape.num_experts > 1 else 0
    return attention + shape.hidden_size * (3 * shape.num_experts_per_token * shape.ffn_hidden_size + router)


def num_parameters(shape: ModelShape, tied_embeddings: bool) -> int:
    """All parameters of a model of this shape, norms, biases and embeddings included."""
    idle_experts = shape.num_experts - shape.num_experts_per_token
    idle = 3 * shape.num_layers * idle_experts * shape.hidden_size * shape.ffn_hidden_size
    return num_active_parameters(shape, tied_embeddings) + idle


def num_active_parameters(shape: ModelShape, tied_embeddings: bool) -> int:
    """The parameters that one token meets, all of them in a dense model: the N of the paper's account."""
    vectors_per_layer = 2 * shape.hidden_size
    if shape.has_qk_norm:
        vectors_per_layer += 2 * shape.head_dim
    if shape.has_qkv_bias:
        vectors_per_layer += (shape.num_attention_heads + 2 * shape.num_query_groups) * shape.head_dim
    embeddings = (1 if tied_embeddings else 2) * shape.vocab_size * shape.hidden_size
    layers = shape.num_layers * (matrix_weights_per_layer(shape) + vectors_per_layer)
    return layers + shape.hidden_size + embeddings


def paper_flops(num_student_parameters: int, num_teacher_parameters: int, num_response_tokens: int) -> int:
    """The paper's account, `6 N_s T + 2 N_t T`: T counted response tokens, no prompts, no noisy stream, no rollout."""
    return (6 * num_student_parameters + 2 * num_teacher_parameters) * num_response_tokens


def linear_flops(shape: ModelShape, num_tokens: int) -> int:
    """All layers' matrices applied to `num_tokens` tokens, forward only."""
    return 2 * shape.num_layers * matrix_weights_per_layer(shape) * num_tokens


def attention_flops(shape: ModelShape, num_pairs: int) -> int:
    """Scores and weighted values of `num_pairs` pairs (query, key) in every layer and head, forward only."""
    return 4 * shape.num_layers * shape.num_attention_heads * shape.head_dim * num_pairs


def head_flops(shape: ModelShape, num_positions: int) -> int:
    """Logits over the vocabulary at `num_positions` positions, forward only."""
    return 2 * shape.hidden_size * shape.vocab_size * num_positions


def causal_pairs(num_tokens: int) -> int:
    """Every token attends itself and all before it."""
    return num_tokens * (num_tokens + 1) // 2


def block_causal_pairs(num_tokens: int, block_size: int) -> int:
    """Every token attends its own block and all before it; `num_tokens` is whole blocks.

    Block b has K queries with (b + 1) K keys each; the sum over T / K blocks is T (T + K) / 2. A noisy stream, whose
    tokens attend their own noisy block and the clean ones before it, has as many.
    """
    assert num_tokens % block_size == 0, "sequences are whole blocks"
    return num_tokens * (num_tokens + block_size) // 2


def student_training_flops(shape: ModelShape, num_tokens: int, num_trained: int, block_size: int) -> int:
    """Forward and backward (twice a forward) of the clean and the noisy stream of one row, logits where trained."""
    streams = linear_flops(shape, 2 * num_tokens) + attention_flops(
        shape, 2 * block_causal_pairs(num_tokens, block_size)
    )
    return 3 * (streams + head_flops(shape, num_trained))


def teacher_flops(shape: ModelShape, num_tokens: int, num_trained: int) -> int:
    """One causal forward over a terminal sequence, logits where trained."""
    layers = linear_flops(shape, num_tokens) + attention_flops(shape, causal_pairs(num_tokens))
    return layers + head_flops(shape, num_trained)


def rollout_flops(
    shape: ModelShape, prompt_length: int, steps_per_block: Sequence[int], num_predictions: int, block_size: int
) -> int:
    """Decoding of one sequence with a key-value cache.

    `steps_per_block` has the denoising steps of each block from the one that holds the end of the prompt; each step
    runs the block's K positions against everything before and themselves. Prompt blocks before are prefilled; each
    decoded block but the last runs once more, clean, to enter the cache. `num_predictions` counts the logits rows:
    every masked position in every step, that is the sum of the step map.
    """
    prefilled = prompt_length // block_size * block_size
    in_cache = prefilled + block_size * max(len(steps_per_block) - 1, 0)
    tokens, pairs = in_cache, block_causal_pairs(in_cache, block_size)
    for index, num_steps in enumerate(steps_per_block):
        tokens += num_steps * block_size
        pairs += num_steps * block_size * (prefilled + (index + 1) * block_size)
    return linear_flops(shape, tokens) + attention_flops(shape, pairs) + head_flops(shape, num_predictions)


def roofline_seconds(device_name: str, flops: float, num_bytes: float) -> float | None:
    """The least time a GPU needs for the work and for moving the bytes, whichever is longer; None for unknown GPUs."""
    gpu = next((gpu for gpu in GPUS.values() if gpu.device_name in device_name), None)
    return None if gpu is None else max(flops / gpu.flops, num_bytes / gpu.memory_bandwidth)
