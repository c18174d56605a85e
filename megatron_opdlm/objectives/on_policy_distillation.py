"""The method: the student decodes, and learns the teacher's distribution where it has been.

    objective = OnPolicyDistillation(parts)
    trajectories = objective.terminal_sequences(tasks, step, dynamic_threshold=0.9)

A part of the sequences may be written by somebody else (`off_policy`); those are trained at random masks.
"""

from __future__ import annotations

import torch

from megatron_opdlm.diffusion.state_selections import rows_per_trajectory
from megatron_opdlm.diffusion.states import OnPolicyStates, select_states
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.distillation.argmax_fill import fill_with_argmax
from megatron_opdlm.distillation.loss import SUMS, distillation_loss
from megatron_opdlm.distillation.teacher import teacher_hidden_states
from megatron_opdlm.objectives.objective import MicroBatch, Objective, Parts
from megatron_opdlm.objectives.off_policy import OffPolicyMixture
from megatron_opdlm.observability.metrics import MetricAccumulator
from megatron_opdlm.rollout.engine import RolloutTask


class OnPolicyDistillation(Objective):
    """Forward of the teacher over what the student wrote; divergence at the states that the student was in."""

    sums = SUMS
    preparation = "teacher"

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        mixes = self.config.objective.off_policy_fraction > 0
        self.mixture = OffPolicyMixture(parts) if mixes else None
        self.prepares_with_student = self.config.teacher.fill == "argmax"

    @property
    def rows_per_response(self) -> int:
        return rows_per_trajectory(self.config.states, self.config.rollout.denoising_steps_per_block)

    def terminal_sequences(
        self, tasks: list[RolloutTask], step: int, dynamic_threshold: float | None
    ) -> list[Trajectory]:
        if self.mixture is not None:
            return self.mixture.terminal_sequences(tasks, step, dynamic_threshold)
        return self.engine.generate(tasks, step, dynamic_threshold)

    def select_states(self, trajectories: list[Trajectory], step: int) -> OnPolicyStates:
        return select_states(
            trajectories,
            self.config.states,
            num_rows=self.rows_per_response,
            block_size=self.config.rollout.block_size,
            mask_token_id=self.special.mask_token_id,
            end_token_ids=self.special.end_token_ids,
            pad_token_id=self.special.pad_token_id,
            seed=self.config.training.seed,
            step=step,
            train_on_end_token=self.config.training.train_on_end_token,
        )

    def prepare(self, micro_batches: list[OnPolicyStates]) -> list[MicroBatch]:
        filled = self._filled(micro_batches) if self.prepares_with_student else None
        targets = teacher_hidden_states(self.teacher, micro_batches, filled, self.config.rollout.block_size)
        return list(zip(micro_batches, targets, strict=True))

    def _filled(self, micro_batches: list[OnPolicyStates]) -> list[torch.Tensor]:
        return fill_with_argmax(
            self.student,
            micro_batches,
            self.shard,
            block_size=self.config.rollout.block_size,
            logit_shift=self.config.rollout.logit_shift,
            chunk_size=self.config.divergence.chunk_size,
        )

    def loss(
        self, hidden_TBH: torch.Tensor, states: OnPolicyStates, targets: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return distillation_loss(
            self.student,
            self.teacher,
            hidden_TBH,
            targets,
            states,
            self.shard,
            self.config.divergence,
            self.config.rollout,
            self.config.training.loss_reduction,
        )

    def rollout_metrics(self) -> MetricAccumulator:
        return self.engine.statistics.metrics() if self.mixture is None else self.mixture.metrics()
