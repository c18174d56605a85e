"""The residual connection around attention, which leaves out tokens whose outputs nobody reads.

While the student decodes, its last layer owes the cache the keys and values of every token, and nobody but the output
layer its outputs: those of clean tokens and of committed positions go nowhere. There, attention returns the rows that
are read, and this connection takes the same rows of what it adds them to. The MLP and the final norm behind it then
have these alone to work on.

    layer.submodules.self_attn_bda = AttentionResidual          # in a layer's spec
    block.layers[-1].self_attn_bda.cache = cache                # by `rollout.kv_cache.attached`
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add


class OutputSelection(Protocol):
    """What knows which outputs are read."""

    def outputs_read(self, rows_T: torch.Tensor) -> torch.Tensor:
        """Of a tensor with a row for each token, the rows of tokens whose outputs are read."""
        ...


class AttentionResidual:
    """Stands for Megatron's `get_bias_dropout_add`, and is that as long as no cache is attached."""

    def __init__(self) -> None:
        self.cache: OutputSelection | None = None

    def __call__(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        """A function of attention's output with its bias, of what it is added to, and of the dropout probability."""
        add = get_bias_dropout_add(training, fused)
        if self.cache is None:
            return add
        return lambda out_with_bias, residual, prob: add(out_with_bias, self.cache.outputs_read(residual), prob)
