"""Who attends to whom: the one definition that every attention kernel is tested against.

The student reads a sequence as two streams over the same positions, a clean one and a noisy one. Every token attends
its own block in its own stream, in both directions, and the clean tokens of all earlier blocks. So the noisy block
`b` is denoised given the clean blocks before it, for all blocks in one forward, and nothing sees the clean tokens that
a noisy block stands for.

Example: two blocks of two. Rows are queries, columns keys: four clean tokens, then four noisy ones.

    >>> block_diffusion_mask(torch.tensor([4]), 4, 2)[0].int()
    tensor([[1, 1, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0, 0],
            [1, 1, 1, 1, 0, 0, 0, 0],
            [1, 1, 1, 1, 0, 0, 0, 0],
            [0, 0, 0, 0, 1, 1, 0, 0],
            [0, 0, 0, 0, 1, 1, 0, 0],
            [1, 1, 0, 0, 0, 0, 1, 1],
            [1, 1, 0, 0, 0, 0, 1, 1]], dtype=torch.int32)

Legend: `B` sequences, `S` positions of one stream.
"""

from __future__ import annotations

import torch

from megatron_opdlm.diffusion.blocks import block_index


def may_attend(
    query_positions: torch.Tensor,
    query_is_noisy: torch.Tensor,
    key_positions: torch.Tensor,
    key_is_noisy: torch.Tensor,
    block_size: int,
) -> torch.Tensor:
    """Whether each query may attend each key, bool, of the shape that the four tensors broadcast to.

    Args:
        query_positions: integer, absolute positions on the block grid, of any shape.
        query_is_noisy: bool, the query's stream.
        key_positions: integer, like the queries'. Padding is the caller's business: this is the rule between tokens.
        key_is_noisy: bool, the key's stream.
        block_size: positions per block.
    """
    query_block, key_block = block_index(query_positions, block_size), block_index(key_positions, block_size)
    is_own_block = (query_block == key_block) & (query_is_noisy == key_is_noisy)
    is_earlier_clean_block = (key_block < query_block) & ~key_is_noisy
    return is_own_block | is_earlier_clean_block


def filled_mask(sequence_length: int, block_size: int, device: torch.device | None = None) -> torch.Tensor:
    """What a causal teacher attends under `teacher.fill` argmax, bool [2S, 2S]: clean positions, then filled ones.

    The clean stream is plain causal. A filled token attends the clean tokens of earlier blocks, and of its own block
    the filled tokens up to itself, as if it stood in a sequence of its own: the clean blocks before, its filled block.

    Example: two blocks of two.
        >>> filled_mask(4, 2)[4:].int()
        tensor([[0, 0, 0, 0, 1, 0, 0, 0],
                [0, 0, 0, 0, 1, 1, 0, 0],
                [1, 1, 0, 0, 0, 0, 1, 0],
                [1, 1, 0, 0, 0, 0, 1, 1]], dtype=torch.int32)
    """
    position = torch.arange(sequence_length, device=device)
    is_causal = position <= position[:, None]
    is_own_block = block_index(position, block_size) == block_index(position, block_size)[:, None]
    clean = torch.cat([is_causal, torch.zeros_like(is_causal)], dim=1)
    return torch.cat([clean, torch.cat([is_causal & ~is_own_block, is_causal & is_own_block], dim=1)])


def block_diffusion_mask(lengths_B: torch.Tensor, sequence_length: int, block_size: int) -> torch.Tensor:
    """The whole pattern as a boolean mask [B, 2S, 2S], True where the row attends the column.

    Rows and columns hold the `S = sequence_length` clean positions, then the noisy ones. Positions at or after a
    sequence's length are padding, which no token attends; a padded row attends itself alone, so that its softmax
    stays finite.
    """
    position = torch.arange(sequence_length, device=lengths_B.device).repeat(2)
    is_noisy = torch.arange(2 * sequence_length, device=lengths_B.device) >= sequence_length
    is_real = position < lengths_B[:, None]
    mask = may_attend(position[:, None], is_noisy[:, None], position, is_noisy, block_size)
    diagonal = torch.eye(2 * sequence_length, dtype=torch.bool, device=lengths_B.device)
    return (mask & is_real[:, None, :] & is_real[:, :, None]) | diagonal
