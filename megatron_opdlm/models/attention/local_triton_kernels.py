"""The Triton kernels of `local_triton`: tiles of queries against the few keys of their windows.

A tile of queries holds rows of one key-value group in one stream, position first: row `r` is the query at position
`r // H` of the group's head `r % H`. All its rows read the same keys, so grouped heads cost no further loads. A program
walks over the tiles of keys that its rows can see. Which of those one row does see is an open interval of positions:

    query stream   key stream   after                    before
    clean          clean        position - K             end of the query's block
    noisy          clean        position - K             start of the query's block
    noisy          noisy        start of the block - 1   end of the query's block

(the clean keys up to `position - K` are the causal kernel's). `_key_gradient_tile` reads the same table by key.
Scores are in units of log 2, since the hardware's exponential is `exp2`.

Example: the launch for 2 sequences of 64 positions with 8 query and 2 key-value heads; `local_triton` makes the views.

    >>> sizes = Sizes(K=4, H=4, D=128, BLOCK_D=128, ROWS=64, KEYS=32)
    >>> grid = (2 * triton.cdiv(64 * 4, 64), 2 * 2)  # streams x tiles, sequences x groups
    >>> merge_kernel[grid](clean, noisy, causal_out, causal_lse, lse, lengths_B, 64, 2, 0.088, sizes)

Legend: `S` positions of one stream (whole blocks), `K` positions of a block, `N` query heads, `G` key-value heads,
`H = N / G`, `D` head dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LOWEST: tl.constexpr = tl.constexpr(-1e30)  # instead of minus infinity for a maximum: its differences are no NaN


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
def _sequence_and_group(num_groups):
    return tl.program_id(1) // num_groups, tl.program_id(1) % num_groups


@triton.jit
def _query_rows(first_row, sequence, group, high, STREAM: tl.constexpr, sizes: tl.constexpr):
    """A tile of queries before position `high`: their rows in the stream, and in the stack of both streams' heads."""
    row = first_row + tl.arange(0, sizes.ROWS)
    start = first_row // sizes.H
    ahead, head, is_row = row // sizes.H - start, row % sizes.H, row // sizes.H < high
    first_head = group * sizes.H
    stacked_head = first_head + (group + STREAM) * sizes.H  # the order there is (group, stream, head of the group)
    return (sequence, start, first_head, ahead, head, is_row), (sequence, start, stacked_head, ahead, head, is_row)


@triton.jit
def _key_rows(start, sequence, group, high, sizes: tl.constexpr):
    """A tile of keys before position `high`: of one head, hence no heads further."""
    ahead = tl.arange(0, sizes.KEYS)
    return sequence, start, group, ahead, 0, start + ahead < high


@triton.jit
def _kernel_rows(stacked_rows, sizes: tl.constexpr):
    """The causal kernel's rows of queries: K positions before them, none for the first block."""
    sequence, start, head, ahead, heads_ahead, is_row = stacked_rows
    return sequence, start - sizes.K, head, ahead, heads_ahead, is_row & (start + ahead >= sizes.K)


@triton.jit
def _positions(rows):
    return rows[1] + rows[3]


@triton.jit
def _first_elements(view, rows):
    """Pointers to rows: one 64-bit base, since a batch may exceed 2**31 elements, and 32-bit offsets, which are cheap."""
    sequence, start, first_head, ahead, head, _ = rows
    base = view.pointer + tl.cast(sequence, tl.int64) * view.sequence
    base += tl.cast(start, tl.int64) * view.position + tl.cast(first_head, tl.int64) * view.head
    return base + (ahead * view.position + head * view.head)


@triton.jit
def _elements(view, rows, sizes: tl.constexpr):
    """Pointers [rows, BLOCK_D], and which of them may be read or written."""
    dim = tl.arange(0, sizes.BLOCK_D)
    return _first_elements(view, rows)[:, None] + dim[None, :], rows[5][:, None] & (dim < sizes.D)[None, :]


@triton.jit
def _load_rows(view, rows, sizes: tl.constexpr):
    """[rows, BLOCK_D] in the view's precision, zeros where nothing is there."""
    pointers, mask = _elements(view, rows, sizes)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _store_rows(view, rows, values, sizes: tl.constexpr):
    pointers, mask = _elements(view, rows, sizes)
    tl.store(pointers, values, mask=mask)


