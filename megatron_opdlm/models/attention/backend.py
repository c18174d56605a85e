"""The interface of a block-diffusion attention backend, and the table of backends.

A backend computes the pattern of `diffusion.attention_pattern` for a batch of sequences that come as two streams. The
core attention module is given one at construction, so the kernel is chosen in one place.

Example:

    >>> backend = build_backend("auto", device_type="cpu")
    >>> out_clean, out_noisy = backend.attend(
    ...     query_clean, key_clean, value_clean, query_noisy, key_noisy, value_noisy,
    ...     lengths=lengths_B, block_size=4, scale=head_dim**-0.5,
    ... )

Legend: `B` sequences, `S` positions of one stream, `N` query heads, `G` key-value heads, `D` head dimension.
"""

from __future__ import annotations

import importlib
import logging
from typing import Protocol

import torch

logger = logging.getLogger(__name__)

BACKENDS = {
    "dense": "megatron_opdlm.models.attention.dense:DenseAttention",
    "aten": "megatron_opdlm.models.attention.aten:AtenAttention",
}
"""Name of `attention.backend` -> module and class. A module is imported when its backend is chosen."""


class AttentionBackend(Protocol):
    """A kernel for the student's attention over a clean and a noisy stream; differentiable once."""

    def attend(
        self,
        query_clean: torch.Tensor,
        key_clean: torch.Tensor,
        value_clean: torch.Tensor,
        query_noisy: torch.Tensor,
        key_noisy: torch.Tensor,
        value_noisy: torch.Tensor,
        *,
        lengths: torch.Tensor,
        block_size: int,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attends within each sequence, all of whose tensors start at position 0 of the block grid.

        Args:
            query_clean: [B, S, N, D], of any strides with the last dimension dense; `query_noisy` alike.
            key_clean: [B, S, G, D] with `N % G == 0`; query head `h` reads key-value head `h // (N // G)`.
                `value_clean`, `key_noisy` and `value_noisy` alike.
            lengths: integer [B], real tokens of each sequence; what follows them is padding.
            block_size: positions per block; `S` need not be a multiple of it.
            scale: factor on the scores before the softmax.

        Returns:
            The clean and the noisy output, [B, S, N, D] each, in the input's dtype. At padded positions they are
            finite and otherwise unspecified: no gradient may be sent into them but zero.
        """
        ...


def build_backend(name: str, device_type: str) -> AttentionBackend:
    """The backend called `name` (a key of `BACKENDS`, or `auto`) for tensors on `device_type` ("cpu" or "cuda").

    Raises:
        ValueError: no such backend.
    """
    if name == "auto":
        name = "aten"
        logger.info("attention.backend auto: %s on %s", name, device_type)
    if name not in BACKENDS:
        raise ValueError(f"attention.backend ({name}) must be one of auto, {', '.join(BACKENDS)}")
    module_name, class_name = BACKENDS[name].split(":")
    return getattr(importlib.import_module(module_name), class_name)(device_type)
