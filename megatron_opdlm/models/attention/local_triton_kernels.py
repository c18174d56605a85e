"""The Triton kernels of `local_triton`: tiles of queries against the few keys of their windows.

A tile of queries holds the rows of one key-value group in one stream, position first: row `r` is the query at position
`r // H` of the group's head `r % H`. All rows of a tile read the same keys, so grouped heads cost no further loads,
and any number of heads fits. A program loops over the tiles of keys that its rows can see; which of them a row does
see is an open interval of positions, `after < key < before`:

    stream of the query   keys              after             before
    clean                 clean             position - K      end of the own block
    noisy                 clean             position - K      start of the own block
    noisy                 noisy             start - 1         end of the own block

The clean keys up to `position - K` are the causal kernel's. For the gradients of keys the same table is read the other
way round. A tensor comes as a view: its pointer, then its strides over sequences, positions and heads; the last
dimension is dense. Scores are kept in units of log 2, since the hardware's exponential is `exp2`.

Example: the launch for 2 sequences of 64 positions with 8 query and 2 key-value heads of 128, from `local_triton`.

    >>> grid = (2 * triton.cdiv(64 * 4, 64), 2 * 2)  # (streams x tiles, sequences x groups)
    >>> merge_kernel[grid](*views, K=4, H=4, D=128, BLOCK_D=128, ROWS=64, KEYS=32)

Legend: `S` positions of one stream (whole blocks), `K` positions of a block, `H` query heads that share a key-value
head, `D` head dimension, `BLOCK_D` the power of two that holds it, `ROWS` queries and `KEYS` keys of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LOWEST: tl.constexpr = tl.constexpr(-1e30)  # as a maximum that no score falls below; its differences stay finite


@triton.jit
def _offsets(view, batch, position, head):
    """Offsets of rows in a view, 64 bits wide: long batches have more than 2**31 elements."""
    return batch.to(tl.int64) * view[1] + position.to(tl.int64) * view[2] + head.to(tl.int64) * view[3]


@triton.jit
def _load(view, batch, position, head, is_there, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [.., BLOCK_D] in the view's precision, zeros where there is none."""
    dim = tl.arange(0, BLOCK_D)
    pointers = view[0] + _offsets(view, batch, position, head)[:, None] + dim[None, :]
    return tl.load(pointers, mask=is_there[:, None] & (dim < D)[None, :], other=0.0)


@triton.jit
def _store(view, values, batch, position, head, is_there, D: tl.constexpr, BLOCK_D: tl.constexpr):
    dim = tl.arange(0, BLOCK_D)
    pointers = view[0] + _offsets(view, batch, position, head)[:, None] + dim[None, :]
    tl.store(pointers, values, mask=is_there[:, None] & (dim < D)[None, :])


@triton.jit
def _is_seen(query_position, key_position, after, before, length):
    """Whether a query sees a key of its interval: a real one, or itself, which keeps a padded row finite."""
    return (after < key_position) & (key_position < before) & ((key_position < length) | (key_position == query_position))


@triton.jit
def _rows_of_tile(tile, batch_and_group, num_groups, STREAM: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr):
    """Sequence, group, and per row: position, head of the stream, head of the causal kernel (group, stream, head)."""
    row = tile * ROWS + tl.arange(0, ROWS)
    batch = batch_and_group // num_groups
    group = batch_and_group % num_groups
    head = group * H + row % H
    return batch, group, row // H, head, head + (group + STREAM) * H


