"""The three Triton kernels of `local_triton`: outputs, gradients of queries, gradients of keys and values.

A program of the first two owns a tile of queries and walks over the tiles of keys that its rows see; a program of the
third owns a tile of keys and walks over the tiles of queries that see it. These walks are short: a row sees fewer than
2K keys. Programs with an even first index have the clean stream, odd ones the noisy stream. Scores are in units of
log 2, since the hardware's exponential is `exp2`.

Example: the launch for 2 sequences of 64 positions with 8 query and 2 key-value heads; `local_triton` makes the views.

    >>> sizes = Sizes(K=4, H=4, D=128, BLOCK_D=128, ROWS=64, KEYS=32)
    >>> grid = (2 * triton.cdiv(64 * 4, 64), 2 * 2)  # streams x tiles, sequences x groups
    >>> merge_kernel[grid](clean, noisy, causal_out, causal_lse, lse, lengths_B, 64, 2, 0.088, sizes)
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_opdlm.models.attention.local_triton_tiles import (
    first_elements,
    kernel_rows,
    key_rows,
    key_windows,
    load_numbers,
    load_rows,
    may_see,
    positions,
    query_rows,
    query_windows,
    sequence_and_group,
    store_rows,
)

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LOWEST: tl.constexpr = tl.constexpr(-1e30)  # instead of minus infinity for a maximum: its differences are no NaN


# --- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _attend(softmax, query, position, stream, place, window, scale, sizes: tl.constexpr):
    """Takes a window of a stream's keys into an online softmax: maxima, sums, weighted values."""
    peak, total, mixed = softmax
    sequence, group, length = place
    _, _, low, high = window
    for start in range(low, high, sizes.KEYS):
        keys = key_rows(start, sequence, group, high, sizes)
        key, value = load_rows(stream.key, keys, sizes), load_rows(stream.value, keys, sizes)
        key_position = positions(keys)[None, :]
        is_seen = may_see(key_position, window, position[:, None], key_position, length)
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
        rows = kernel_rows(stacked_rows, sizes)
        peak = tl.where(rows[5], load_numbers(lse, rows) * LOG2_E, peak)
        total = tl.where(rows[5], 1.0, total)
        mixed += load_rows(out, rows, sizes)
    return peak, total, mixed


@triton.jit
def _merge_tile(
    stream, clean, causal_out, causal_lse, lse, lengths, num_positions, num_groups, scale,
    STREAM: tl.constexpr, sizes: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0) // 2 * sizes.ROWS
    sequence, group = sequence_and_group(num_groups)
    rows, stacked_rows = query_rows(first_row, sequence, group, num_positions, STREAM, sizes)
    position = positions(rows)
    clean_keys, noisy_keys = key_windows(first_row, position, num_positions, STREAM, sizes)
    place = (sequence, group, tl.load(lengths + sequence))
    query = load_rows(stream.query, rows, sizes)
    softmax = _causal_softmax(causal_out, causal_lse, stacked_rows, sizes)
    softmax = _attend(softmax, query, position, clean, place, clean_keys, scale, sizes)
    if STREAM:
        softmax = _attend(softmax, query, position, stream, place, noisy_keys, scale, sizes)
    peak, total, mixed = softmax
    store_rows(stream.out, rows, mixed / total[:, None], sizes)
    tl.store(first_elements(lse, stacked_rows), (peak + tl.log2(total)) / LOG2_E, mask=rows[5])


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
        keys = key_rows(start, sequence, group, high, sizes)
        key, value = load_rows(stream.key, keys, sizes), load_rows(stream.value, keys, sizes)
        key_position = positions(keys)[None, :]
        is_seen = may_see(key_position, window, position[:, None], key_position, length)
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
    sequence, group = sequence_and_group(num_groups)
    rows, stacked_rows = query_rows(first_row, sequence, group, num_positions, STREAM, sizes)
    position = positions(rows)
    clean_keys, noisy_keys = key_windows(first_row, position, num_positions, STREAM, sizes)
    place = (sequence, group, tl.load(lengths + sequence))
    grad_out = load_rows(stream.grad_out, rows, sizes)
    row_sum = tl.sum(grad_out.to(tl.float32) * load_rows(stream.out, rows, sizes).to(tl.float32), axis=1)
    tl.store(first_elements(row_sums, stacked_rows), row_sum, mask=rows[5])
    query = load_rows(stream.query, rows, sizes)
    row_data = (query, grad_out, load_numbers(lse, stacked_rows) * LOG2_E, row_sum)
    total = tl.full([sizes.ROWS, sizes.BLOCK_D], 0.0, tl.float32)
    if causal_grad is not None:
        total += load_rows(causal_grad, kernel_rows(stacked_rows, sizes), sizes)
    total = _add_query_gradients(total, row_data, position, clean, place, clean_keys, scale, sizes)
    if STREAM:
        total = _add_query_gradients(total, row_data, position, stream, place, noisy_keys, scale, sizes)
    store_rows(stream.grad_query, rows, total, sizes)


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
        rows, stacked_rows = query_rows(first_row, sequence, group, high, STREAM, sizes)
        query, grad_out = load_rows(stream.query, rows, sizes), load_rows(stream.grad_out, rows, sizes)
        lse, row_sum = load_numbers(lse_view, stacked_rows) * LOG2_E, load_numbers(row_sum_view, stacked_rows)
        position = positions(rows)[None, :]
        is_seen = may_see(position, window, position, key_position[:, None], length) & rows[5][None, :]
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
    sequence, group = sequence_and_group(num_groups)
    first = tl.program_id(0) // 2 * sizes.KEYS
    keys = key_rows(first, sequence, group, num_positions, sizes)
    position = positions(keys)
    own_queries, noisy_queries = query_windows(first, position, num_positions, STREAM, sizes)
    place = (sequence, group, tl.load(lengths + sequence))
    key_data = (load_rows(stream.key, keys, sizes), load_rows(stream.value, keys, sizes), position)
    grad_key = tl.full([sizes.KEYS, sizes.BLOCK_D], 0.0, tl.float32)
    grad_value = tl.full([sizes.KEYS, sizes.BLOCK_D], 0.0, tl.float32)
    if causal_key is not None:
        # The causal kernel has all clean keys but the last block's, each at its own position.
        shared_keys = key_rows(first, sequence, group, num_positions - sizes.K, sizes)
        grad_key += load_rows(causal_key, shared_keys, sizes)
        grad_value += load_rows(causal_value, shared_keys, sizes)
    totals = (grad_key, grad_value)
    totals = _add_key_gradients(totals, key_data, stream, place, own_queries, lse, row_sums, scale, STREAM, sizes)
    if not STREAM:
        totals = _add_key_gradients(totals, key_data, noisy, place, noisy_queries, lse, row_sums, scale, 1, sizes)
    store_rows(stream.grad_key, keys, totals[0], sizes)
    store_rows(stream.grad_value, keys, totals[1], sizes)


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
