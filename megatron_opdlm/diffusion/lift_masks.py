"""Masks by learnability: of more positions than are to be trained, the hardest, any, or the easiest.

Learnability-Informed Fine-Tuning, block by block on our grid. With little noise (t < 1/3) the context is almost whole
and only hard tokens teach anything; with much of it (t > 2/3) hard ones cannot be known, so the easy ones are trained.
How hard a token is, the student says itself, from a state that masks more:

1. per block draw t and rho, uniform from `lower` (0.1, or 0 where 1 - t is not above that) to 1 - t, and mask each
   response position with probability t + rho: the super-set (`mask_super_sets`);
2. a forward without gradients gives log p of the true token at each of the n masked positions of a block;
3. round(n t / (t + rho)) of them stay masked: those of the lowest log p for t < 1/3, any up to 2/3, those of the
   highest above. The others get their true tokens back (`keep_by_learnability`), and this state is trained.

Example: one block of which three positions are masked; with t = 0.3 and rho = 0.15, two stay, the hardest.

    >>> log_probs_MK = torch.tensor([[0.0, -0.5, -3.0, -1.0]])
    >>> is_masked_MK = torch.tensor([[False, True, True, True]])
    >>> numbers = [torch.full((1, 4), value) for value in (0.3, 0.3 / 0.45, 0.5)]
    >>> kept_masks(log_probs_MK, is_masked_MK, *numbers).int().tolist()
    [[0, 0, 1, 1]]

Legend: `B` rows, `T` their terminal tokens, `M` blocks, `K` positions of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from megatron_opdlm.config.schema import ObjectiveConfig
from megatron_opdlm.diffusion.supervised_states import (
    Row,
    SupervisedStates,
    masked_row,
    on_sequence,
    response_positions,
    stack_rows,
    states_generator,
)
from megatron_opdlm.diffusion.trajectory import Trajectory

HARDEST_BELOW, EASIEST_ABOVE = 1 / 3, 2 / 3
SMALLEST_SURPLUS = 0.1


@dataclass(frozen=True, eq=False, kw_only=True)
class SuperSetStates(SupervisedStates):
    """States that mask more than is to be trained, and what decides about it."""

    noise_BT: torch.Tensor
    """float64: t of each position's block."""
    kept_share_BT: torch.Tensor
    """float64: t / (t + rho) of each position's block."""
    place_BT: torch.Tensor
    """float64: a uniform number of each position, for choices at random."""


def mask_super_sets(
    trajectories: Sequence[Trajectory],
    objective: ObjectiveConfig,
    *,
    mask_token_id: int,
    pad_token_id: int,
    seed: int,
    step: int,
) -> SuperSetStates:
    """The super-sets of given responses, one row each; the arguments are those of `mask_responses`."""
    rows = [
        _row(trajectory, objective, mask_token_id, states_generator(trajectory, seed, step))
        for trajectory in trajectories
    ]
    return stack_rows(SuperSetStates, rows, pad_token_id)


def _row(trajectory: Trajectory, objective: ObjectiveConfig, mask_token_id: int, generator: torch.Generator) -> Row:
    is_response_MK = response_positions(trajectory)
    noise_M1, surplus_M1 = draw_levels(len(is_response_MK), objective.noise_low, objective.noise_high, generator)
    uniform_2MK = torch.rand(2, *is_response_MK.shape, generator=generator, dtype=torch.float64)
    is_masked_MK = is_response_MK & (uniform_2MK[0] < noise_M1 + surplus_M1)
    noise_MK, share_MK = (x.expand(is_response_MK.shape) for x in (noise_M1, noise_M1 / (noise_M1 + surplus_M1)))
    return masked_row(trajectory, objective, is_masked_MK, noise_MK, mask_token_id) | {
        "noise": on_sequence(trajectory, noise_MK),
        "kept_share": on_sequence(trajectory, share_MK),
        "place": on_sequence(trajectory, uniform_2MK[1]),
    }


def draw_levels(
    num_blocks: int, low: float, high: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """t and rho of each block, float64 [M, 1]."""
    uniform_2M1 = torch.rand(2, num_blocks, 1, generator=generator, dtype=torch.float64)
    noise_M1 = low + (high - low) * uniform_2M1[0]
    room_M1 = 1 - noise_M1
    lower_M1 = torch.where(room_M1 > SMALLEST_SURPLUS, SMALLEST_SURPLUS, 0.0)
    return noise_M1, lower_M1 + (room_M1 - lower_M1) * uniform_2M1[1]


def keep_by_learnability(states: SuperSetStates, log_probs_BT: torch.Tensor, block_size: int) -> SupervisedStates:
    """The states to train, from log p of the true tokens wherever the super-set has a mask (elsewhere any number)."""
    by_block = [
        values_BT.unflatten(1, (-1, block_size)).flatten(0, 1)
        for values_BT in (log_probs_BT, states.is_masked_BT, states.noise_BT, states.kept_share_BT, states.place_BT)
    ]
    is_kept_BT = kept_masks(*by_block).view_as(states.is_trained_BT)
    values = {field.name: getattr(states, field.name) for field in fields(SupervisedStates)}
    values["noisy_ids_BT"] = torch.where(is_kept_BT, states.noisy_ids_BT, states.clean_ids_BT)
    values["is_trained_BT"] = states.is_trained_BT & is_kept_BT
    values["num_trained_by_trajectory_B"] = None  # of the super-set
    return SupervisedStates(**values)


def kept_masks(
    log_probs_MK: torch.Tensor,
    is_masked_MK: torch.Tensor,
    noise_MK: torch.Tensor,
    kept_share_MK: torch.Tensor,
    place_MK: torch.Tensor,
) -> torch.Tensor:
    """Which of the masked positions of each block stay masked, bool [M, K]; the lower position first on ties.

    `noise_MK` and `kept_share_MK` are those of the block at each of its response positions.
    """
    key_MK = torch.where(noise_MK > EASIEST_ABOVE, -log_probs_MK, place_MK.to(log_probs_MK.dtype))
    key_MK = torch.where(noise_MK < HARDEST_BELOW, log_probs_MK, key_MK).masked_fill(~is_masked_MK, torch.inf)
    # A position's rank in its block; a stable sort keeps equal keys in the order of their positions.
    rank_MK = key_MK.argsort(dim=1, stable=True).argsort(dim=1)
    num_masked_M1 = is_masked_MK.sum(dim=1, keepdim=True)
    return is_masked_MK & (rank_MK < (num_masked_M1 * kept_share_MK).round())
