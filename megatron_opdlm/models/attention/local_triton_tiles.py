"""What the kernels of `local_triton_kernels` are made of: views of tensors, tiles of rows, and who sees whom in a tile.

A tile of queries holds rows of one key-value group in one stream, position first: row `r` is the query at position
`r // H` of the group's head `r % H`. All its rows read the same keys, so grouped heads cost no further loads. What a
row sees is an open interval of key positions, cut off at the sequence's length:

    query stream   key stream   after                    before
    clean          clean        position - K             end of the query's block
    noisy          clean        position - K             start of the query's block
    noisy          noisy        start of the block - 1   end of the query's block

The clean keys up to `position - K` are the causal kernel's. `query_windows` is the same table read by key.

Example: in a kernel, the queries of a tile and one tile of keys.

    >>> rows, stacked_rows = query_rows(first_row, sequence, group, num_positions, STREAM, sizes)
    >>> query = load_rows(stream.query, rows, sizes)  # [ROWS, BLOCK_D]
    >>> key = load_rows(stream.key, key_rows(start, sequence, group, high, sizes), sizes)  # [KEYS, BLOCK_D]

Legend: `B` sequences, `S` positions of one stream (whole blocks), `K` positions of a block, `N` query heads, `G`
key-value heads, `H = N / G`, `D` head dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class View(NamedTuple):
    """A tensor [B, S, heads, D] or [B, S, heads] as kernels take it: first element and strides, `D` being dense."""

    pointer: torch.Tensor
    sequence: int
    position: int
    head: int


class Stream(NamedTuple):
    """The tensors of one stream; a kernel gets those it reads or writes. Query heads are N, key-value heads G."""

    query: View
    key: View
    value: View
    out: View | None = None
    grad_out: View | None = None
    grad_query: View | None = None
    grad_key: View | None = None
    grad_value: View | None = None


class Sizes(NamedTuple):
    """What a kernel is compiled for. `ROWS`, `KEYS` and `BLOCK_D` are powers of two from 16 on."""

    K: int
    H: int
    D: int
    BLOCK_D: int
    """At least D: a row is loaded with zeros behind it."""
    ROWS: int
    """Queries of a tile."""
    KEYS: int
    """Keys of a tile."""


# --- rows ------------------------------------------------------------------------------------------------------------
# Rows of a view are a tuple: where they begin (sequence, position, head), and per row how many positions and heads it
# lies further, and whether it exists.


@triton.jit
def sequence_and_group(num_groups):
    return tl.program_id(1) // num_groups, tl.program_id(1) % num_groups


@triton.jit
def query_rows(first_row, sequence, group, high, STREAM: tl.constexpr, sizes: tl.constexpr):
    """A tile of queries before position `high`: their rows in the stream, and in the stack of both streams' heads."""
    row = first_row + tl.arange(0, sizes.ROWS)
    start = first_row // sizes.H
    ahead, head, is_row = row // sizes.H - start, row % sizes.H, row // sizes.H < high
    first_head = group * sizes.H
    stacked_head = first_head + (group + STREAM) * sizes.H  # the order there is (group, stream, head of the group)
    return (sequence, start, first_head, ahead, head, is_row), (sequence, start, stacked_head, ahead, head, is_row)


@triton.jit
def key_rows(start, sequence, group, high, sizes: tl.constexpr):
    """A tile of keys before position `high`: of one head, hence no heads further."""
    ahead = tl.arange(0, sizes.KEYS)
    return sequence, start, group, ahead, 0, start + ahead < high


@triton.jit
def kernel_rows(stacked_rows, sizes: tl.constexpr):
    """The causal kernel's rows of queries: K positions before them, none for the first block."""
    sequence, start, head, ahead, heads_ahead, is_row = stacked_rows
    return sequence, start - sizes.K, head, ahead, heads_ahead, is_row & (start + ahead >= sizes.K)


@triton.jit
def positions(rows):
    return rows[1] + rows[3]


@triton.jit
def first_elements(view, rows):
    """Pointers to rows: one 64-bit base, as a batch may exceed 2**31 elements, and 32-bit offsets, which are cheap."""
    sequence, start, first_head, ahead, head, _ = rows
    base = view.pointer + tl.cast(sequence, tl.int64) * view.sequence
    base += tl.cast(start, tl.int64) * view.position + tl.cast(first_head, tl.int64) * view.head
    return base + (ahead * view.position + head * view.head)


@triton.jit
def _elements(view, rows, sizes: tl.constexpr):
    """Pointers [rows, BLOCK_D], and which of them may be read or written."""
    dim = tl.arange(0, sizes.BLOCK_D)
    return first_elements(view, rows)[:, None] + dim[None, :], rows[5][:, None] & (dim < sizes.D)[None, :]


@triton.jit
def load_rows(view, rows, sizes: tl.constexpr):
    """[rows, BLOCK_D] in the view's precision, zeros where nothing is there."""
    pointers, mask = _elements(view, rows, sizes)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_rows(view, rows, values, sizes: tl.constexpr):
    pointers, mask = _elements(view, rows, sizes)
    tl.store(pointers, values, mask=mask)


@triton.jit
def load_numbers(view, rows):
    """One float32 per row, zero where no row is."""
    return tl.load(first_elements(view, rows), mask=rows[5], other=0.0)


# --- who sees whom ---------------------------------------------------------------------------------------------------
# A window is a tuple: per row the open interval `after < position < before` it sees, and the range `low .. high - 1`
# that holds the intervals of all rows of a tile.


@triton.jit
def key_windows(first_row, position, num_positions, STREAM: tl.constexpr, sizes: tl.constexpr):
    """What a tile of queries sees: of the clean keys, and of the noisy keys if it is noisy."""
    first = first_row // sizes.H
    last = tl.minimum((first_row + sizes.ROWS - 1) // sizes.H, num_positions - 1)
    block, last_block = _block(position, sizes), _block(last, sizes)
    # In the clean stream the own block follows the previous one: both are one interval.
    own = 0 if STREAM else sizes.K
    clean_keys = (position - sizes.K, block + own, tl.maximum(first - sizes.K + 1, 0), last_block + own)
    return clean_keys, (block - 1, block + sizes.K, _block(first, sizes), last_block + sizes.K)


@triton.jit
def query_windows(first, position, num_positions, STREAM: tl.constexpr, sizes: tl.constexpr):
    """What sees a tile of keys: queries of its own stream, and noisy queries if it is clean."""
    last = tl.minimum(first + sizes.KEYS, num_positions) - 1
    block, first_block = _block(position, sizes), _block(first, sizes)
    # A clean key is seen from up to K - 1 positions ahead, a noisy one from its block alone.
    before = block + sizes.K if STREAM else position + sizes.K
    high = _block(last, sizes) + sizes.K if STREAM else tl.minimum(last + sizes.K, num_positions)
    return (block - 1, before, first_block, high), (block + sizes.K - 1, before, first_block + sizes.K, high)


@triton.jit
def _block(position, sizes: tl.constexpr):
    """Where the block of a position starts."""
    return position // sizes.K * sizes.K


@triton.jit
def may_see(positions_across, window, query_position, key_position, length):
    """Which positions [1, columns] lie in the windows of the rows and are real; [rows, columns].

    A padded query sees itself, so that its softmax stays finite.
    """
    after, before, _, _ = window
    is_in_window = (after[:, None] < positions_across) & (positions_across < before[:, None])
    return is_in_window & ((key_position < length) | (key_position == query_position))
