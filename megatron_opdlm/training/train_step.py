"""One optimizer step: what the objective prepares (of the method: the teacher's forward), then the student's forward
and backward over the micro-batches of a global batch.

Every micro-batch hands Megatron its part of the sum together with what it adds to the divisor (of the method the
number of its trajectories, or of its trained positions: `training.loss_reduction`), and Megatron divides once by the
total over all micro-batches, data- and context-parallel ranks, so the split changes nothing but rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_opdlm.diffusion.states import OnPolicyStates
from megatron_opdlm.objectives.objective import MicroBatch, Objective
from megatron_opdlm.observability.timers import PhaseTimers
from megatron_opdlm.parallel.device import device
from megatron_opdlm.training.expert_load import ExpertLoad
from megatron_opdlm.training.optimizer import TrainableStudent, optimizer_step, wait_for_weights, zero_gradients
from megatron_opdlm.training.skipped_steps import SkippedSteps


class TrainStep:
    """The student and what it learns from, for as long as a run lasts."""

    def __init__(
        self,
        student: TrainableStudent,
        objective: Objective,
        timers: PhaseTimers,
        expert_load: ExpertLoad,
        skipped_steps: SkippedSteps,
    ) -> None:
        self.student, self.objective = student, objective
        self.timers, self.expert_load, self.skipped_steps = timers, expert_load, skipped_steps

    def __call__(self, micro_batches: list[OnPolicyStates]) -> dict[str, float]:
        """One optimizer step on this rank's share of a global batch. All ranks must call it.

        All pipeline stages and all ranks that share sequences pass the same micro-batches. Returns the sums of
        `objective.loss` over their rows, the gradient norm of the global batch, and `is_skipped`, 1 where the weights
        stay as they are because these numbers are not finite. The student's weights may be read after
        `wait_for_weights` only.

        Raises:
            TooManySkippedSteps: on all ranks, after `training.max_skipped_steps` of them in a row.
        """
        if len(self.student.wrapped) > 1:  # see `variable_seq_lengths` in models.build
            width = max(states.clean_ids_BT.shape[1] for states in micro_batches)
            micro_batches = [states.padded_to(width) for states in micro_batches]
        with self.timers.phase(self.objective.preparation):
            if self.objective.prepares_with_student:
                wait_for_weights(self.student)
            prepared = self.objective.prepare(micro_batches)
        with self.timers.phase("student"):
            wait_for_weights(self.student)
            zero_gradients(self.student)
            sums, losses = self._forward_backward(prepared)
        with self.timers.phase("optimizer"):
            is_skipped = self.skipped_steps.is_due(self.student, micro_batches, losses)
            grad_norm = math.nan if is_skipped else optimizer_step(self.student)
        return {"grad_norm": grad_norm, "is_skipped": float(is_skipped)} | sums

    def _forward_backward(self, micro_batches: list[MicroBatch]) -> tuple[dict[str, float], list[float]]:
        """The sums over the micro-batches, and the loss of each, which the last pipeline stage alone has."""
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
        return self._totals(collected), [float(sums["loss"]) for sums in collected]

    def _totals(self, collected: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Sums over the micro-batches and the parts of their rows.

        The last pipeline stage, which alone has `collected`, tells the others.
        """
        names = self.objective.sums
        totals = [float(sum(sums[name] for sums in collected)) for name in names]
        shared = self.student.model.link.share(torch.tensor(totals, dtype=torch.float64, device=device()))
        return dict(zip(names, self.student.model.context.add_up_(shared.wait()).tolist(), strict=True))

    def _forward_step(self, data_iterator: Iterator[MicroBatch], model: torch.nn.Module):
        self.student.model.num_forwards += 1
        states, targets = next(data_iterator)
        columns = self.student.model.context.columns(states.clean_ids_BT.shape[1])
        part = states.columns(columns)
        streams = torch.cat([part.clean_ids_BT, part.noisy_ids_BT])
        positions_T = torch.arange(columns.start, columns.stop, device=streams.device)

        def loss_sum(hidden_TBH: torch.Tensor):
            loss, sums = self.objective.loss(hidden_TBH, states, targets)
            return loss, sums["loss_count"].to(loss.device, torch.int), sums

        with self.expert_load.counting(states.lengths_B, positions_T):
            return model(streams, positions_T, states.lengths_B), loss_sum
