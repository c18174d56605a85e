"""What a layout needs of the shape of a model: sizes that divide its layers, heads, matrices and experts.

check_architecture(architecture, ParallelConfig(tensor_model_parallel_size=16))    # ValueError: 8 key-value heads
"""

from __future__ import annotations

from megatron_opdlm.config.architecture import Mixture, Qwen3Architecture
from megatron_opdlm.config.schema import Config, ParallelConfig


def check_architecture(architecture: Qwen3Architecture, parallel: ParallelConfig) -> None:
    """ValueError names the size that does not divide what it cuts."""
    num_chunks = parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)
    if architecture.num_hidden_layers % num_chunks:
        raise ValueError(
            "parallel.pipeline_model_parallel_size x parallel.virtual_pipeline_model_parallel_size "
            f"({num_chunks}) must divide num_hidden_layers ({architecture.num_hidden_layers})"
        )
    size, mixture = parallel.tensor_model_parallel_size, architecture.mixture
    for name in ("num_attention_heads", "num_key_value_heads", *(["intermediate_size"] if mixture is None else [])):
        _check_divides("tensor_model_parallel_size", size, name, getattr(architecture, name))
    heads_by_rank = architecture.num_key_value_heads // size
    if heads_by_rank % parallel.context_parallel_size:
        raise ValueError(
            f"parallel.context_parallel_size ({parallel.context_parallel_size}) must divide num_key_value_heads "
            f"({architecture.num_key_value_heads}) / parallel.tensor_model_parallel_size ({size}) = {heads_by_rank}"
        )
    if mixture is not None:
        _check_mixture(mixture, parallel)


def check_experts(config: Config, *architectures: Qwen3Architecture) -> None:
    """ValueError if experts are to be shared out and no model has any."""
    size = config.parallel.expert_model_parallel_size
    if size > 1 and all(architecture.mixture is None for architecture in architectures):
        raise ValueError(
            f"parallel.expert_model_parallel_size ({size}) must be 1: neither student nor teacher has experts"
        )


def _check_mixture(mixture: Mixture, parallel: ParallelConfig) -> None:
    size, expert_size = parallel.tensor_model_parallel_size, parallel.expert_tensor_parallel_size
    if size > 1 and not parallel.sequence_parallel:
        raise ValueError(
            "parallel.sequence_parallel (false) must be true for a mixture of experts under "
            f"parallel.tensor_model_parallel_size ({size})"
        )
    _check_divides(
        "expert_model_parallel_size", parallel.expert_model_parallel_size, "num_experts", mixture.num_experts
    )
    setting = "tensor_model_parallel_size" if expert_size is None else "expert_tensor_parallel_size"
    _check_divides(setting, expert_size or size, "moe_intermediate_size", mixture.moe_intermediate_size)


def _check_divides(setting: str, size: int, name: str, value: int) -> None:
    if value % size:
        raise ValueError(f"parallel.{setting} ({size}) must divide {name} ({value})")
