"""The absolute block grid: position `i` of a sequence is in block `i // block_size`, whatever the prompt's length.

Prefill, decoding, training and export all use this one grid, so the block that holds the end of the prompt also holds
the first response tokens, and a state is trained in the block it was visited in. Positions count from 0.

Example: a prompt of 6 tokens in blocks of 4. Block 1 holds two prompt tokens and the first two of the response.

    >>> block_start(6, 4), block_index(6, 4), round_up_to_grid(6 + 5, 4)
    (4, 1, 12)
    >>> commit_schedule(8, 3).tolist()
    [3, 3, 2]

Legend: `S` denoising steps per block.
"""

from __future__ import annotations

from typing import TypeVar

import torch

Position = TypeVar("Position", int, torch.Tensor)


def block_index(position: Position, block_size: int) -> Position:
    """The block that holds `position` (an int, or an integer tensor of any shape)."""
    return position // block_size


def block_start(position: Position, block_size: int) -> Position:
    """The first position of the block that holds `position`.

    `block_start(prompt_length, block_size)` is the number of prompt tokens in whole blocks, that is, what a prefill
    puts into the cache; the other `prompt_length % block_size` tokens open the first block that is denoised.
    """
    return position // block_size * block_size


def round_up_to_grid(num_tokens: Position, block_size: int) -> Position:
    """The smallest multiple of `block_size` that is at least `num_tokens`.

    `round_up_to_grid(prompt_length + max_new_tokens, block_size)` is the longest terminal sequence of a prompt.
    """
    return (num_tokens + block_size - 1) // block_size * block_size


def num_committed_at_step(step: int, block_size: int, denoising_steps_per_block: int) -> int:
    """n(s) of the method: how many positions denoising step `step` of a block commits at least.

    `step` counts from 0 here, as in the formula (a *step map* counts from 1). The steps of a block sum up to
    `block_size`, and the earlier ones take the remainder.
    """
    assert 0 <= step < denoising_steps_per_block <= block_size, (
        f"step {step} of {denoising_steps_per_block} in a block of {block_size}: every step must commit a position"
    )
    quotient, remainder = divmod(block_size, denoising_steps_per_block)
    return quotient + (1 if step < remainder else 0)


def commit_schedule(
    block_size: int, denoising_steps_per_block: int, device: torch.device | None = None
) -> torch.Tensor:
    """n(s) for all steps of a block, int64 [S]; index it with zero-based steps that differ from row to row."""
    steps = range(denoising_steps_per_block)
    counts = [num_committed_at_step(step, block_size, denoising_steps_per_block) for step in steps]
    return torch.tensor(counts, dtype=torch.int64, device=device)
