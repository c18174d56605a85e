"""The attention pattern against the sentences of the method, spelt out one pair of tokens at a time."""

from __future__ import annotations

import pytest
import torch

from megatron_opdlm.diffusion.attention_pattern import block_diffusion_mask, filled_mask, may_attend


def pattern_by_hand(length: int, sequence_length: int, block_size: int) -> torch.Tensor:
    """[2S, 2S], by loops over tokens."""
    mask = torch.zeros(2 * sequence_length, 2 * sequence_length, dtype=torch.bool)
    tokens = [(stream, position) for stream in ("clean", "noisy") for position in range(sequence_length)]
    for row, (query_stream, query) in enumerate(tokens):
        for column, (key_stream, key) in enumerate(tokens):
            query_block, key_block = query // block_size, key // block_size
            if query >= length or key >= length:
                mask[row, column] = row == column
            elif query_stream == "clean" and key_stream == "clean":
                mask[row, column] = key_block <= query_block
            elif query_stream == "noisy" and key_stream == "clean":
                mask[row, column] = key_block < query_block
            elif query_stream == "noisy" and key_stream == "noisy":
                mask[row, column] = key_block == query_block
    return mask


@pytest.mark.parametrize(("sequence_length", "block_size"), [(8, 4), (7, 3), (3, 4), (4, 4), (5, 1), (6, 2)])
def test_the_mask_is_the_pattern_of_the_method(sequence_length, block_size):
    lengths = [sequence_length, sequence_length - 1, sequence_length // 2 + 1]
    expected = torch.stack([pattern_by_hand(length, sequence_length, block_size) for length in lengths])
    assert torch.equal(block_diffusion_mask(torch.tensor(lengths), sequence_length, block_size), expected)


def test_a_noisy_token_never_attends_the_clean_tokens_of_its_own_block():
    positions = torch.arange(4, 8)
    assert not may_attend(positions[:, None], torch.tensor(True), positions, torch.tensor(False), 4).any()


def test_every_row_attends_something_so_that_the_softmax_is_finite():
    assert block_diffusion_mask(torch.tensor([1, 5]), 8, 4).any(dim=-1).all()


def test_positions_are_absolute_so_a_slice_of_the_pattern_is_the_pattern_of_a_slice():
    whole = block_diffusion_mask(torch.tensor([12]), 12, 4)[0, 12:, :12]
    positions = torch.arange(6, 10)
    part = may_attend(positions[:, None], torch.tensor(True), torch.arange(12), torch.tensor(False), 4)
    assert torch.equal(part, whole[6:10])


def test_each_filled_token_stands_in_a_sequence_of_clean_blocks_and_its_own_filled_block():
    mask = filled_mask(9, 4).tolist()
    for i in range(9):
        assert [j for j in range(18) if mask[i][j]] == list(range(i + 1)), "the clean stream is causal"
        start = i // 4 * 4
        filled = [j for j in range(18) if mask[9 + i][j]]
        assert filled == [*range(start), *range(9 + start, 9 + i + 1)]
        assert [j % 9 for j in filled] == list(range(i + 1)), "one token for each position so far"
