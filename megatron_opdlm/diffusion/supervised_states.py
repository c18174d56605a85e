"""States of given responses for cross-entropy: random masks, with what each position weighs in the loss.

Trained are the masked tokens of the response, its end token among them: a student that never learns to write it never
stops. Behind it the last block is filled up with end tokens (`Trajectory.given`). They are masked like the rest, for
the student that decodes the block sees them masked too, and visible they would tell where the response ends; they are
trained with `objective.train_fill` only. Unlike the states of the ablation `random_mask`, a block may have no mask:
under weights of 1/t, one that is forced there would outweigh all others (`random_masks`).

`complementary` gives each response two rows, one behind the other: the second masks the positions that the first does
not.

Example: 2 prompt tokens, blocks of 4, a response of 5 tokens that ends with 9 and is filled up with 9.

    >>> trajectory = Trajectory.given(
    ...     prompt_id=0,
    ...     sample_index=0,
    ...     prompt_ids=[3, 5],
    ...     response_ids=[7, 6, 8, 1, 9],
    ...     max_new_tokens=100,
    ...     fill_token_id=9,
    ...     block_size=4,
    ...     domain="",
    ... )
    >>> objective = ObjectiveConfig(name="sft", complementary=True, loss_weight="1/t", noise_low=0.5, noise_high=0.5)
    >>> states = mask_responses([trajectory], objective, mask_token_id=0, pad_token_id=2, seed=1, step=0)
    >>> states.noisy_ids_BT.tolist()
    [[3, 5, 7, 6, 0, 0, 9, 9], [3, 5, 0, 0, 8, 1, 0, 0]]
    >>> states.is_trained_BT.int().tolist()
    [[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0, 1, 0]]
    >>> states.weights_BT[0].tolist(), states.num_response_B.tolist()
    ([2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0], [5, 5])

Legend: `B` rows, `T` their terminal tokens, `R` response, `M` blocks that hold response tokens, `K` positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from megatron_opdlm.config.method import Normaliser
from megatron_opdlm.config.schema import ObjectiveConfig
from megatron_opdlm.diffusion.random_masks import RandomMasks, draw_masks
from megatron_opdlm.diffusion.randomness import sequence_generator
from megatron_opdlm.diffusion.states import OnPolicyStates
from megatron_opdlm.diffusion.trajectory import Trajectory

Row = dict[str, torch.Tensor]
"""The fields of one row, without their `B`."""
States = TypeVar("States", bound="SupervisedStates")


@dataclass(frozen=True, eq=False, kw_only=True)
class SupervisedStates(OnPolicyStates):
    """States with a loss of their own. Nothing of them was committed, and their log-probabilities are zero."""

    weights_BT: torch.Tensor
    """float32: what the cross-entropy at a position is multiplied by, if it is trained."""
    num_response_B: torch.Tensor
    """int64: tokens of the row that a mask could have had trained."""

    @property
    def is_masked_BT(self) -> torch.Tensor:
        """bool: the positions that hold the mask token, trained or not."""
        return self.noisy_ids_BT != self.clean_ids_BT

    def loss_terms(self, normaliser: Normaliser) -> tuple[torch.Tensor, int]:
        """What the cross-entropy is multiplied by, float32 [B, T], and what these rows add to the divisor.

        The loss is the sum of the products over all rows of the global batch, over the sum of their divisors.
        """
        weights_BT = self.weights_BT * self.is_trained_BT
        if normaliser == "response":
            return weights_BT / self.num_response_B.clamp(min=1)[:, None], self.num_rows
        counts_B = self.num_response_B if normaliser == "tokens" else self.num_trained_B
        return weights_BT, int(counts_B.sum())


def mask_responses(
    trajectories: Sequence[Trajectory],
    objective: ObjectiveConfig,
    *,
    mask_token_id: int,
    pad_token_id: int,
    seed: int,
    step: int,
) -> SupervisedStates:
    """The states of given responses, one row each, or two with `objective.complementary`.

    `objective` has its preset in place. `seed`, `step` and the trajectory's own numbers seed its draws.
    """
    rows = []
    for trajectory in trajectories:
        masks = draw_masks(
            response_positions(trajectory),
            states_generator(trajectory, seed, step),
            noise_level=objective.noise_level,
            low=objective.noise_low,
            high=objective.noise_high,
            at_least_one=False,
        )
        rows += [
            masked_row(trajectory, objective, is_masked_MK, masks.noise_MK, mask_token_id)
            for is_masked_MK in _views(trajectory, masks, objective.complementary)
        ]
    return stack_rows(SupervisedStates, rows, pad_token_id)


def _views(trajectory: Trajectory, masks: RandomMasks, complementary: bool) -> list[torch.Tensor]:
    other_MK = response_positions(trajectory) & ~masks.is_masked_MK
    return [masks.is_masked_MK, other_MK] if complementary else [masks.is_masked_MK]


def response_positions(trajectory: Trajectory) -> torch.Tensor:
    """Which positions of its blocks are response, bool [M, K]."""
    return trajectory.steps_by_block_MK > 0


def states_generator(trajectory: Trajectory, seed: int, step: int) -> torch.Generator:
    """The generator of a sequence's states."""
    return sequence_generator(seed, step, trajectory.prompt_id, trajectory.sample_index, purpose="states")


def masked_row(
    trajectory: Trajectory,
    objective: ObjectiveConfig,
    is_masked_MK: torch.Tensor,
    noise_MK: torch.Tensor,
    mask_token_id: int,
) -> Row:
    """One row of a trajectory, with its masks and the noise levels that they were drawn with."""
    clean_T, num_response = trajectory.terminal_ids_T, len(trajectory.step_map_R)
    is_target_R = (torch.arange(num_response) < trajectory.response_length) | objective.train_fill
    is_masked_T = on_sequence(trajectory, is_masked_MK)
    weight_MK = torch.ones_like(noise_MK) if objective.loss_weight == "none" else 1 / noise_MK
    return {
        "clean_ids": clean_T,
        "noisy_ids": clean_T.masked_fill(is_masked_T, mask_token_id),
        "lengths": torch.tensor(len(clean_T)),
        "is_trained": is_masked_T & pad(is_target_R, (trajectory.prompt_length, 0)),
        "is_committed": torch.zeros_like(is_masked_T),
        "log_probs": torch.zeros(len(clean_T)),
        "weights": on_sequence(trajectory, weight_MK.float(), before=1.0),
        "num_response": is_target_R.sum(),
        "prompt_ids": torch.tensor(trajectory.prompt_id),
    }


def on_sequence(trajectory: Trajectory, values_MK: torch.Tensor, before: float = 0) -> torch.Tensor:
    """Values of the blocks that hold response tokens at their places in the sequence, [T]; `before` at earlier ones."""
    return pad(values_MK.flatten(), (len(trajectory.terminal_ids_T) - values_MK.numel(), 0), value=before)


def stack_rows(kind: type[States], rows: Sequence[Row], pad_token_id: int) -> States:
    """The rows as one batch, padded on the right."""
    fields = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if values[0].ndim:
            filler = pad_token_id if name.endswith("_ids") else 0
            fields[f"{name}_BT"] = pad_sequence(values, batch_first=True, padding_value=filler)
        else:
            fields[f"{name}_B"] = torch.stack(values)
    return kind(**fields)
