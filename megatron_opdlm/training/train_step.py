"""One optimizer step: teacher's forward, student's forward and backward over the micro-batches of a global batch.

The gradient is that of (1 / rows) * sum over the rows of the global batch of each row's mean divergence. Every
micro-batch hands Megatron the sum over its rows together with their number, and Megatron divides once by the total over
all micro-batches and data-parallel ranks, so the split changes nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_opdlm.config.schema import DivergenceConfig
from megatron_opdlm.diffusion.states import OnPolicyStates
from megatron_opdlm.distillation.divergences import VocabularyShard
from megatron_opdlm.distillation.loss import distillation_loss
from megatron_opdlm.distillation.teacher import teacher_hidden_states
from megatron_opdlm.models.build import Qwen3Model
from megatron_opdlm.observability.timers import PhaseTimers
from megatron_opdlm.training.optimizer import TrainableStudent, optimizer_step, zero_gradients

MicroBatch = tuple[OnPolicyStates, torch.Tensor]


class TrainStep:
    """Student, teacher and what their loss needs, for as long as a run lasts."""

    def __init__(
        self,
        student: TrainableStudent,
        teacher: Qwen3Model,
        shard: VocabularyShard,
        divergence: DivergenceConfig,
        timers: PhaseTimers,
    ) -> None:
        self.student, self.teacher, self.shard = student, teacher, shard
        self.divergence, self.timers = divergence, timers

    def __call__(self, micro_batches: list[OnPolicyStates]) -> dict[str, float]:
        """One optimizer step on this rank's share of a global batch. All ranks must call it.

        Returns the sums of `distillation_loss` over this rank's rows and the gradient norm of the global batch.
        """
        with self.timers.phase("teacher"):
            targets = teacher_hidden_states(self.teacher, micro_batches)
        with self.timers.phase("student"):
            zero_gradients(self.student)
            sums = self._forward_backward(list(zip(micro_batches, targets, strict=True)))
        with self.timers.phase("optimizer"):
            grad_norm = optimizer_step(self.student)
        return {"grad_norm": grad_norm} | sums

    def _forward_backward(self, micro_batches: list[MicroBatch]) -> dict[str, float]:
        self.student.wrapped.train()
        collected = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iter(micro_batches),
            model=self.student.wrapped,
            num_microbatches=len(micro_batches),
            seq_length=max(states.clean_ids_BT.shape[1] for states, _ in micro_batches),
            micro_batch_size=2 * len(micro_batches[0][0].lengths_B),
            forward_only=False,
        )
        return {name: float(sum(sums[name] for sums in collected)) for name in collected[0]} if collected else {}

    def _forward_step(self, data_iterator: Iterator[MicroBatch], model: torch.nn.Module):
        states, teacher_hidden_NH = next(data_iterator)
        streams = torch.cat([states.clean_ids_BT, states.noisy_ids_BT])
        positions_T = torch.arange(streams.shape[1], device=streams.device)

        def loss_sum(hidden_TBH: torch.Tensor):
            loss, sums = distillation_loss(
                self.student.model, self.teacher, hidden_TBH, teacher_hidden_NH, states, self.shard, self.divergence
            )
            num_rows = torch.tensor(len(states.lengths_B), dtype=torch.int, device=loss.device)
            return loss, num_rows, sums

        return model(streams, positions_T, states.lengths_B), loss_sum
