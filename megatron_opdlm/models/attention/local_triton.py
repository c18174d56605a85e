"""The window part of block-diffusion attention as three fused GPU kernels: the functions of `local`, in Triton.

The window is flash attention over a few keys, and merging it with the causal kernel's result needs no step of its own:
an online softmax does not have to start empty. A query's starts as if it had met one key, whose score is the causal
kernel's log-sum-exp and whose value is its output,

    maximum = lse_causal        sum = 1        weighted values = out_causal

and then meets the window's keys. What it ends with is the softmax over both. Likewise the gradients start from the
causal kernel's. So every tensor is read where it lies, with its strides, and nothing is stacked, cast or kept in
between but the row sums `sum(grad_out * out)`, one number per query.

Inputs in bfloat16, float16 or float32; head dimensions up to 256. bfloat16 and float16 products run on tensor cores and
are summed in float32. Kernels are compiled at the first call for a block size, a head count, a head dimension and a
precision; batches and numbers of positions share them (one variant each for multiples of 16 and others).

Example: on a GPU, `causal` being a flash-attention kernel's result for the shifted queries.

    >>> outs, lse = merge_window(streams, causal, lengths_B, block_size=4, scale=0.125)
    >>> gradients = window_gradients(streams, grads, outs, lse, lengths_B, 4, 0.125, causal_grads)

Legend: `B` sequences, `S` positions of one stream (whole blocks), `K` positions of a block, `N` query heads, `G`
key-value heads, `D` head dimension.
"""

from __future__ import annotations

import torch
import triton

from megatron_opdlm.models.attention.backend import Pair, Streams
from megatron_opdlm.models.attention.local_triton_kernels import (
    key_gradient_kernel,
    merge_kernel,
    query_gradient_kernel,
)
from megatron_opdlm.models.attention.local_triton_tiles import Sizes, Stream, View


def merge_window(
    streams: Streams,
    causal: tuple[torch.Tensor, torch.Tensor] | None,
    lengths: torch.Tensor,
    block_size: int,
    scale: float,
) -> tuple[Pair, torch.Tensor]:
    """See `local.merge_window`. One kernel; the outputs are dense [B, S, N, D]."""
    batch_size, length, num_heads, _ = streams.query_clean.shape
    outs = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (streams[0], streams[3]))
    lse = streams.query_clean.new_empty(batch_size, 2 * num_heads, length, dtype=torch.float32)
    causal_out, causal_lse = (None, None) if causal is None else (_view(causal[0]), _view(causal[1].transpose(1, 2)))
    clean, noisy = (
        Stream(*map(_view, three), out=_view(out)) for three, out in zip((streams[:3], streams[3:]), outs, strict=True)
    )
    sizes, options = _tiles(streams, block_size)
    merge_kernel[_query_grid(streams, sizes)](
        clean, noisy, causal_out, causal_lse, _view(lse.transpose(1, 2)), lengths.contiguous(),
        length, streams.key_clean.shape[2], scale, sizes, **options,
    )  # fmt: skip
    return outs, lse


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
    """See `local.window_gradients`. Two kernels; the gradients are dense.

    The kernel of the queries goes first: it leaves the row sums for the one of the keys.
    """
    gradients = Streams(*(torch.empty_like(x, memory_format=torch.contiguous_format) for x in streams))
    clean, noisy = (
        Stream(*map(_view, (*streams[part], out, grad, *gradients[part])))
        for part, out, grad in zip((slice(0, 3), slice(3, 6)), outs, grads, strict=True)
    )
    row_sums = torch.empty_like(lse)
    numbers = (_view(lse.transpose(1, 2)), _view(row_sums.transpose(1, 2)), lengths.contiguous())
    query_rows, *key_value_rows = (None, None, None) if causal_grads is None else map(_view, causal_grads)
    shape = (streams.query_clean.shape[1], streams.key_clean.shape[2])
    sizes, options = _tiles(streams, block_size)
    query_gradient_kernel[_query_grid(streams, sizes)](
        clean, noisy, query_rows, *numbers, *shape, scale, sizes, **options
    )
    key_gradient_kernel[_key_grid(streams, sizes)](
        clean, noisy, *key_value_rows, *numbers, *shape, scale, sizes, **options
    )
    return gradients


def _view(x: torch.Tensor) -> View:
    """Autograd may hand over gradients whose last dimension is not dense, as `out.sum()` does."""
    if x.ndim == 4 and x.stride(3) != 1:
        x = x.contiguous()
    return View(x, *x.stride()[:3])


def _tiles(streams: Streams, block_size: int) -> tuple[Sizes, dict[str, int]]:
    """Tile sizes and launch options. They are derived from compiled code (no register spills), not from timings.

    The kernels wait for memory more than for arithmetic, and loops over keys are short. So a program issues all its
    loads at once, and the programs of a multiprocessor take turns; software pipelining has nothing to gain.
    """
    num_heads, head_dim = streams.query_clean.shape[2:]
    element_size = streams.query_clean.element_size()
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    sizes = Sizes(
        K=block_size,
        H=num_heads // streams.key_clean.shape[2],
        D=head_dim,
        BLOCK_D=padded_dim,
        ROWS=128 // element_size,
        KEYS=64 // element_size,
    )
    return sizes, {"num_warps": 4 if padded_dim <= 128 else 8, "num_stages": 1}


def _query_grid(streams: Streams, sizes: Sizes) -> tuple[int, int]:
    batch_size, length, num_groups, _ = streams.key_clean.shape
    return 2 * triton.cdiv(length * sizes.H, sizes.ROWS), batch_size * num_groups


def _key_grid(streams: Streams, sizes: Sizes) -> tuple[int, int]:
    batch_size, length, num_groups, _ = streams.key_clean.shape
    return 2 * triton.cdiv(length, sizes.KEYS), batch_size * num_groups
