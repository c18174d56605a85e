"""Attention of a rollout's tokens to keys and values in pages, by PyTorch's scaled_dot_product_attention.

The kernel wants rows of equally many queries and keys. So each call has one block of queries of every sequence, whose
last block is what it denoises, among sequences of about the same length; a second call has the blocks that have just
become clean. What a prompt has before its last block is cut into tiles, with a call for those at the same positions, as
the tiles of several responses to a prompt are. No query only fills up a row, and a mask has at most as many entries as
a tile has queries, times keys: memory grows with the length of a sequence and not with its square.

    attention = SdpaPagedAttention(block_size=4, num_heads_per_group=2, longest=128, dtype=torch.float32, device=device)
    layout = attention.lay_out(tokens)
    out_TND = attention.attend(layout, query_TND, key_pages, value_pages, scale)

Legend: `T` tokens, `A` sequences of a call, `W` queries of each, `E` keys of each, `N` heads, `G` key-value heads,
`D` head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_opdlm.diffusion.attention_pattern import may_attend
from megatron_opdlm.diffusion.blocks import block_start
from megatron_opdlm.parallel.device import to_device
from megatron_opdlm.rollout.kv_cache import QueryTokens

LONGEST_PAGE = 256
"""A page holds the whole of a sequence that is not longer than this: then its keys need not be put together."""
TILE = 256
"""Queries of a prompt that share a mask."""
_SHORTEST_KEYS = 64


@dataclass(frozen=True)
class Call:
    """What shares one call of the kernel."""

    queries: torch.Tensor | slice
    """Where in the list of tokens the queries are: W of each sequence, one behind the other; or which W of the tokens
    of each, if the call has all sequences of the list in their order, and they have equally many tokens."""
    pages: torch.Tensor | slice
    """Each sequence's pages, `[A, P]`; or a slice of the cache, if it has one page of each, in their order."""
    num_keys: int
    mask: torch.Tensor | None
    """Added to the scores, `[A or 1, 1, heads per group x W, E]`; None where every query sees every key."""


