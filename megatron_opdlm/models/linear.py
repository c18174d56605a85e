"""Megatron's parallel linear layers, which go straight to the product where there is nothing else to do.

A parallel layer prepares its backward pass and asks other ranks for their part. Without gradients, and with the whole
of the layer on this rank, neither happens; what leads up to it takes as long as the product when a small model decodes.
They stand in Megatron's local layers, under its names and with its weights:

    layer.submodules.self_attention.submodules.linear_proj = RowLinear
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear


class _Direct:
    """Comes before a parallel layer of Megatron's among the bases of a class."""

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`[S, B, inputs]` -> `[S, B, outputs]`, and the bias that is left to the caller to add.

        All ranks of the tensor-parallel group must call it.
        """
        if torch.is_grad_enabled() or self.tp_group.size() > 1:
            return super().forward(input_, *args, **kwargs)
        added, left = (None, self.bias) if self.skip_bias_add else (self.bias, None)
        # Of three dimensions, PyTorch makes one product or many, by strides and by who asks for gradients.
        return F.linear(input_.flatten(0, 1), self.weight, added).unflatten(0, input_.shape[:2]), left


class ColumnLinear(_Direct, ColumnParallelLinear):
    """Cut by outputs."""


class RowLinear(_Direct, RowParallelLinear):
    """Cut by inputs."""


def without_direct_products(modules: Iterable[torch.nn.Module]) -> None:
    """Makes the layers among these modules Megatron's own again, in place.

    nvidia-modelopt quantizes inside Megatron's forward, which a direct product would go past.
    """
    for module in modules:
        for ours, megatrons in ((ColumnLinear, ColumnParallelLinear), (RowLinear, RowParallelLinear)):
            if type(module) is ours:
                module.__class__ = megatrons
