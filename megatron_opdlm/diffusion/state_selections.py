"""Which partly masked views of a trajectory are trained: one function per `states.selection`.

A selection looks at the step map alone. It says for each of its rows which positions are masked, and which of them the
rollout committed in the very state that the row shows.

- `one_per_block`, the paper's: each block shows one of its realised denoising steps, drawn uniformly.
- `all_steps`: every realised step of every block. With `states.shrink` k, k neighbouring steps of a block are merged:
  row r shows the state in which the block's step number r k (from 0, counting realised steps) was taken. So visible is
  what was committed before the group's first step, masked is all the rest, and committed are the positions of the
  group's first step, the only one that was taken in this state. What the group's later steps committed is masked too.
  A block with fewer steps has nothing masked in the rows that are left.
- `random_mask`: as if there were no step map. Per block t is uniform in [0, 1), and each response position is masked
  with probability t; where that masks none, the one whose uniform number is the lowest. Nothing counts as committed,
  since the rollout was never in such a state.

Example: one block that was decoded in three steps, the second of which committed two positions.

    >>> steps_MK = torch.tensor([[2, 1, 3, 2]])
    >>> masks = select_masks(steps_MK, StatesConfig(selection="all_steps"), num_rows=4, generator=torch.Generator())
    >>> masks.is_masked_RMK[:, 0].int().tolist()
    [[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]]
    >>> masks.is_committed_RMK[:, 0].int().tolist()
    [[0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]

Legend: `R` rows, `M` blocks that hold response tokens, `K` positions of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from megatron_opdlm.config.schema import StatesConfig
from megatron_opdlm.diffusion.random_masks import draw_masks
from megatron_opdlm.diffusion.trajectory import sort_steps


class Masks(NamedTuple):
    """What the rows of one trajectory hide."""

    is_masked_RMK: torch.Tensor
    """bool: replaced by the mask token; never a prompt token."""
    is_committed_RMK: torch.Tensor
    """bool: committed by the rollout in this state, a subset of the masked."""


def rows_per_trajectory(states: StatesConfig, denoising_steps_per_block: int) -> int:
    """Rows that each trajectory gives: as many as its blocks can have states.

    Example:
        >>> rows_per_trajectory(StatesConfig(selection="all_steps", shrink=2), denoising_steps_per_block=5)
        3
    """
    return -(-denoising_steps_per_block // states.shrink) if states.selection == "all_steps" else 1


def select_masks(steps_MK: torch.Tensor, states: StatesConfig, *, num_rows: int, generator: torch.Generator) -> Masks:
    """The masks of one trajectory in `num_rows` rows; those that the selection has no use for mask nothing.

    `steps_MK` is `Trajectory.steps_by_block_MK`: 0 at prompt tokens, and every block has a step above 0.
    """
    masks = SELECTIONS[states.selection](steps_MK, states, generator)
    num_missing = num_rows - len(masks.is_masked_RMK)
    assert num_missing >= 0, f"{len(masks.is_masked_RMK)} rows of a trajectory, with room for {num_rows}"
    return Masks(*(torch.cat([mask, mask.new_zeros(num_missing, *steps_MK.shape)]) for mask in masks))


def _one_per_block(steps_MK: torch.Tensor, states: StatesConfig, generator: torch.Generator) -> Masks:
    # Prompt tokens have step 0, which comes before every drawn step: they are visible without a rule of their own.
    drawn_M1 = draw_realised_steps(steps_MK, generator)[:, None]
    return Masks((steps_MK >= drawn_M1)[None], (steps_MK == drawn_M1)[None])


def _all_steps(steps_MK: torch.Tensor, states: StatesConfig, generator: torch.Generator) -> Masks:
    sorted_MK, is_realised_MK = sort_steps(steps_MK)
    # The place of a position's step among the realised ones: how many of these are not after it. 0 at prompt tokens.
    is_not_after_MKK = is_realised_MK[:, None] & (sorted_MK[:, None] <= steps_MK[:, :, None])
    place_MK = is_not_after_MKK.sum(dim=2)
    first_places = torch.arange(1, int(place_MK.max()) + 1, states.shrink)[:, None, None]
    return Masks(place_MK >= first_places, place_MK == first_places)


def _random_mask(steps_MK: torch.Tensor, states: StatesConfig, generator: torch.Generator) -> Masks:
    is_masked_MK = draw_masks(steps_MK > 0, generator).is_masked_MK
    return Masks(is_masked_MK[None], torch.zeros_like(is_masked_MK)[None])


SELECTIONS: dict[str, Callable[[torch.Tensor, StatesConfig, torch.Generator], Masks]] = {
    "one_per_block": _one_per_block,
    "all_steps": _all_steps,
    "random_mask": _random_mask,
}
"""`states.selection` -> step map, settings and generator of a trajectory to the masks of its rows."""


def draw_realised_steps(steps_MK: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One of the realised denoising steps of each block, uniformly, int64 [M].

    Args:
        steps_MK: int64 [M, K], as `Trajectory.steps_by_block_MK`; every block has a step above 0.
    """
    sorted_MK, is_realised_MK = sort_steps(steps_MK)
    num_realised_M = is_realised_MK.sum(dim=1)
    uniform_M = torch.rand(len(steps_MK), generator=generator, dtype=torch.float64)
    choice_M = (uniform_M * num_realised_M).long()
    is_chosen_MK = is_realised_MK & (is_realised_MK.cumsum(dim=1) == choice_M[:, None] + 1)
    return sorted_MK[is_chosen_MK]