class SdpaPagedAttention:
    """See the module. `longest` is the number of tokens of the longest sequence there will be.

    On the CPU and on GPUs; on a GPU it has not been run yet.
    """

    is_capturable = False  # the calls depend on which lengths there are

    def __init__(
        self, block_size: int, num_heads_per_group: int, longest: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.block_size, self.num_heads_per_group, self.dtype, self.device = (
            block_size,
            num_heads_per_group,
            dtype,
            device,
        )
        self.page_size = min(longest, LONGEST_PAGE)
        self.num_pairs = self.num_hidden_pairs = 0
        """Query-key pairs of all calls so far, per layer and head, and those of them that a mask hid."""

    def lay_out(self, tokens: QueryTokens) -> list[Call]:
        """The calls of a forward."""
        return [self._call(tokens, *call) for call in self._calls(tokens)]

    def attend(
        self,
        layout: list[Call],
        query_TND: torch.Tensor,
        key_pages: torch.Tensor,
        value_pages: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """`[T, N, D]`, from pages `[pages, page_size, G, D]`."""
        out_TND = torch.empty_like(query_TND)
        for call in layout:
            keys, values = (self._keys(pages, call) for pages in (key_pages, value_pages))
            num_sequences, num_groups = keys.shape[:2]
            # The heads that share keys become further queries: with a mask, kernels for grouped heads are few and slow.
            chosen = _chosen(query_TND, call.queries, num_sequences)
            grouped = chosen.unflatten(2, (num_groups, -1)).permute(0, 2, 3, 1, 4)
            attended = F.scaled_dot_product_attention(
                grouped.flatten(2, 3), keys, values, attn_mask=call.mask, scale=scale
            )
            attended = attended.view(grouped.shape).permute(0, 3, 1, 2, 4)
            if isinstance(call.queries, slice):
                _chosen(out_TND, call.queries, num_sequences).unflatten(2, (num_groups, -1)).copy_(attended)
            else:
                out_TND.index_copy_(0, call.queries, attended.reshape(len(call.queries), *out_TND.shape[1:]))
        return out_TND

    def _keys(self, pages: torch.Tensor, call: Call) -> torch.Tensor:
        """`[A, G, E, D]` of a call."""
        if isinstance(call.pages, slice):
            whole = pages[call.pages]
        else:  # on the CPU far faster than an index of two dimensions
            whole = pages.index_select(0, call.pages.flatten()).unflatten(0, call.pages.shape).flatten(1, 2)
        return whole[:, : call.num_keys].transpose(1, 2)

    def _calls(self, tokens: QueryTokens) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        """For each call the sequences, the first query of each in its part of the list, and their number."""
        width = min(self.block_size, int(tokens.counts_A.max()))
        before_last_A = tokens.counts_A - width
        size_A = _length_classes(tokens.end_A)
        for is_read_A, first_A in (
            (torch.ones_like(size_A, dtype=torch.bool), before_last_A),
            (before_last_A == width, torch.zeros_like(before_last_A)),
        ):
            for size in size_A[is_read_A].unique().tolist():
                sequences = (is_read_A & (size_A == size)).nonzero()[:, 0]
                # in the order of their pages, which may then lie side by side and need no copy
                sequences = sequences[tokens.page_table_AP[sequences, 0].argsort()]
                yield sequences, first_A[sequences], width
        tile = max(1, TILE // self.block_size) * self.block_size
        spans_A2 = torch.stack([tokens.first_A, before_last_A], dim=1)
        for span_2 in spans_A2[before_last_A > width].unique(dim=0):
            sequences, end = (spans_A2 == span_2).all(1).nonzero()[:, 0], int(span_2[1])
            for first in range(0, end, tile):
                yield sequences, torch.full_like(sequences, first), min(tile, end - first)

    def _call(self, tokens: QueryTokens, sequences_A: torch.Tensor, skipped_A: torch.Tensor, width: int) -> Call:
        first_A = tokens.first_A[sequences_A] + skipped_A
        end_A = first_A + width
        num_keys = int(end_A.max())
        place_AW = (tokens.starts_A[sequences_A] + skipped_A)[:, None] + torch.arange(width)
        table_AP = tokens.page_table_AP[sequences_A, : -(-num_keys // self.page_size)]
        first_page, num_sequences = int(table_AP[0, 0]), len(table_AP)
        is_slice = table_AP.shape[1] == 1 and torch.equal(
            table_AP[:, 0], torch.arange(first_page, first_page + num_sequences)
        )
        skipped = int(skipped_A[0])
        is_even = torch.equal(sequences_A, torch.arange(len(tokens.counts_A))) and bool(
            (tokens.counts_A == tokens.counts_A[0]).all() and (skipped_A == skipped).all()
        )
        self._count(first_A, end_A, width, num_keys)
        return Call(
            queries=slice(skipped, skipped + width) if is_even else to_device(place_AW.flatten(), self.device),
            pages=slice(first_page, first_page + num_sequences) if is_slice else to_device(table_AP, self.device),
            num_keys=num_keys,
            mask=self._mask(first_A, end_A, width, num_keys),
        )

    def _count(self, first_A: torch.Tensor, end_A: torch.Tensor, width: int, num_keys: int) -> None:
        positions_AW = first_A[:, None] + torch.arange(width)
        visible_AW = (block_start(positions_AW, self.block_size) + self.block_size).minimum(end_A[:, None])
        self.num_pairs += positions_AW.numel() * num_keys
        self.num_hidden_pairs += int((num_keys - visible_AW).sum())

    def _mask(self, first_A: torch.Tensor, end_A: torch.Tensor, width: int, num_keys: int) -> torch.Tensor | None:
        if width <= self.block_size:  # queries of one block: they see all that there is up to its end
            if int(end_A.min()) == num_keys:
                return None
            visible_AWE = torch.arange(num_keys) < end_A[:, None, None]
            shape = (len(end_A), 1, self.num_heads_per_group * width, num_keys)
            return self._additive(to_device(visible_AWE, self.device))[:, None].expand(shape)
        # Up to its own block everything cached for a sequence is what a query may see: earlier blocks are clean, and
        # the entries of its own block come from its own stream. That is the pattern of a clean query among clean keys.
        # The tiles of a call are all at the positions of the first.
        queries_1W1 = first_A[0] + torch.arange(width, device=self.device)[None, :, None]
        is_noisy = torch.zeros((), dtype=torch.bool, device=self.device)
        pattern = may_attend(
            queries_1W1, is_noisy, torch.arange(num_keys, device=self.device), is_noisy, self.block_size
        )
        return self._additive(pattern)[:, None].repeat(1, 1, self.num_heads_per_group, 1)

    def _additive(self, is_visible: torch.Tensor) -> torch.Tensor:
        return torch.zeros(is_visible.shape, dtype=self.dtype, device=self.device).masked_fill_(~is_visible, -torch.inf)


def _chosen(rows_TND: torch.Tensor, queries: torch.Tensor | slice, num_sequences: int) -> torch.Tensor:
    """`[A, W, N, D]` of a call's queries; where they are a slice, a view."""
    if isinstance(queries, slice):
        return rows_TND.unflatten(0, (num_sequences, -1))[:, queries]
    return rows_TND.index_select(0, queries).unflatten(0, (num_sequences, -1))


def _length_classes(num_keys_A: torch.Tensor) -> torch.Tensor:
    """A number for each sequence; equal ones share a call, of whose keys at most half fill up.

    All in one class if that much is granted, else those of up to 64, 128, 256 ... keys.
    """
    if len(num_keys_A) * int(num_keys_A.max()) <= 2 * int(num_keys_A.sum()):
        return torch.zeros_like(num_keys_A)
    return (num_keys_A.clamp_min(_SHORTEST_KEYS) / _SHORTEST_KEYS).log2().ceil()
