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

    >>> streams = Streams(query_clean, key_clean, value_clean, query_noisy, key_noisy, value_noisy)
    >>> out_clean, out_noisy = block_diffusion_attention(streams, lengths_B, block_size=4, scale=0.125, kernel=kernel)

Legend: `B` sequences, `S` positions of one stream, `K` positions of a block, `N` query heads, `G` key-value heads,
`D` head dimension.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from types import ModuleType
from typing import Protocol

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from megatron_opdlm.models.attention.backend import Pair, Streams

logger = logging.getLogger(__name__)


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
    streams: Streams, lengths: torch.Tensor, block_size: int, scale: float, kernel: CausalKernel
) -> Pair:
    """The clean and the noisy output, [B, S, N, D] each. See `AttentionBackend.attend` for the arguments."""
    length = streams.query_clean.shape[1]
    streams = whole_blocks(streams, block_size)
    out_clean, out_noisy = _BlockDiffusionAttention.apply(*streams, lengths, block_size, scale, kernel)
    return out_clean[:, :length], out_noisy[:, :length]


class _BlockDiffusionAttention(torch.autograd.Function):
    """Forward and backward for whole blocks. Between them it keeps the inputs, the outputs and the log-sum-exps."""

    @staticmethod
    def forward(ctx, query_clean, key_clean, value_clean, query_noisy, key_noisy, value_noisy, *settings):
        lengths, block_size, scale, kernel = settings
        streams = Streams(query_clean, key_clean, value_clean, query_noisy, key_noisy, value_noisy)
        causal = None
        if query_clean.shape[1] > block_size:
            causal = kernel.forward(*kernel_inputs(streams, block_size), scale)
        window = local_part(query_clean.device.type)
        outs, lse = window.merge_window(streams, causal, lengths, block_size, scale)
        ctx.save_for_backward(*streams, *outs, lse, lengths)
        ctx.settings = block_size, scale, kernel
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_clean, grad_noisy):
        *streams, out_clean, out_noisy, lse, lengths = ctx.saved_tensors
        block_size, scale, kernel = ctx.settings
        streams, grads, outs = Streams(*streams), (grad_clean, grad_noisy), (out_clean, out_noisy)
        causal_grads = None
        if out_clean.shape[1] > block_size:
            query, key, value = kernel_inputs(streams, block_size)
            grad_out, out = (kernel_rows(pair, key.shape[2], block_size) for pair in (grads, outs))
            causal_lse = lse[:, :, block_size:].contiguous()
            causal_grads = kernel.backward(grad_out, query, key, value, out, causal_lse, scale)
        window = local_part(grad_clean.device.type)
        gradients = window.window_gradients(streams, grads, outs, lse, lengths, block_size, scale, causal_grads)
        return *gradients, None, None, None, None


def whole_blocks(streams: Streams, block_size: int) -> Streams:
    """Positions filled up to whole blocks. This changes nothing: `lengths` hides what is added."""
    num_added = -streams.query_clean.shape[1] % block_size
    return Streams(*(F.pad(x, (0, 0, 0, 0, 0, num_added)) for x in streams)) if num_added else streams


def kernel_inputs(streams: Streams, block_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the causal kernel gets: all queries but those of the first block, clean keys and values but the last's.

    Row `r` holds the queries at position `r + K` and sees keys `0 .. r`. No row is empty and none is a dummy.
    """
    queries = (streams.query_clean, streams.query_noisy)
    query = kernel_rows(queries, streams.key_clean.shape[2], block_size)
    return query, streams.key_clean[:, :-block_size], streams.value_clean[:, :-block_size]


def kernel_rows(pair: Pair, num_groups: int, block_size: int) -> torch.Tensor:
    """Both streams [B, S, N, D] in the rows of the kernel: [B, S - K, 2N, D]."""
    clean, noisy = pair
    return stack_heads(clean[:, block_size:], noisy[:, block_size:], num_groups)


def stack_heads(clean: torch.Tensor, noisy: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Both streams [B, S, N, D] as one with 2N heads, in the order (group, stream, head of the group).

    A kernel lets head `h` of 2N read key-value head `h // (2N / G)`, so the group must vary slowest.
    """
    streams = [x.unflatten(2, (num_groups, -1)) for x in (clean, noisy)]
    return torch.stack(streams, dim=3).flatten(2, 4)


@functools.cache
def local_part(device_type: str) -> ModuleType:
    """The module that computes the window: fused Triton kernels on a GPU, plain PyTorch elsewhere."""
    if device_type == "cpu":
        name = "local"
    elif importlib.util.find_spec("triton") is not None:
        name = "local_triton"
    else:
        name = "local"
        logger.warning("attention: the package triton is missing; the in-block part runs unfused, which is slow")
    return importlib.import_module(f"megatron_opdlm.models.attention.{name}")
