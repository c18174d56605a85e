"""The part of block-diffusion attention that a plain causal kernel leaves over: the window of two blocks.

With queries shifted by one block (see `decomposition`), the kernel covers the clean keys `0 .. i - K` of a query at
position `i`, in either stream. What remains lies in a window of `2K` keys: of the clean block before the query's, the
keys after `i - K`; and the query's own block in its own stream. Every block has the same window, so this is a batch of
small matrix products, with memory proportional to `S * K`.

Example: the blocks and the windows of two streams, with 6 positions, blocks of 3, 4 query and 2 key-value heads.

    >>> to_blocks(torch.zeros(1, 6, 4, 8), torch.zeros(1, 6, 4, 8), num_groups=2, block_size=3).shape
    torch.Size([1, 2, 2, 2, 6, 8])
    >>> to_windows(torch.zeros(1, 6, 2, 8), torch.zeros(1, 6, 2, 8), block_size=3).shape
    torch.Size([1, 2, 2, 2, 6, 8])

Legend: `B` sequences, `S` positions (whole blocks here), `M` blocks, `K` positions of a block, `Z` the two streams
(0 clean, 1 noisy), `N` query heads, `G` key-value heads, `Q = K * N / G` queries of a group in a block (position
first), `W = 2K` keys of a window, `D` head dimension.
"""

from __future__ import annotations

import torch

from megatron_opdlm.diffusion.attention_pattern import may_attend


def to_blocks(clean: torch.Tensor, noisy: torch.Tensor, num_groups: int, block_size: int) -> torch.Tensor:
    """Both streams [B, S, N, D] cut into blocks: [B, M, G, Z, Q, D]."""
    streams = (x.unflatten(2, (num_groups, -1)).unflatten(1, (-1, block_size)) for x in (clean, noisy))
    return torch.stack([x.transpose(2, 3) for x in streams], dim=3).flatten(4, 5)


def from_blocks(blocks: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `to_blocks`: the clean and the noisy stream, [B, S, N, D] each."""
    clean, noisy = blocks.unflatten(4, (block_size, -1)).permute(3, 0, 1, 4, 2, 5, 6).flatten(4, 5).flatten(2, 3)
    return clean, noisy


def to_windows(clean: torch.Tensor, noisy: torch.Tensor, block_size: int) -> torch.Tensor:
    """Keys or values [B, S, G, D] -> windows [B, M, G, Z, W, D]: the clean block before, then the stream's own block.

    There is no block before the first one; its place holds zeros, which the mask of the window hides.
    """
    batch_size, length, num_groups, head_dim = clean.shape
    windows = clean.new_empty(batch_size, length // block_size, num_groups, 2, 2 * block_size, head_dim)
    before, own = windows.unflatten(4, (2, block_size)).unbind(4)
    for index, x in enumerate((clean, noisy)):
        own[:, :, :, index] = x.unflatten(1, (-1, block_size)).transpose(2, 3)
    before[:, 1:] = own[:, :-1, :, :1]
    before[:, 0] = 0
    return windows


def from_window_gradients(windows: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The adjoint of `to_windows`: sums what the windows say about each key, [B, S, G, D] for each stream."""
    before, own = windows.unflatten(4, (2, block_size)).unbind(4)
    own = own.clone()
    own[:, :-1, :, 0] += before[:, 1:].sum(dim=3)
    return from_blocks(own, block_size)


def hidden_in_window(lengths: torch.Tensor, num_blocks: int, heads_per_group: int, block_size: int) -> torch.Tensor:
    """Keys of its window that a query does not attend here, bool [B, M, 1, Z, Q, W].

    It attends what the pattern allows and the kernel leaves over. A padded query attends itself too, so that its
    softmax stays finite.
    """
    device = lengths.device
    block_start = torch.arange(num_blocks, device=device).view(-1, 1, 1, 1) * block_size
    query = block_start + torch.arange(block_size, device=device).view(-1, 1)
    key_offset = torch.arange(-block_size, block_size, device=device)
    key = block_start + key_offset
    is_noisy = torch.tensor([False, True], device=device).view(2, 1, 1)
    is_left = may_attend(query, is_noisy, key, is_noisy & (key_offset >= 0), block_size)
    is_left &= ~seen_by_kernel(query, key, block_size)
    is_real = (key >= 0) & (key < lengths.view(-1, 1, 1, 1, 1))
    is_hidden = ~((is_left & is_real) | (key == query))
    return is_hidden.repeat_interleave(heads_per_group, dim=3)[:, :, None]


def seen_by_kernel(query: torch.Tensor, key: torch.Tensor, block_size: int) -> torch.Tensor:
    """Whether the causal kernel covers a clean key of this position for a query of that position, in either stream."""
    return key <= query - block_size


def window_scores(
    query_blocks: torch.Tensor, key_windows: torch.Tensor, is_hidden: torch.Tensor, scale: float
) -> torch.Tensor:
    """Scores [B, M, G, Z, Q, W], minus infinity at the keys that `hidden_in_window` names."""
    return (query_blocks @ key_windows.mT).mul_(scale).masked_fill_(is_hidden, float("-inf"))


def window_gradients(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_hidden: torch.Tensor,
    scale: float,
    grad_out: torch.Tensor,
    row_sums: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the windows contribute to the gradients of query blocks, key windows and value windows.

    Args:
        query: [B, M, G, Z, Q, D]; `grad_out` alike.
        key: [B, M, G, Z, W, D]; `value` alike.
        is_hidden: from `hidden_in_window`.
        scale: of the scores.
        row_sums: `sum(grad_out * out)` over the head dimension, with the merged output; [B, M, G, Z, Q, 1].
        lse: the merged log-sum-exp [B, M, G, Z, Q]: with it the window's probabilities are those of the whole softmax.
    """
    probabilities = window_scores(query, key, is_hidden, scale).sub_(lse[..., None]).exp_()
    grad_scores = (grad_out @ value.mT).sub_(row_sums).mul_(probabilities).mul_(scale)
    return grad_scores @ key, grad_scores.mT @ query, probabilities.mT @ grad_out
