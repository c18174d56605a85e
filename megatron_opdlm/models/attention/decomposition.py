"""Block-diffusion attention from one plain causal flash-attention call, exact in forward and backward.

Write `K` for the block size. A query at position `i`, clean or noisy, attends the clean keys of all earlier blocks and
its own block in its own stream. The clean keys `0 .. i - K` are always among the first: they are what a causal kernel
gives row `i - K`. So the queries of both streams, shifted back by one block, are stacked as `2N` heads over the clean
keys and values, in one causal call; the few keys it leaves over are `local`'s window. Both parts are softmaxes over
disjoint keys, and two such parts merge exactly by their log-sum-exps:

    lse = log(exp(lse_1) + exp(lse_2))        out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

The backward of a flash kernel rebuilds its probabilities as `exp(score - lse)` and needs `sum(grad_out * out)` per row.
Given the *merged* `lse` and `out` these are the probabilities and the row sums of the whole softmax, hence its share
of the exact gradient. With its own, unmerged ones the forward would still be right and the gradients wrong.

Example:

    >>> streams = (query_clean, key_clean, value_clean, query_noisy, key_noisy, value_noisy)
    >>> out_clean, out_noisy = block_diffusion_attention(streams, lengths_B, block_size=4, scale=0.125, kernel=kernel)

Legend: `B` sequences, `S` positions of one stream, `M` blocks, `K` positions of a block, `Z` the two streams (0 clean,
1 noisy), `N` query heads, `G` key-value heads, `Q = K * N / G` queries of a group in a block, `D` head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from megatron_opdlm.models.attention.local import (
    from_blocks,
    from_window_gradients,
    hidden_in_window,
    to_blocks,
    to_windows,
    window_gradients,
    window_scores,
)

Pair = tuple[torch.Tensor, torch.Tensor]
"""Something of the clean stream, then of the noisy one."""


class CausalKernel(Protocol):
    """A causal flash-attention kernel: `[B, S, heads, D]` in and out, fewer key-value than query heads allowed."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The output and the natural log-sum-exp of the scaled scores, [B, heads, S] in at least float32."""
        ...

    def backward(
        self,
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of query, key and value; `lse` is contiguous."""
        ...


def block_diffusion_attention(
    streams: Sequence[torch.Tensor], lengths: torch.Tensor, block_size: int, scale: float, kernel: CausalKernel
) -> tuple[torch.Tensor, torch.Tensor]:
    """The clean and the noisy output, [B, S, N, D] each; what the arguments mean stands at `AttentionBackend.attend`.

    `streams` holds query, key and value of the clean stream, then of the noisy one. Positions are padded to whole
    blocks, which changes nothing: `lengths` hides the added ones.
    """
    sequence_length = streams[0].shape[1]
    num_added = -sequence_length % block_size
    if num_added:
        streams = tuple(F.pad(x, (0, 0, 0, 0, 0, num_added)) for x in streams)
    out_clean, out_noisy = _BlockDiffusionAttention.apply(*streams, lengths, block_size, scale, kernel)
    return out_clean[:, :sequence_length], out_noisy[:, :sequence_length]


class _BlockDiffusionAttention(torch.autograd.Function):
    """Forward and backward for whole blocks. Between them it keeps the inputs, the outputs and the log-sum-exps."""

    @staticmethod
    def forward(ctx, query_clean, key_clean, value_clean, query_noisy, key_noisy, value_noisy, *settings):
        lengths, block_size, scale, kernel = settings
        streams = (query_clean, key_clean, value_clean, query_noisy, key_noisy, value_noisy)
        query, key, value = _blocks_and_windows(streams, block_size)
        is_hidden = hidden_in_window(lengths, query.shape[1], query.shape[4] // block_size, block_size)
        causal = None
        if query.shape[1] > 1:
            causal = kernel.forward(*kernel_inputs(streams, block_size), scale)
        out, lse = merge(window_scores(query, key, is_hidden, scale), value, causal, block_size)
        outs = tuple(x.to(query_clean.dtype) for x in from_blocks(out, block_size))
        ctx.save_for_backward(*streams, *outs, lse, is_hidden)
        ctx.settings = settings[1:]
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_clean, grad_noisy):
        *streams, out_clean, out_noisy, lse, is_hidden = ctx.saved_tensors
        block_size, scale, kernel = ctx.settings
        grads, outs = (grad_clean, grad_noisy), (out_clean, out_noisy)
        query, key, value = _window_part(streams, grads, outs, lse, is_hidden, block_size, scale)
        key, value = (list(from_window_gradients(x, block_size)) for x in (key, value))
        if lse.shape[1] > 1:
            query_rows, key_rows, value_rows = _kernel_part(streams, grads, outs, lse, block_size, scale, kernel)
            query.unflatten(4, (block_size, -1))[:, 1:] += kernel_to_rows(query_rows, lse.shape[2], block_size)
            key[0][:, :-block_size] += key_rows
            value[0][:, :-block_size] += value_rows
        query = from_blocks(query, block_size)
        totals = (query[0], key[0], value[0], query[1], key[1], value[1])
        return *(total.to(x.dtype) for total, x in zip(totals, streams, strict=True)), None, None, None, None


def _window_part(
    streams: Sequence[torch.Tensor],
    grads: Pair,
    outs: Pair,
    lse: torch.Tensor,
    is_hidden: torch.Tensor,
    block_size: int,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """Gradients of the query blocks, key windows and value windows through the windows' keys."""
    row_sums = [(grad.to(lse.dtype) * out).sum(dim=-1, keepdim=True) for grad, out in zip(grads, outs, strict=True)]
    grad_blocks = to_blocks(*grads, lse.shape[2], block_size).to(lse.dtype)
    row_sum_blocks = to_blocks(*row_sums, lse.shape[2], block_size)
    query, key, value = _blocks_and_windows(streams, block_size)
    return window_gradients(query, key, value, is_hidden, scale, grad_blocks, row_sum_blocks, lse)


def _kernel_part(
    streams: Sequence[torch.Tensor],
    grads: Pair,
    outs: Pair,
    lse: torch.Tensor,
    block_size: int,
    scale: float,
    kernel: CausalKernel,
) -> tuple[torch.Tensor, ...]:
    """Gradients of the stacked queries and the clean keys and values through the kernel, from merged `outs`, `lse`."""
    grad_out, out = (stack_heads(*(x[:, block_size:] for x in pair), lse.shape[2]) for pair in (grads, outs))
    query, key, value = kernel_inputs(streams, block_size)
    return kernel.backward(grad_out, query, key, value, out, rows_to_kernel(lse, block_size), scale)


def _blocks_and_windows(streams: Sequence[torch.Tensor], block_size: int) -> tuple[torch.Tensor, ...]:
    """Query blocks, key windows and value windows of both streams, in at least float32."""
    query_clean, key_clean, value_clean, query_noisy, key_noisy, value_noisy = streams
    query = to_blocks(query_clean, query_noisy, key_clean.shape[2], block_size)
    windows = (to_windows(key_clean, key_noisy, block_size), to_windows(value_clean, value_noisy, block_size))
    dtype = torch.promote_types(query.dtype, torch.float32)
    return tuple(x.to(dtype) for x in (query, *windows))


def kernel_inputs(streams: Sequence[torch.Tensor], block_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the causal kernel gets: all queries but those of the first block, clean keys and values but the last's.

    Row `r` holds the queries at position `r + K` and sees keys `0 .. r`. No row is empty and none is a dummy.
    """
    query_clean, key_clean, value_clean, query_noisy, _, _ = streams
    query = stack_heads(query_clean[:, block_size:], query_noisy[:, block_size:], key_clean.shape[2])
    return query, key_clean[:, :-block_size], value_clean[:, :-block_size]


def stack_heads(clean: torch.Tensor, noisy: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Both streams [B, S, N, D] as one with 2N heads, in the order (group, stream, head of the group).

    A kernel lets head `h` of 2N read key-value head `h // (2N / G)`, so the group must vary slowest.
    """
    streams = [x.unflatten(2, (num_groups, -1)) for x in (clean, noisy)]
    return torch.stack(streams, dim=3).flatten(2, 4)


def kernel_to_rows(stacked: torch.Tensor, num_groups: int, block_size: int) -> torch.Tensor:
    """Rows of the kernel [B, S - K, 2N, D] as a view in block order: [B, M - 1, G, Z, K, N / G, D]."""
    heads = stacked.unflatten(2, (num_groups, 2, -1)).unflatten(1, (-1, block_size))
    return heads.permute(0, 1, 3, 4, 2, 5, 6)


def rows_to_kernel(lse: torch.Tensor, block_size: int) -> torch.Tensor:
    """Log-sum-exps [B, M, G, Z, Q] of all blocks but the first, as the kernel wants them: contiguous [B, 2N, S - K]."""
    return lse[:, 1:].unflatten(4, (block_size, -1)).permute(0, 2, 3, 5, 1, 4).flatten(4, 5).flatten(1, 3).contiguous()


def merge(
    scores: torch.Tensor, value: torch.Tensor, causal: tuple[torch.Tensor, torch.Tensor] | None, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, M, G, Z, Q, D] and log-sum-exp [B, M, G, Z, Q] over the window's keys and the kernel's.

    Args:
        scores: of the windows, [B, M, G, Z, Q, 2K].
        value: the windows' values, [B, M, G, Z, 2K, D].
        causal: output [B, S - K, 2N, D] and log-sum-exp [B, 2N, S - K] of the kernel; none if there is one block only.
        block_size: K.
    """
    lse = scores.logsumexp(dim=-1)
    if causal is None:
        return (scores - lse[..., None]).exp() @ value, lse
    num_groups = scores.shape[2]
    causal_out = kernel_to_rows(causal[0], num_groups, block_size)
    causal_lse = kernel_to_rows(causal[1].transpose(1, 2)[..., None], num_groups, block_size)[..., 0]
    # The kernel has no row for the first block: its log-sum-exp is the window's alone.
    later_lse = lse.unflatten(4, (block_size, -1))[:, 1:]
    later_lse.copy_(torch.logaddexp(later_lse, causal_lse))
    out = (scores - lse[..., None]).exp() @ value
    out.unflatten(4, (block_size, -1))[:, 1:].addcmul_(causal_out, (causal_lse - later_lse).exp()[..., None])
    return out, lse