@triton.jit
def _load_numbers(view, rows):
    """One float32 per row, zero where no row is."""
    return tl.load(_first_elements(view, rows), mask=rows[5], other=0.0)


# --- who sees whom ---------------------------------------------------------------------------------------------------
# A window is a tuple: per row the open interval `after < position < before` it sees, and the range `low .. high - 1`
# that holds the intervals of all rows of a tile.


@triton.jit
def _key_windows(first_row, position, num_positions, STREAM: tl.constexpr, sizes: tl.constexpr):
    """What a tile of queries sees: of the clean keys, and of the noisy keys if it is noisy."""
    first = first_row // sizes.H
    last = tl.minimum((first_row + sizes.ROWS - 1) // sizes.H, num_positions - 1)
    block, last_block = _block(position, sizes), _block(last, sizes)
    # In the clean stream the own block follows the previous one: both are one interval.
    own = 0 if STREAM else sizes.K
    clean_keys = (position - sizes.K, block + own, tl.maximum(first - sizes.K + 1, 0), last_block + own)
    return clean_keys, (block - 1, block + sizes.K, _block(first, sizes), last_block + sizes.K)


@triton.jit
def _query_windows(first, position, num_positions, STREAM: tl.constexpr, sizes: tl.constexpr):
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
def _as_columns(window):
    after, before, low, high = window
    return after[:, None], before[:, None], low, high


@triton.jit
def _is_seen(position, window, query_position, key_position, length):
    """Positions in the window, as far as keys are real; a padded query sees itself, to keep its softmax finite."""
    after, before, _, _ = window
    is_in_window = (after < position) & (position < before)
    return is_in_window & ((key_position < length) | (key_position == query_position))


# --- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _attend(softmax, query, position, stream, place, window, scale, sizes: tl.constexpr):
    """Takes a window of a stream's keys into an online softmax: maxima, sums, weighted values."""
    peak, total, mixed = softmax
    sequence, group, length = place
    _, _, low, high = window
    for start in range(low, high, sizes.KEYS):
        keys = _key_rows(start, sequence, group, high, sizes)
        key, value = _load_rows(stream.key, keys, sizes), _load_rows(stream.value, keys, sizes)
        key_position = _positions(keys)[None, :]
        is_seen = _is_seen(key_position, _as_columns(window), position[:, None], key_position, length)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * (scale * LOG2_E)
        scores = tl.where(is_seen, scores, float("-inf"))
        higher_peak = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher_peak[:, None])
        rescale = tl.exp2(peak - higher_peak)
        total = total * rescale + tl.sum(weights, axis=1)
        mixed = tl.dot(weights.to(value.dtype), value, mixed * rescale[:, None], input_precision="ieee")
        peak = higher_peak
    return peak, total, mixed


@triton.jit
def _causal_softmax(out, lse, stacked_rows, sizes: tl.constexpr):
    """The causal kernel's result as the start of an online softmax: one key, with its log-sum-exp as the score.

    Queries of the first block start with no key.
    """
    peak = tl.full([sizes.ROWS], LOWEST, tl.float32)
    total = tl.full([sizes.ROWS], 0.0, tl.float32)
    mixed = tl.full([sizes.ROWS, sizes.BLOCK_D], 0.0, tl.float32)
    if out is not None:
        rows = _kernel_rows(stacked_rows, sizes)
        peak = tl.where(rows[5], _load_numbers(lse, rows) * LOG2_E, peak)
        total = tl.where(rows[5], 1.0, total)
        mixed += _load_rows(out, rows, sizes)
    return peak, total, mixed


@triton.jit
def _merge_tile(
    stream, clean, causal_out, causal_lse, lse, lengths, num_positions, num_groups, scale,
    STREAM: tl.constexpr, sizes: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0) // 2 * sizes.ROWS
    sequence, group = _sequence_and_group(num_groups)
    rows, stacked_rows = _query_rows(first_row, sequence, group, num_positions, STREAM, sizes)
    position = _positions(rows)
    clean_keys, noisy_keys = _key_windows(first_row, position, num_positions, STREAM, sizes)
    place = (sequence, group, tl.load(lengths + sequence))
    query = _load_rows(stream.query, rows, sizes)
    softmax = _causal_softmax(causal_out, causal_lse, stacked_rows, sizes)
    softmax = _attend(softmax, query, position, clean, place, clean_keys, scale, sizes)
    if STREAM:
        softmax = _attend(softmax, query, position, stream, place, noisy_keys, scale, sizes)
    peak, total, mixed = softmax
    _store_rows(stream.out, rows, mixed / total[:, None], sizes)
    tl.store(_first_elements(lse, stacked_rows), (peak + tl.log2(total)) / LOG2_E, mask=rows[5])


