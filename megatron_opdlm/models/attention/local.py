"""The part of block-diffusion attention that a plain causal kernel leaves over: the window of two blocks.

With queries shifted by one block (see `decomposition`), the kernel covers the clean keys `0 .. i - K` of a query at
position `i`, in either stream. What remains lies in a window of `2K` keys: of the clean block before the query's, the
keys after `i - K`; and the query's own block in its own stream. Every block has the same window, so this is a batch of
small matrix products, with memory proportional to `S * K`.

`merge_window` and `window_gradients` are what `decomposition` calls. They are plain PyTorch for any device;
`local_triton` has the same two functions as fused GPU kernels.

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

import itertools

import torch

from megatron_opdlm.diffusion.attention_pattern import may_attend
from megatron_opdlm.models.attention.backend import Pair, Streams


def merge_window(
    streams: Streams,
    causal: tuple[torch.Tensor, torch.Tensor] | None,
    lengths: torch.Tensor,
    block_size: int,
    scale: float,
) -> tuple[Pair, torch.Tensor]:
    """Softmax attention over the window's keys and the kernel's.

    Args:
        streams: of whole blocks.
        causal: the kernel's output [B, S - K, 2N, D] and log-sum-exp [B, 2N, S - K], of any strides; row `r` belongs to
            the queries at position `r + K`. None if there is one block only.
        lengths: [B], real tokens.
        block_size: K.
        scale: of the scores.

    Returns:
        The outputs, [B, S, N, D] each, in the streams' dtype; and the log-sum-exp [B, 2N, S] of all keys, contiguous,
        float32 or better, heads in the order of `decomposition.stack_heads`, each at its query's position.
    """
    query, key, value = blocks_and_windows(streams, block_size)
    scores = window_scores(query, key, _hidden(streams, lengths, block_size), scale)
    lse = scores.logsumexp(dim=-1)
    if causal is None:
        out = (scores - lse[..., None]).exp() @ value
    else:
        causal_out = kernel_to_rows(causal[0], key.shape[2], block_size)
        causal_lse = kernel_to_rows(causal[1].transpose(1, 2)[..., None], key.shape[2], block_size)[..., 0]
        # The kernel has no row for the first block: its log-sum-exp is the window's alone.
        later_lse = lse.unflatten(4, (block_size, -1))[:, 1:]
        later_lse.copy_(torch.logaddexp(later_lse, causal_lse))
        out = (scores - lse[..., None]).exp() @ value
        out.unflatten(4, (block_size, -1))[:, 1:].addcmul_(causal_out, (causal_lse - later_lse).exp()[..., None])
    clean, noisy = (x.to(streams.query_clean.dtype) for x in from_blocks(out, block_size))
    return (clean, noisy), lse_to_rows(lse, block_size)


def window_gradients(
    streams: Streams,
    grads: Pair,
    outs: Pair,
    lse: torch.Tensor,
    lengths: torch.Tensor,
    block_size: int,
    scale: float,
    causal_grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
) -> Streams:
    """Gradients of the six inputs through the window's keys, added to those through the kernel's.

    Args:
        streams: of whole blocks.
        grads: of the outputs, [B, S, N, D] each.
        outs: the merged outputs; with them and the merged `lse`, the window's probabilities and row sums are those of
            the whole softmax.
        lse: from `merge_window`.
        lengths: [B], real tokens.
        block_size: K.
        scale: of the scores.
        causal_grads: the kernel's gradients of the stacked queries [B, S - K, 2N, D] and of the clean keys and values
            [B, S - K, G, D]; None for the window's alone.
    """
    query, key, value = blocks_and_windows(streams, block_size)
    num_groups = key.shape[2]
    lse = rows_to_lse(lse, num_groups, block_size)
    row_sums = [(grad.to(lse.dtype) * out).sum(dim=-1, keepdim=True) for grad, out in zip(grads, outs, strict=True)]
    grad_out = to_blocks(*grads, num_groups, block_size).to(lse.dtype)
    scores = window_scores(query, key, _hidden(streams, lengths, block_size), scale)
    probabilities = scores.sub_(lse[..., None]).exp_()
    grad_scores = (grad_out @ value.mT).sub_(to_blocks(*row_sums, num_groups, block_size))
    grad_scores.mul_(probabilities).mul_(scale)
    grad_query = grad_scores @ key
    grad_keys = from_window_gradients(grad_scores.mT @ query, block_size)
    grad_values = from_window_gradients(probabilities.mT @ grad_out, block_size)
    if causal_grads is not None:
        query_rows, key_rows, value_rows = causal_grads
        grad_query.unflatten(4, (block_size, -1))[:, 1:] += kernel_to_rows(query_rows, num_groups, block_size)
        grad_keys[0][:, :-block_size] += key_rows
        grad_values[0][:, :-block_size] += value_rows
    by_stream = zip(from_blocks(grad_query, block_size), grad_keys, grad_values, strict=True)
    return Streams(*(grad.to(x.dtype) for grad, x in zip(itertools.chain(*by_stream), streams, strict=True)))


def _hidden(streams: Streams, lengths: torch.Tensor, block_size: int) -> torch.Tensor:
    _, length, num_heads, _ = streams.query_clean.shape
    return hidden_in_window(lengths, length // block_size, num_heads // streams.key_clean.shape[2], block_size)


def blocks_and_windows(streams: Streams, block_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query blocks, key windows and value windows of both streams, in at least float32."""
    query = to_blocks(streams.query_clean, streams.query_noisy, streams.key_clean.shape[2], block_size)
    key = to_windows(streams.key_clean, streams.key_noisy, block_size)
    value = to_windows(streams.value_clean, streams.value_noisy, block_size)
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.to(dtype), key.to(dtype), value.to(dtype)


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
    is_noisy = torch.arange(2, device=device).bool().view(2, 1, 1)
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


def kernel_to_rows(stacked: torch.Tensor, num_groups: int, block_size: int) -> torch.Tensor:
    """Rows of the kernel [B, S - K, 2N, D] as a view in block order: [B, M - 1, G, Z, K, N / G, D]."""
    heads = stacked.unflatten(2, (num_groups, 2, -1)).unflatten(1, (-1, block_size))
    return heads.permute(0, 1, 3, 4, 2, 5, 6)


def lse_to_rows(lse: torch.Tensor, block_size: int) -> torch.Tensor:
    """Log-sum-exps of blocks [B, M, G, Z, Q] by stacked head and position: contiguous [B, 2N, S]."""
    rows = lse.unflatten(4, (block_size, -1)).permute(0, 2, 3, 5, 1, 4)
    return rows.flatten(4, 5).flatten(1, 3).contiguous()


def rows_to_lse(rows: torch.Tensor, num_groups: int, block_size: int) -> torch.Tensor:
    """The inverse of `lse_to_rows`."""
    blocks = rows.unflatten(1, (num_groups, 2, -1)).unflatten(4, (-1, block_size))
    return blocks.permute(0, 4, 1, 2, 5, 3).flatten(4, 5)
