"""Attention of a rollout's tokens to keys and values in pages, by PyTorch's scaled_dot_product_attention.

The kernel wants rows of equally many queries and keys. So each call has one block of queries of every sequence, whose
last block is what it denoises, among sequences of about the same length; a second call has the blocks that have just
become clean. What a prompt has before its last block is cut into tiles, with a call for those at the same positions, as
the tiles of several responses to a prompt are. No query only fills up a row, and a mask has at most as many entries as
a tile has queries, times keys: memory grows with the length of a sequence and not with its square.

    heads = Heads(num_groups=8, num_per_group=2)
    attention = SdpaPagedAttention(4, heads, longest=128, dtype=torch.float32, device=device)
    layout = attention.lay_out(tokens)
    out_TND = attention.attend(layout, heads_TGJD, key_pages, value_pages, scale)

Legend: `T` tokens, `A` sequences of a call, `W` queries of each, `E` keys of each, `N` heads, `G` key-value heads, `R`
heads that share one, `J` these and behind them the key, `D` head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from megatron_opdlm.diffusion.attention_pattern import may_attend
from megatron_opdlm.diffusion.blocks import round_up_to_grid
from megatron_opdlm.parallel.device import to_device
from megatron_opdlm.rollout.kv_cache import QueryTokens

LONGEST_PAGE = 256
"""A page holds the whole of a sequence that is not longer than this: then its keys need not be put together."""
TILE = 256
"""Queries of a prompt that share a mask."""
KEYS_AT_A_TIME = 16
"""A call's keys are filled up to a multiple of this by hidden ones: kernels work on so many together, and on what is
left over one by one. A CPU takes a third longer for 44 keys than for 48."""
_SHORTEST_KEYS = 64


class Heads(NamedTuple):
    """Of this rank."""

    num_groups: int
    num_per_group: int


class Queries(NamedTuple):
    """Those of a call: equally many consecutive tokens of each of its sequences, ordered by the sequences' pages."""

    sequences_A: torch.Tensor
    first_A: torch.Tensor
    """Positions of their first tokens."""
    tokens_AW: torch.Tensor
    """Where in the list they are."""

    @classmethod
    def of(cls, tokens: QueryTokens, sequences_A: torch.Tensor, skipped_A: torch.Tensor, width: int) -> Queries:
        """So many tokens of each of these sequences, behind those of its tokens that are skipped."""
        tokens_AW = (tokens.starts_A[sequences_A] + skipped_A)[:, None] + torch.arange(width)
        return cls(sequences_A, tokens.first_A[sequences_A] + skipped_A, tokens_AW)


@dataclass(frozen=True)
class Call:
    """What shares one call of the kernel."""

    rows: torch.Tensor
    """Where among the rows `[T * G * J, D]` of all heads the queries `[A, G, R * W]` of the call are."""
    pages: torch.Tensor | slice
    """Each sequence's pages, `[A, P]`; or a slice of the cache, if it has one page of each, in their order."""
    num_keys: int
    mask: torch.Tensor | None
    """Added to the scores, `[A or 1, 1, heads per group x W, E]`; None where every query sees every key."""


class Outputs(NamedTuple):
    """What a layer returns."""

    calls: list[Call]
    rows: torch.Tensor
    """Where among the rows `[A, G, R * W]` of these calls, one behind the other, its rows `[T * N, D]` are."""


class Layout(NamedTuple):
    """The calls of a forward."""

    everything: Outputs
    read: Outputs
    """Of tokens whose outputs are read, which are all that the last layer returns."""


