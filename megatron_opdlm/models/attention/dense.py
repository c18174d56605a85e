"""Block-diffusion attention with the whole boolean mask and an eager softmax: the slow backend that is easy to trust.

It holds `[B, N, 2S, 2S]` scores, so it serves tests and short sequences; autograd does the backward.

Legend: `B` sequences, `S` positions of one stream, `N` query heads, `G` key-value heads, `D` head dimension.
"""

from __future__ import annotations

import torch

from megatron_opdlm.diffusion.attention_pattern import block_diffusion_mask
from megatron_opdlm.models.attention.backend import AttentionBackend, AttentionCase, Pair, Streams


class DenseAttention(AttentionBackend):
    """The oracle of the other backends, on any device and in any precision but FP8."""

    @classmethod
    def refusal(cls, case: AttentionCase) -> str | None:
        """See `AttentionBackend.refusal`."""
        if case.fp8:
            return "attention.fp8 (true) needs attention.backend te"
        if case.kernel != "auto":
            return f"attention.kernel ({case.kernel}) must be auto: it has one kernel"
        return None

    def __init__(self, case: AttentionCase) -> None: ...

    def attend(self, streams: Streams, *, lengths: torch.Tensor, block_size: int, scale: float) -> Pair:
        """See `AttentionBackend.attend`. Padded rows attend themselves alone."""
        mask = block_diffusion_mask(lengths, streams.query_clean.shape[1], block_size)
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(streams[:3], streams[3:], strict=True))
        return masked_attention(query, key, value, mask, scale).chunk(2, dim=1)


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Softmax attention [B, T, N, D] under a mask [B, T, T], computed in float32 or float64 if that is the input."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    num_groups = key.shape[2]
    grouped_query = query.to(dtype).unflatten(2, (num_groups, -1))
    scores = torch.einsum("bqgnd,bkgd->bgnqk", grouped_query, key.to(dtype)) * scale
    probabilities = scores.masked_fill(~mask[:, None, None], float("-inf")).softmax(dim=-1)
    return torch.einsum("bgnqk,bkgd->bqgnd", probabilities, value.to(dtype)).flatten(2, 3).to(query.dtype)