@triton.jit
def merge_kernel(
    clean, noisy, causal_out, causal_lse, lse, lengths, num_positions, num_groups, scale, sizes: tl.constexpr
):
    """Outputs and log-sum-exps. The two streams of a tile run next to each other and share the clean keys."""
    shared = (causal_out, causal_lse, lse, lengths, num_positions, num_groups, scale)
    if tl.program_id(0) % 2 == 0:
        _merge_tile(clean, clean, *shared, 0, sizes)
    else:
        _merge_tile(noisy, clean, *shared, 1, sizes)


# --- gradients of the queries ----------------------------------------------------------------------------------------


@triton.jit
def _add_query_gradients(total, row_data, position, stream, place, window, scale, sizes: tl.constexpr):
    """Adds the gradients of queries through a window of a stream's keys; `lse` is in units of log 2."""
    query, grad_out, lse, row_sum = row_data
    sequence, group, length = place
    _, _, low, high = window
    for start in range(low, high, sizes.KEYS):
        keys = _key_rows(start, sequence, group, high, sizes)
        key, value = _load_rows(stream.key, keys, sizes), _load_rows(stream.value, keys, sizes)
        key_position = _positions(keys)[None, :]
        is_seen = _is_seen(key_position, _as_columns(window), position[:, None], key_position, length)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * (scale * LOG2_E)
        weights = tl.exp2(tl.where(is_seen, scores - lse[:, None], float("-inf")))
        grad_weights = tl.dot(grad_out, tl.trans(value), input_precision="ieee")
        grad_scores = weights * (grad_weights - row_sum[:, None]) * scale
        total = tl.dot(grad_scores.to(key.dtype), key, total, input_precision="ieee")
    return total


@triton.jit
def _query_gradient_tile(
    stream, clean, causal_grad, lse, row_sums, lengths, num_positions, num_groups, scale,
    STREAM: tl.constexpr, sizes: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0) // 2 * sizes.ROWS
    sequence, group = _sequence_and_group(num_groups)
    rows, stacked_rows = _query_rows(first_row, sequence, group, num_positions, STREAM, sizes)
    position = _positions(rows)
    clean_keys, noisy_keys = _key_windows(first_row, position, num_positions, STREAM, sizes)
    place = (sequence, group, tl.load(lengths + sequence))
    grad_out = _load_rows(stream.grad_out, rows, sizes)
    row_sum = tl.sum(grad_out.to(tl.float32) * _load_rows(stream.out, rows, sizes).to(tl.float32), axis=1)
    tl.store(_first_elements(row_sums, stacked_rows), row_sum, mask=rows[5])
    query = _load_rows(stream.query, rows, sizes)
    row_data = (query, grad_out, _load_numbers(lse, stacked_rows) * LOG2_E, row_sum)
    total = tl.full([sizes.ROWS, sizes.BLOCK_D], 0.0, tl.float32)
    if causal_grad is not None:
        total += _load_rows(causal_grad, _kernel_rows(stacked_rows, sizes), sizes)
    total = _add_query_gradients(total, row_data, position, clean, place, clean_keys, scale, sizes)
    if STREAM:
        total = _add_query_gradients(total, row_data, position, stream, place, noisy_keys, scale, sizes)
    _store_rows(stream.grad_query, rows, total, sizes)


@triton.jit
def query_gradient_kernel(
    clean, noisy, causal_grad, lse, row_sums, lengths, num_positions, num_groups, scale, sizes: tl.constexpr
):
    """Gradients of both streams' queries on top of the causal kernel's, and the row sums for `key_gradient_kernel`."""
    shared = (causal_grad, lse, row_sums, lengths, num_positions, num_groups, scale)
    if tl.program_id(0) % 2 == 0:
        _query_gradient_tile(clean, clean, *shared, 0, sizes)
    else:
        _query_gradient_tile(noisy, clean, *shared, 1, sizes)