# --- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _attend(
    state, query, keys, values, batch, group, position, after, before, low, high, length, score_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Folds the keys `low .. high - 1` into the state of an online softmax: maxima, sums, weighted values."""
    peak, total, mixed = state
    for start in range(low, high, KEYS):
        key_position = start + tl.arange(0, KEYS)
        is_key = key_position < high
        key = _load(keys, batch, key_position, group, is_key, D, BLOCK_D)
        value = _load(values, batch, key_position, group, is_key, D, BLOCK_D)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * score_scale
        is_seen = _is_seen(position[:, None], key_position[None, :], after[:, None], before[:, None], length)
        scores = tl.where(is_seen, scores, float("-inf"))
        higher_peak = tl.maximum(peak, tl.max(scores, axis=1))
        rescale = tl.exp2(peak - higher_peak)
        weights = tl.exp2(scores - higher_peak[:, None])
        total = total * rescale + tl.sum(weights, axis=1)
        mixed = tl.dot(weights.to(value.dtype), value, mixed * rescale[:, None], input_precision="ieee")
        peak = higher_peak
    return peak, total, mixed


@triton.jit
def _merge_tile(
    query_view, out_view, key_clean, value_clean, key_noisy, value_noisy, causal_out, causal_lse, lse, lengths,
    S, num_groups, score_scale,
    STREAM: tl.constexpr, K: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // 2
    batch, group, position, head, stacked_head = _rows_of_tile(tile, tl.program_id(1), num_groups, STREAM, H, ROWS)
    is_row = position < S
    query = _load(query_view, batch, position, head, is_row, D, BLOCK_D)
    # A softmax over one key with score `causal_lse` and value `causal_out` is what the causal kernel found.
    peak = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if causal_out is not None:
        is_later = is_row & (position >= K)
        seed = tl.load(causal_lse[0] + _offsets(causal_lse, batch, position - K, stacked_head), mask=is_later, other=0.0)
        peak = tl.where(is_later, seed * LOG2_E, peak)
        total = tl.where(is_later, 1.0, total)
        mixed += _load(causal_out, batch, position - K, stacked_head, is_later, D, BLOCK_D)
    length = tl.load(lengths + batch)
    block = position // K * K
    first = tile * ROWS // H
    last_block = tl.minimum((tile * ROWS + ROWS - 1) // H, S - 1) // K * K
    # In the clean stream the previous block and the own one lie side by side: one interval.
    clean_end = K if STREAM == 0 else 0
    peak, total, mixed = _attend(
        (peak, total, mixed), query, key_clean, value_clean, batch, group, position, position - K, block + clean_end,
        tl.maximum(first - K + 1, 0), last_block + clean_end, length, score_scale, D, BLOCK_D, KEYS,
    )  # fmt: skip
    if STREAM == 1:
        peak, total, mixed = _attend(
            (peak, total, mixed), query, key_noisy, value_noisy, batch, group, position, block - 1, block + K,
            first // K * K, last_block + K, length, score_scale, D, BLOCK_D, KEYS,
        )  # fmt: skip
    _store(out_view, mixed / total[:, None], batch, position, head, is_row, D, BLOCK_D)
    merged = (peak + tl.log2(total)) / LOG2_E
    tl.store(lse[0] + _offsets(lse, batch, position, stacked_head), merged, mask=is_row)


@triton.jit
def merge_kernel(
    query_clean, key_clean, value_clean, query_noisy, key_noisy, value_noisy, out_clean, out_noisy,
    causal_out, causal_lse, lse, lengths, S, num_groups, score_scale,
    K: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Outputs and log-sum-exps. The two streams of a tile run next to each other and share the clean keys."""
    if tl.program_id(0) % 2 == 0:
        _merge_tile(
            query_clean, out_clean, key_clean, value_clean, key_noisy, value_noisy, causal_out, causal_lse, lse,
            lengths, S, num_groups, score_scale, 0, K, H, D, BLOCK_D, ROWS, KEYS,
        )  # fmt: skip
    else:
        _merge_tile(
            query_noisy, out_noisy, key_clean, value_clean, key_noisy, value_noisy, causal_out, causal_lse, lse,
            lengths, S, num_groups, score_scale, 1, K, H, D, BLOCK_D, ROWS, KEYS,
        )  # fmt: skip


# --- gradients of the queries ----------------------------------------------------------------------------------------


