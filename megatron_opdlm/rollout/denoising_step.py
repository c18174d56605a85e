"""What one denoising step of one sequence has committed, for who wants to watch a rollout.

    engine.generate_some({0: task}, step=0, on_step=print)

Nothing here runs, or is copied, where nobody watches.

Legend: `D` sequences that denoise, `K` positions of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_opdlm.rollout.sequences import Slots


@dataclass(frozen=True)
class DenoisingStep:
    """One step.

    Example: the second step of the block at positions 8 to 11 commits two tokens, the second one for certain:
        DenoisingStep(index=0, block_start=8, step=2, positions=(8, 10), token_ids=(52, 7), confidences=(0.5, 1.0))
    """

    index: int
    """Of the task."""
    block_start: int
    """First position of the block, in the terminal sequence."""
    step: int
    """From 1, within the block."""
    positions: tuple[int, ...]
    """What it commits, in the terminal sequence, ascending."""
    token_ids: tuple[int, ...]
    confidences: tuple[float, ...]
    """Probability that the raw softmax gave to each token."""


def steps_taken(slots: Slots, slots_D: torch.Tensor, is_committed_DK: torch.Tensor) -> Iterator[DenoisingStep]:
    """The step that each of these slots has just taken; its tokens are in the slots already."""
    for slot, is_committed_K in zip(slots_D.tolist(), is_committed_DK, strict=True):
        start = int(slots.block_start_B[slot])
        positions = start + is_committed_K.nonzero()[:, 0]
        yield DenoisingStep(
            index=slots.requests[slot].index,
            block_start=start,
            step=int(slots.step_B[slot]),
            positions=tuple(positions.tolist()),
            token_ids=tuple(slots.ids_BL[slot, positions].tolist()),
            confidences=tuple(slots.log_probs_BL[slot, positions].exp().tolist()),
        )
