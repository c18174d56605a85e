"""Supervised fine-tuning: cross-entropy on given responses at random masks. No rollout, no teacher.

    objective = Sft(parts)
    trajectories = objective.terminal_sequences(tasks, step, None)      # the responses in the data, on the block grid

What masks a position and what a position weighs are settings (`objective`); `objective.preset` sets them as other
projects have them (`config.sft_presets`).
"""

from __future__ import annotations

import torch

from megatron_opdlm.config.sft_presets import with_preset
from megatron_opdlm.diffusion.states import OnPolicyStates
from megatron_opdlm.diffusion.supervised_states import SupervisedStates, mask_responses
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.objectives.objective import MicroBatch, Objective, Parts
from megatron_opdlm.objectives.off_policy import given_response
from megatron_opdlm.objectives.supervised_loss import SUMS, supervised_loss
from megatron_opdlm.rollout.engine import RolloutTask


class Sft(Objective):
    """The responses of the data, each once or, with `objective.complementary`, in two rows."""

    sums = SUMS
    preparation = "student"

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.settings = with_preset(self.config.objective)

    @property
    def rows_per_response(self) -> int:
        return 2 if self.settings.complementary else 1

    def terminal_sequences(
        self, tasks: list[RolloutTask], step: int, dynamic_threshold: float | None
    ) -> list[Trajectory]:
        """The limits of the rollout do not count: `data.max_response_tokens` does, where the data is read."""
        block_size, fill_token_id = self.config.rollout.block_size, self.special.end_token_ids[0]
        return [
            given_response(task, task.prompt.response_ids, len(task.prompt.response_ids), block_size, fill_token_id)
            for task in self.engine.share(tasks)
        ]

    def select_states(self, trajectories: list[Trajectory], step: int) -> SupervisedStates:
        return mask_responses(trajectories, self.settings, **self._numbers(step))

    def prepare(self, micro_batches: list[OnPolicyStates]) -> list[MicroBatch]:
        return [(states, None) for states in micro_batches]

    def loss(
        self, hidden_TBH: torch.Tensor, states: SupervisedStates, targets: None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return supervised_loss(
            self.student,
            hidden_TBH,
            states,
            self.shard,
            self.config.rollout,
            normaliser=self.settings.normaliser,
            chunk_size=self.config.divergence.chunk_size,
        )

    def _numbers(self, step: int) -> dict[str, int]:
        return {
            "mask_token_id": self.special.mask_token_id,
            "pad_token_id": self.special.pad_token_id,
            "seed": self.config.training.seed,
            "step": step,
        }