@triton.jit
def _query_gradient(
    total, query, grad_out, lse, row_sum, keys, values, batch, group, position, after, before, low, high, length,
    scale, D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Adds what the keys `low .. high - 1` say about the queries; `lse` in units of log 2."""
    for start in range(low, high, KEYS):
        key_position = start + tl.arange(0, KEYS)
        is_key = key_position < high
        key = _load(keys, batch, key_position, group, is_key, D, BLOCK_D)
        value = _load(values, batch, key_position, group, is_key, D, BLOCK_D)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * (scale * LOG2_E)
        is_seen = _is_seen(position[:, None], key_position[None, :], after[:, None], before[:, None], length)
        weights = tl.where(is_seen, tl.exp2(scores - lse[:, None]), 0.0)
        grad_weights = tl.dot(grad_out, tl.trans(value), input_precision="ieee")
        grad_scores = weights * (grad_weights - row_sum[:, None]) * scale
        total = tl.dot(grad_scores.to(key.dtype), key, total, input_precision="ieee")
    return total


@triton.jit
def _query_gradient_tile(
    query_view, grad_view, out_view, grad_query_view, key_clean, value_clean, key_noisy, value_noisy, causal_grad,
    lse_view, row_sum_view, lengths, S, num_groups, scale,
    STREAM: tl.constexpr, K: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // 2
    batch, group, position, head, stacked_head = _rows_of_tile(tile, tl.program_id(1), num_groups, STREAM, H, ROWS)
    is_row = position < S
    query = _load(query_view, batch, position, head, is_row, D, BLOCK_D)
    grad_out = _load(grad_view, batch, position, head, is_row, D, BLOCK_D)
    out = _load(out_view, batch, position, head, is_row, D, BLOCK_D)
    row_sum = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(row_sum_view[0] + _offsets(row_sum_view, batch, position, stacked_head), row_sum, mask=is_row)
    lse = tl.load(lse_view[0] + _offsets(lse_view, batch, position, stacked_head), mask=is_row, other=0.0) * LOG2_E
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if causal_grad is not None:
        total += _load(causal_grad, batch, position - K, stacked_head, is_row & (position >= K), D, BLOCK_D)
    length = tl.load(lengths + batch)
    block = position // K * K
    first = tile * ROWS // H
    last_block = tl.minimum((tile * ROWS + ROWS - 1) // H, S - 1) // K * K
    clean_end = K if STREAM == 0 else 0
    total = _query_gradient(
        total, query, grad_out, lse, row_sum, key_clean, value_clean, batch, group, position, position - K,
        block + clean_end, tl.maximum(first - K + 1, 0), last_block + clean_end, length, scale, D, BLOCK_D, KEYS,
    )  # fmt: skip
    if STREAM == 1:
        total = _query_gradient(
            total, query, grad_out, lse, row_sum, key_noisy, value_noisy, batch, group, position, block - 1,
            block + K, first // K * K, last_block + K, length, scale, D, BLOCK_D, KEYS,
        )  # fmt: skip
    _store(grad_query_view, total, batch, position, head, is_row, D, BLOCK_D)


@triton.jit
def query_gradient_kernel(
    query_clean, key_clean, value_clean, query_noisy, key_noisy, value_noisy, grad_clean, grad_noisy,
    out_clean, out_noisy, grad_query_clean, grad_query_noisy, causal_grad, lse, row_sums, lengths,
    S, num_groups, scale,
    K: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradients of both streams' queries, on top of the causal kernel's; and the row sums for the next kernel."""
    if tl.program_id(0) % 2 == 0:
        _query_gradient_tile(
            query_clean, grad_clean, out_clean, grad_query_clean, key_clean, value_clean, key_noisy, value_noisy,
            causal_grad, lse, row_sums, lengths, S, num_groups, scale, 0, K, H, D, BLOCK_D, ROWS, KEYS,
        )  # fmt: skip
    else:
        _query_gradient_tile(
            query_noisy, grad_noisy, out_noisy, grad_query_noisy, key_clean, value_clean, key_noisy, value_noisy,
            causal_grad, lse, row_sums, lengths, S, num_groups, scale, 1, K, H, D, BLOCK_D, ROWS, KEYS,
        )  # fmt: skip


# --- gradients of the keys and values --------------------------------------------------------------------------------


@triton.jit
def _key_gradients(
    grads, key, value, queries, grad_outs, lse_view, row_sum_view, batch_and_group, num_groups, key_position,
    after, before, low, high, length, scale,
    STREAM: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Adds what the queries at `low .. high - 1` of one stream say about the keys and values of a tile.

    A query sees a key if `after < query < before`; scores are transposed, [KEYS, ROWS].
    """
    grad_key, grad_value = grads
    for start in range(low * H, high * H, ROWS):
        row = start + tl.arange(0, ROWS)
        position = row // H
        batch = batch_and_group // num_groups
        group = batch_and_group % num_groups
        head = group * H + row % H
        stacked_head = head + (group + STREAM) * H
        is_row = position < high
        query = _load(queries, batch, position, head, is_row, D, BLOCK_D)
        grad_out = _load(grad_outs, batch, position, head, is_row, D, BLOCK_D)
        lse = tl.load(lse_view[0] + _offsets(lse_view, batch, position, stacked_head), mask=is_row, other=0.0)
        row_sum = tl.load(row_sum_view[0] + _offsets(row_sum_view, batch, position, stacked_head), mask=is_row, other=0.0)
        scores = tl.dot(key, tl.trans(query), input_precision="ieee") * scale
        is_seen = is_row[None, :] & (after[:, None] < position[None, :]) & (position[None, :] < before[:, None])
        is_seen &= (key_position < length)[:, None] | (key_position[:, None] == position[None, :])
        weights = tl.where(is_seen, tl.exp2((scores - lse[None, :]) * LOG2_E), 0.0)
        grad_value = tl.dot(weights.to(grad_out.dtype), grad_out, grad_value, input_precision="ieee")
        grad_weights = tl.dot(value, tl.trans(grad_out), input_precision="ieee")
        grad_scores = weights * (grad_weights - row_sum[None, :]) * scale
        grad_key = tl.dot(grad_scores.to(query.dtype), query, grad_key, input_precision="ieee")
    return grad_key, grad_value
