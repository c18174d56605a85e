"""The two autograd nodes around Transformer Engine's attention that make it block-diffusion attention.

`_ToKernel` makes the causal kernel's inputs of both streams, Transformer Engine runs with the window merged into its
kernel's result (see `transformer_engine_splice`), and `_FromKernel` returns the merged outputs; in FP8 they are not
rounded the way those are that Transformer Engine keeps. Their backwards run in the opposite order: `_FromKernel` sends
the gradients of the outputs into Transformer Engine's backward, and `_ToKernel` adds the window's gradients to the
kernel's, which come out of it.

Between forward and backward the nodes keep keys and values of both streams, and queries and outputs in the rows that
the kernel gets and returns. In bfloat16 Transformer Engine keeps the same tensors of queries and outputs, but a
contiguous copy of the clean keys and values beside those here.

Example:

    >>> outs = spliced_attention(splice, attention, streams, lengths_B, block_size=4, scale=0.125)

Legend: `B` sequences, `S` positions of one stream (whole blocks here), `K` positions of a block, `R = S - K` rows of
the kernel, `N` query heads, `G` key-value heads, `D` head dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from megatron_opdlm.models.attention.backend import Pair, Streams
from megatron_opdlm.models.attention.decomposition import local_part, stack_heads
from megatron_opdlm.models.attention.transformer_engine_splice import FusedAttentionSplice


class _Merged(NamedTuple):
    """What the merge in the midst of Transformer Engine's forward leaves for `_FromKernel`."""

    outs: Pair
    """[B, S, N, D] each."""
    rows: torch.Tensor
    """The same as the kernel's rows, [R, B, 2N, D]."""
    lse: torch.Tensor
    """[B, 2N, S]"""


class _Backward(NamedTuple):
    """What the backward of `_FromKernel` leaves for that of `_ToKernel`."""

    grads: Pair
    """Of the outputs, [B, S, N, D] each."""
    rows: torch.Tensor
    first_outs: Pair
    """The outputs of the first block, [B, K, N, D] each."""
    lse: torch.Tensor


class _Handover:
    """Passes one record on, outside the graph, to the node that comes next. It holds nothing in between."""

    def __init__(self) -> None:
        self.record: _Merged | _Backward | None = None

    def take(self) -> _Merged | _Backward:
        record, self.record = self.record, None
        assert record is not None, "the nodes run in turns: Transformer Engine's node lies between them"
        return record


def spliced_attention(
    splice: FusedAttentionSplice,
    attention: torch.nn.Module,
    streams: Streams,
    lengths: torch.Tensor,
    block_size: int,
    scale: float,
) -> Pair:
    """The clean and the noisy output, [B, S, N, D] each.

    Args:
        splice: of the model.
        attention: a `DotProductAttention` with `2N` query and `G` key-value heads, causal, sequence before batch.
        streams: of whole blocks, two or more.
        lengths: [B], real tokens.
        block_size: K.
        scale: of the scores; `attention` has the same.
    """
    handover = _Handover()
    num_groups = streams.key_clean.shape[2]
    window = local_part(streams.query_clean.device.type)

    def merge(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outs, merged_lse = window.merge_window(streams, (out.transpose(0, 1), lse), lengths, block_size, scale)
        rows = stacked_rows(outs, num_groups, block_size)
        # Transformer Engine makes `rows` an output of its node; what is kept here must not refer to that node.
        handover.record = _Merged(outs, rows.detach(), merged_lse)
        return rows, merged_lse[:, :, block_size:].contiguous()

    query, key, value = _ToKernel.apply(handover, lengths, block_size, scale, *streams)
    out = splice.run(attention, query, key, value, merge)
    return _FromKernel.apply(handover, num_groups, block_size, out)


class _ToKernel(torch.autograd.Function):
    """From the six inputs to the kernel's three, contiguous, with the sequence before the batch.

    The backward needs the queries of both streams again: the kernel's and the first block, which it does not see.
    """

    @staticmethod
    def forward(ctx, handover, lengths, block_size, scale, *streams):
        query_clean, key_clean, value_clean, query_noisy, key_noisy, value_noisy = streams
        query = stacked_rows((query_clean, query_noisy), key_clean.shape[2], block_size)
        key, value = (x.transpose(0, 1)[:-block_size].contiguous() for x in (key_clean, value_clean))
        first_queries = (x[:, :block_size].clone() for x in (query_clean, query_noisy))
        ctx.save_for_backward(lengths, key_clean, value_clean, key_noisy, value_noisy, query, *first_queries)
        ctx.handover, ctx.block_size, ctx.scale = handover, block_size, scale
        return query, key, value

    @staticmethod
    @once_differentiable
    def backward(ctx, *causal_grads):
        lengths, key_clean, value_clean, key_noisy, value_noisy, rows, *first_queries = ctx.saved_tensors
        num_groups = key_clean.shape[2]
        query_clean, query_noisy = unstacked_rows(rows, first_queries, num_groups)
        streams = Streams(query_clean, key_clean, value_clean, query_noisy, key_noisy, value_noisy)
        record = ctx.handover.take()
        outs = unstacked_rows(record.rows, record.first_outs, num_groups)
        window = local_part(rows.device.type)
        causal_grads = tuple(x.transpose(0, 1) for x in causal_grads)
        gradients = window.window_gradients(
            streams, record.grads, outs, record.lse, lengths, ctx.block_size, ctx.scale, causal_grads
        )
        return None, None, None, None, *gradients


class _FromKernel(torch.autograd.Function):
    """From Transformer Engine's output to the merged outputs of both streams."""

    @staticmethod
    def forward(ctx, handover, num_groups, block_size, out):
        merged = handover.take()
        ctx.save_for_backward(merged.rows, merged.lse, *(x[:, :block_size].clone() for x in merged.outs))
        ctx.handover, ctx.num_groups, ctx.block_size = handover, num_groups, block_size
        return merged.outs

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        rows, lse, *first_outs = ctx.saved_tensors
        ctx.handover.record = _Backward(grads, rows, first_outs, lse)
        return None, None, None, stacked_rows(grads, ctx.num_groups, ctx.block_size).flatten(2)


def stacked_rows(pair: Pair, num_groups: int, block_size: int) -> torch.Tensor:
    """Both streams [B, S, N, D] in the rows of the kernel: contiguous [R, B, 2N, D]."""
    clean, noisy = (x.transpose(0, 1)[block_size:] for x in pair)
    return stack_heads(clean, noisy, num_groups).contiguous()


def unstacked_rows(rows: torch.Tensor, first: Pair, num_groups: int) -> Pair:
    """The inverse of `stacked_rows`, given the first block of both streams, [B, K, N, D] each."""
    later = rows.transpose(0, 1).unflatten(2, (num_groups, 2, -1)).unbind(3)
    blocks = zip(first, later, strict=True)
    clean, noisy = (torch.cat((x.unflatten(2, (num_groups, -1)), y), dim=1).flatten(2, 3) for x, y in blocks)
    return clean, noisy