# --- gradients of the keys and values --------------------------------------------------------------------------------


@triton.jit
def _add_key_gradients(
    totals, key_data, stream, place, window, lse_view, row_sum_view, scale, STREAM: tl.constexpr, sizes: tl.constexpr
):
    """Adds the gradients of keys and values through a window of a stream's queries; scores are [KEYS, ROWS]."""
    grad_key, grad_value = totals
    key, value, key_position = key_data
    sequence, group, length = place
    _, _, low, high = window
    for first_row in range(low * sizes.H, high * sizes.H, sizes.ROWS):
        rows, stacked_rows = _query_rows(first_row, sequence, group, high, STREAM, sizes)
        query, grad_out = _load_rows(stream.query, rows, sizes), _load_rows(stream.grad_out, rows, sizes)
        lse, row_sum = _load_numbers(lse_view, stacked_rows) * LOG2_E, _load_numbers(row_sum_view, stacked_rows)
        position = _positions(rows)[None, :]
        is_seen = _is_seen(position, _as_columns(window), position, key_position[:, None], length) & rows[5][None, :]
        scores = tl.dot(key, tl.trans(query), input_precision="ieee") * (scale * LOG2_E)
        weights = tl.exp2(tl.where(is_seen, scores - lse[None, :], float("-inf")))
        grad_value = tl.dot(weights.to(grad_out.dtype), grad_out, grad_value, input_precision="ieee")
        grad_weights = tl.dot(value, tl.trans(grad_out), input_precision="ieee")
        grad_scores = weights * (grad_weights - row_sum[None, :]) * scale
        grad_key = tl.dot(grad_scores.to(query.dtype), query, grad_key, input_precision="ieee")
    return grad_key, grad_value


@triton.jit
def _key_gradient_tile(
    stream, noisy, causal_key, causal_value, lse, row_sums, lengths, num_positions, num_groups, scale,
    STREAM: tl.constexpr, sizes: tl.constexpr,
):  # fmt: skip
    sequence, group = _sequence_and_group(num_groups)
    first = tl.program_id(0) // 2 * sizes.KEYS
    keys = _key_rows(first, sequence, group, num_positions, sizes)
    position = _positions(keys)
    own_queries, noisy_queries = _query_windows(first, position, num_positions, STREAM, sizes)
    place = (sequence, group, tl.load(lengths + sequence))
    key_data = (_load_rows(stream.key, keys, sizes), _load_rows(stream.value, keys, sizes), position)
    grad_key = tl.full([sizes.KEYS, sizes.BLOCK_D], 0.0, tl.float32)
    grad_value = tl.full([sizes.KEYS, sizes.BLOCK_D], 0.0, tl.float32)
    if causal_key is not None:
        # The causal kernel has all clean keys but the last block's, each at its own position.
        shared_keys = _key_rows(first, sequence, group, num_positions - sizes.K, sizes)
        grad_key += _load_rows(causal_key, shared_keys, sizes)
        grad_value += _load_rows(causal_value, shared_keys, sizes)
    totals = (grad_key, grad_value)
    totals = _add_key_gradients(totals, key_data, stream, place, own_queries, lse, row_sums, scale, STREAM, sizes)
    if not STREAM:
        totals = _add_key_gradients(totals, key_data, noisy, place, noisy_queries, lse, row_sums, scale, 1, sizes)
    _store_rows(stream.grad_key, keys, totals[0], sizes)
    _store_rows(stream.grad_value, keys, totals[1], sizes)


@triton.jit
def key_gradient_kernel(
    clean,
    noisy,
    causal_key,
    causal_value,
    lse,
    row_sums,
    lengths,
    num_positions,
    num_groups,
    scale,
    sizes: tl.constexpr,
):
    """Gradients of both streams' keys and values, those of the clean ones on top of the causal kernel's."""
    shared = (lse, row_sums, lengths, num_positions, num_groups, scale)
    if tl.program_id(0) % 2 == 0:
        _key_gradient_tile(clean, noisy, causal_key, causal_value, *shared, 0, sizes)
    else:
        _key_gradient_tile(noisy, noisy, None, None, *shared, 1, sizes)
