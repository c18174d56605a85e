"""RMSNorm with the numerics of Hugging Face's Qwen3, for Megatron's local layers.

Megatron's own wrapper around torch's norm refuses sequence parallelism. Under it each rank sees part of the sequence,
so the weight is marked and Megatron sums its gradient over the tensor-parallel group.
"""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig


class RMSNorm(torch.nn.Module):
    """`weight * x / rms(x)`, statistics in float32 at least; the constructor takes what Megatron's specs pass."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=_device(config)))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., hidden_size], normalised over the last dimension."""
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normalised.to(hidden.dtype)


def _device(config: TransformerConfig) -> torch.device | int | None:
    return None if config.use_cpu_initialization else torch.cuda.current_device()