class SdpaPagedAttention:
    """See the module. `longest` is the number of tokens of the longest sequence there will be.

    On the CPU and on GPUs; on a GPU it has not been run yet.
    """

    is_capturable = False  # the calls depend on which lengths there are

    def __init__(self, block_size: int, heads: Heads, longest: int, dtype: torch.dtype, device: torch.device) -> None:
        self.block_size, self.heads, self.dtype, self.device = block_size, heads, dtype, device
        self.num_heads = heads.num_groups * heads.num_per_group
        self._queries_GR1 = torch.arange(self.num_heads + heads.num_groups).view(heads.num_groups, -1, 1)[:, :-1]
        """Where a token's queries are among its heads."""
        self.page_size = min(longest, LONGEST_PAGE)
        self.num_pairs = self.num_hidden_pairs = 0
        """Query-key pairs of all calls so far, per layer and head, and those of them that a mask hid."""

    def lay_out(self, tokens: QueryTokens) -> Layout:
        """The calls of a forward, and those of them with tokens whose outputs are read."""
        is_read_T = torch.full((len(tokens.ids_T),), tokens.read_N is None)
        if tokens.read_N is not None:
            is_read_T[tokens.read_N] = True
        assert is_read_T.any(), "a forward is for somebody who reads it"
        by_read = {True: [], False: []}
        for queries in self._queries(tokens):
            by_read[bool(is_read_T[queries.tokens_AW].any())].append(queries)
        ordered = by_read[True] + by_read[False]
        rows_TN, calls = self._output_rows(ordered, len(is_read_T)), [self._call(tokens, x) for x in ordered]
        everything = Outputs(calls, to_device(rows_TN.flatten(), self.device))
        if tokens.read_N is None:
            return Layout(everything, everything)
        read_rows = to_device(rows_TN[tokens.read_N].flatten(), self.device)
        return Layout(everything, Outputs(calls[: len(by_read[True])], read_rows))

    def attend(
        self,
        layout: Layout,
        heads_TGJD: torch.Tensor,
        key_pages: torch.Tensor,
        value_pages: torch.Tensor,
        scale: float,
        read_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`[T, N, D]`, from pages `[pages, page_size, G, D]`."""
        rows, outputs = heads_TGJD.flatten(0, 2), layout.everything if read_N is None else layout.read
        attended = []
        for call in outputs.calls:
            keys, values = (self._keys(pages, call) for pages in (key_pages, value_pages))
            # The heads that share keys become further queries: with a mask, kernels for grouped heads are few and slow.
            queries = rows.index_select(0, call.rows).unflatten(0, (len(keys), self.heads.num_groups, -1))
            out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=call.mask, scale=scale)
            attended.append(out.flatten(0, 2))
        rows = attended[0] if len(attended) == 1 else torch.cat(attended)
        return rows.index_select(0, outputs.rows).unflatten(0, (-1, self.num_heads))

    def _keys(self, pages: torch.Tensor, call: Call) -> torch.Tensor:
        """`[A, G, E, D]` of a call."""
        if isinstance(call.pages, slice):
            whole = pages[call.pages]
        else:  # on the CPU far faster than an index of two dimensions
            whole = pages.index_select(0, call.pages.flatten()).unflatten(0, call.pages.shape).flatten(1, 2)
        return whole[:, : call.num_keys].transpose(1, 2)

    def _queries(self, tokens: QueryTokens) -> Iterator[Queries]:
        """Those of each call."""
        width = min(self.block_size, int(tokens.counts_A.max()))
        before_last_A = tokens.counts_A - width
        # sequences in the order of their pages, which may then lie side by side and need no copy
        by_page_A = tokens.page_table_AP[:, 0].argsort()
        size_A = _length_classes(tokens.end_A)
        for size in size_A.unique().tolist():
            sequences = by_page_A[(size_A == size)[by_page_A]]
            yield Queries.of(tokens, sequences, before_last_A[sequences], width)
            sequences = sequences[(before_last_A == width)[sequences]]
            if len(sequences):
                yield Queries.of(tokens, sequences, torch.zeros_like(sequences), width)
        has_more_A = before_last_A > width
        if not has_more_A.any():
            return
        tile = max(1, TILE // self.block_size) * self.block_size
        spans_A2 = torch.stack([tokens.first_A, before_last_A], dim=1)
        for span_2 in spans_A2[has_more_A].unique(dim=0):
            sequences, end = by_page_A[(spans_A2 == span_2).all(1)[by_page_A]], int(span_2[1])
            for first in range(0, end, tile):
                yield Queries.of(tokens, sequences, torch.full_like(sequences, first), min(tile, end - first))

    def _output_rows(self, queries: list[Queries], num_tokens: int) -> torch.Tensor:
        """Where among the outputs of the calls, one behind the other, those `[T, N]` of the tokens are."""
        rows_TN, end = torch.empty(num_tokens, self.num_heads, dtype=torch.long), 0
        for tokens_AW in (x.tokens_AW for x in queries):
            begin, end = end, end + self.num_heads * tokens_AW.numel()
            rows_TN[tokens_AW] = torch.arange(begin, end).view(len(tokens_AW), self.num_heads, -1).transpose(1, 2)
        return rows_TN

    def _call(self, tokens: QueryTokens, queries: Queries) -> Call:
        width = queries.tokens_AW.shape[1]
        end_A = queries.first_A + width
        longest = int(end_A.max())
        num_keys = min(round_up_to_grid(longest, size) for size in (KEYS_AT_A_TIME, self.page_size))
        table_AP = tokens.page_table_AP[queries.sequences_A, : -(-num_keys // self.page_size)]
        first_page, last_page = int(table_AP[0, 0]), int(table_AP[-1, 0])
        is_slice = table_AP.shape[1] == 1 and last_page - first_page == len(table_AP) - 1
        rows_AGRW = queries.tokens_AW[:, None, None] * (self.num_heads + self.heads.num_groups) + self._queries_GR1
        self._count(queries.first_A, width, num_keys)
        return Call(
            rows=to_device(rows_AGRW.flatten(), self.device),
            pages=slice(first_page, last_page + 1) if is_slice else to_device(table_AP, self.device),
            num_keys=num_keys,
            mask=self._mask(queries.first_A, end_A, width, num_keys),
        )

    def _count(self, first_A: torch.Tensor, width: int, num_keys: int) -> None:
        """A query sees up to the end of its block."""
        size, num_sequences = min(width, self.block_size), len(first_A)
        num_blocks = width // size
        visible = num_blocks * int(first_A.sum()) + num_sequences * size * num_blocks * (num_blocks + 1) // 2
        self.num_pairs += num_sequences * width * num_keys
        self.num_hidden_pairs += num_sequences * width * num_keys - size * visible

    def _mask(self, first_A: torch.Tensor, end_A: torch.Tensor, width: int, num_keys: int) -> torch.Tensor | None:
        if width <= self.block_size:  # queries of one block: they see all that there is up to its end
            if int(end_A.min()) == num_keys:
                return None
            visible_AWE = torch.arange(num_keys) < end_A[:, None, None]
            shape = (len(end_A), 1, self.heads.num_per_group * width, num_keys)
            return self._additive(to_device(visible_AWE, self.device))[:, None].expand(shape)
        # Up to its own block everything cached for a sequence is what a query may see: earlier blocks are clean, and
        # the entries of its own block come from its own stream. That is the pattern of a clean query among clean keys.
        # The tiles of a call are all at the positions of the first.
        queries_1W1 = first_A[0] + torch.arange(width, device=self.device)[None, :, None]
        is_noisy = torch.zeros((), dtype=torch.bool, device=self.device)
        pattern = may_attend(
            queries_1W1, is_noisy, torch.arange(num_keys, device=self.device), is_noisy, self.block_size
        )
        return self._additive(pattern)[:, None].repeat(1, 1, self.heads.num_per_group, 1)

    def _additive(self, is_visible: torch.Tensor) -> torch.Tensor:
        return torch.zeros(is_visible.shape, dtype=self.dtype, device=self.device).masked_fill_(~is_visible, -torch.inf)


def _length_classes(num_keys_A: torch.Tensor) -> torch.Tensor:
    """A number for each sequence; equal ones share a call, of whose keys at most half fill up shorter sequences.

    All in one class if that much is granted, else those of up to 64, 128, 256 ... keys.
    """
    if len(num_keys_A) * int(num_keys_A.max()) <= 2 * int(num_keys_A.sum()):
        return torch.zeros_like(num_keys_A)
    return (num_keys_A.clamp_min(_SHORTEST_KEYS) / _SHORTEST_KEYS).log2().ceil()
