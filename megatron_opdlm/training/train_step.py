"""One optimizer step: teacher's forward, student's forward and backward over the micro-batches of a global batch.

The gradient is that of the mean over the trajectories of the global batch of each one's mean divergence. Every
micro-batch hands Megatron the sum over its rows together with the number of trajectories that they count, and Megatron
divides once by the total over all micro-batches, data- and context-parallel ranks, so the split changes nothing but
rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_opdlm.config.schema import DivergenceConfig, RolloutConfig, TeacherFill
from megatron_opdlm.diffusion.states import OnPolicyStates
from megatron_opdlm.distillation.argmax_fill import fill_with_argmax
from megatron_opdlm.distillation.loss import SUMS, distillation_loss
from megatron_opdlm.distillation.teacher import teacher_hidden_states
from megatron_opdlm.models.pipeline import PipelineModel
from megatron_opdlm.observability.timers import PhaseTimers
from megatron_opdlm.parallel.device import device
from megatron_opdlm.parallel.vocabulary_shard import VocabularyShard
from megatron_opdlm.training.expert_load import ExpertLoad
from megatron_opdlm.training.optimizer import TrainableStudent, optimizer_step, wait_for_weights, zero_gradients

MicroBatch = tuple[OnPolicyStates, torch.Tensor | None]


class TrainStep:
    """Student, teacher and what their loss needs, for as long as a run lasts."""

    def __init__(
        self,
        student: TrainableStudent,
        teacher: PipelineModel,
        shard: VocabularyShard,
        divergence: DivergenceConfig,
        rollout: RolloutConfig,
        timers: PhaseTimers,
        expert_load: ExpertLoad,
        fill: TeacherFill = "terminal",
    ) -> None:
        self.student, self.teacher, self.shard = student, teacher, shard
        self.divergence, self.rollout, self.timers = divergence, rollout, timers
        self.expert_load, self.fill = expert_load, fill

    def __call__(self, micro_batches: list[OnPolicyStates]) -> dict[str, float]:
        """One optimizer step on this rank's share of a global batch. All ranks must call it.

        All pipeline stages and all ranks that share sequences pass the same micro-batches. Returns the sums of
        `distillation_loss` over their rows and the gradient norm of the global batch. The student's weights may be
        read after `wait_for_weights` only.
        """
        if len(self.student.wrapped) > 1:  # see `variable_seq_lengths` in models.build
            width = max(states.clean_ids_BT.shape[1] for states in micro_batches)
            micro_batches = [states.padded_to(width) for states in micro_batches]
        with self.timers.phase("teacher"):
            filled = self._filled(micro_batches) if self.fill == "argmax" else None
            targets = teacher_hidden_states(self.teacher, micro_batches, filled, self.rollout.block_size)
        with self.timers.phase("student"):
            wait_for_weights(self.student)
            zero_gradients(self.student)
            sums = self._forward_backward(list(zip(micro_batches, targets, strict=True)))
        with self.timers.phase("optimizer"):
            grad_norm = optimizer_step(self.student)
        return {"grad_norm": grad_norm} | sums

    def _filled(self, micro_batches: list[OnPolicyStates]) -> list[torch.Tensor]:
        wait_for_weights(self.student)
        return fill_with_argmax(
            self.student.model,
            micro_batches,
            self.shard,
            block_size=self.rollout.block_size,
            logit_shift=self.rollout.logit_shift,
            chunk_size=self.divergence.chunk_size,
        )

    def _forward_backward(self, micro_batches: list[MicroBatch]) -> dict[str, float]:
        for chunk in self.student.wrapped:
            chunk.train()
        collected = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=[iter(micro_batches) for _ in self.student.wrapped],
            model=self.student.wrapped,
            num_microbatches=len(micro_batches),
            seq_length=max(states.clean_ids_BT.shape[1] for states, _ in micro_batches),
            micro_batch_size=2 * len(micro_batches[0][0].lengths_B),
            forward_only=False,
        )
        return self._totals(collected)

    def _totals(self, collected: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Sums over the micro-batches and the parts of their rows.

        The last pipeline stage, which alone has `collected`, tells the others.
        """
        totals = [float(sum(sums[name] for sums in collected)) for name in SUMS]
        shared = self.student.model.link.share(torch.tensor(totals, dtype=torch.float64, device=device()))
        return dict(zip(SUMS, self.student.model.context.add_up_(shared.wait()).tolist(), strict=True))

    def _forward_step(self, data_iterator: Iterator[MicroBatch], model: torch.nn.Module):
        states, teacher_hidden_NH = next(data_iterator)
        columns = self.student.model.context.columns(states.clean_ids_BT.shape[1])
        part = states.columns(columns)
        streams = torch.cat([part.clean_ids_BT, part.noisy_ids_BT])
        positions_T = torch.arange(columns.start, columns.stop, device=streams.device)

        def loss_sum(hidden_TBH: torch.Tensor):
            loss, sums = distillation_loss(
                self.student.model,
                self.teacher,
                hidden_TBH,
                teacher_hidden_NH,
                states,
                self.shard,
                self.divergence,
                self.rollout,
            )
            return loss, sums["rows"].to(loss.device, torch.int), sums

        with self.expert_load.counting(states.lengths_B, positions_T):
            return model(streams, positions_T, states.lengths_B), loss_sum
