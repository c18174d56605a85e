"""Block-diffusion attention with the whole boolean mask and an eager softmax: the slow backend that is easy to trust.

It holds `[B, N, 2S, 2S]` scores, so it serves tests and short sequences; autograd does the backward.

Legend: `B` sequences, `S` positions of one stream, `N` query heads, `G` key-value heads, `D` head dimension.
"""

from __future__ import annotations

import torch

from megatron_opdlm.diffusion.attention_pattern import block_diffusion_mask


class DenseAttention:
    """The oracle of the other backends, on any device. See `AttentionBackend.attend`."""

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type

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
        """See `AttentionBackend.attend`. Padded rows attend themselves alone."""
        mask = block_diffusion_mask(lengths, query_clean.shape[1], block_size)
        query = torch.cat((query_clean, query_noisy), dim=1)
        key = torch.cat((key_clean, key_noisy), dim=1)
        value = torch.cat((value_clean, value_noisy), dim=1)
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
