"""Masks that ignore how a sequence was decoded: the states of everything that is not on-policy.

A noise level t, uniform between two bounds, is drawn for each block, or one for the whole sequence, and each response
position is masked with probability t. What is drawn depends on the generator alone.

With `at_least_one`, a block where that masks nothing masks the position whose uniform number is the lowest. It keeps
every block in the loss, at the price of a small bias; under weights of 1/t, a block of a tiny t would then weigh as
much as a thousand others, so there it must be off.

Example: one block of four, the first position of which is prompt.

    >>> is_response_MK = torch.tensor([[False, True, True, True]])
    >>> masks = draw_masks(is_response_MK, torch.Generator().manual_seed(6))
    >>> [round(value, 2) for value in masks.uniform_MK[0].tolist()], round(masks.noise_MK[0, 0].item(), 2)
    ([0.89, 0.88, 0.39, 0.48], 0.58)
    >>> masks.is_masked_MK.int().tolist()
    [[0, 0, 1, 1]]

Legend: `M` blocks that hold response tokens, `K` positions of one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatron_opdlm.config.method import NoiseLevel


class RandomMasks(NamedTuple):
    """What was drawn for one sequence; the numbers are float64."""

    is_masked_MK: torch.Tensor
    """bool; never a prompt token."""
    noise_MK: torch.Tensor
    """t of each position."""
    uniform_MK: torch.Tensor
    """The uniform number of each position, which is masked where it is below t."""


def draw_masks(
    is_response_MK: torch.Tensor,
    generator: torch.Generator,
    *,
    noise_level: NoiseLevel = "block",
    low: float = 0.0,
    high: float = 1.0,
    at_least_one: bool = True,
) -> RandomMasks:
    """Masks of the positions of one sequence that `is_response_MK` says may be masked; every block has one of these."""
    num_blocks, block_size = is_response_MK.shape
    num_levels = num_blocks if noise_level == "block" else 1
    level_L1 = torch.rand(num_levels, 1, generator=generator, dtype=torch.float64)
    noise_MK = (low + (high - low) * level_L1).expand(num_blocks, block_size)
    uniform_MK = torch.rand(num_blocks, block_size, generator=generator, dtype=torch.float64)
    candidates_MK = uniform_MK.masked_fill(~is_response_MK, torch.inf)
    is_masked_MK = candidates_MK < noise_MK
    if at_least_one:
        is_masked_MK |= torch.arange(block_size) == candidates_MK.argmin(dim=1, keepdim=True)
    return RandomMasks(is_masked_MK, noise_MK, uniform_MK)
