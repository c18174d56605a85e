"""RMSNorm with the numerics of Hugging Face's Qwen3, for Megatron's local layers.

Megatron's own wrapper around torch's norm refuses sequence parallelism. Under it each rank sees part of the sequence,
so the weight is marked and Megatron sums its gradient over the tensor-parallel group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
        if torch.is_grad_enabled():
            return self.weight * normalised(hidden, self.eps)
        return normalised(hidden, self.eps).mul_(self.weight)


def normalised(hidden: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / rms(x)` over the last dimension, before any weight."""
    return F.rms_norm(hidden, hidden.shape[-1:], None, eps)


def _device(config: TransformerConfig) -> torch.device | int | None:
    return None if config.use_cpu_initialization else torch.cuda.current_device()
