"""Learnability-Informed Fine-Tuning: cross-entropy where the student says that there is something to learn.

Of each block more positions are masked than are to be trained; the student, as it is before the optimizer step, scores
the true tokens there, in a forward without gradients; `diffusion.lift_masks` has the rule that keeps some of them.

    objective = Lift(parts)
    micro_batches = objective.prepare(micro_batches)             # a forward of the student, then fewer masks
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_opdlm.diffusion.lift_masks import SuperSetStates, keep_by_learnability, mask_super_sets
from megatron_opdlm.diffusion.supervised_states import SupervisedStates
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.objectives.objective import MicroBatch
from megatron_opdlm.objectives.sft import Sft
from megatron_opdlm.objectives.supervised_loss import cross_entropy_of


class Lift(Sft):
    """Supervised fine-tuning whose masks the student's own forward chooses."""

    preparation = "scoring"
    prepares_with_student = True

    def select_states(self, trajectories: list[Trajectory], step: int) -> SupervisedStates:
        return mask_super_sets(trajectories, self.settings, **self._numbers(step))

    def prepare(self, micro_batches: list[SuperSetStates]) -> list[MicroBatch]:
        block_size = self.config.rollout.block_size
        scored = zip(micro_batches, self._scores(micro_batches), strict=True)
        return [(keep_by_learnability(states, log_probs_BT, block_size), None) for states, log_probs_BT in scored]

    @torch.no_grad()
    def _scores(self, micro_batches: list[SuperSetStates]) -> list[torch.Tensor]:
        """Log-probabilities of the true tokens `[B, T]` of each micro-batch, zero where nothing is masked.

        A forward-only pass of Megatron's schedule. All ranks get the scores of all positions, since all must train the
        same states.
        """
        for chunk in self.student.chunks:
            chunk.eval()
        collected = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=[iter(micro_batches) for _ in self.student.chunks],
            model=self.student.chunks,
            num_microbatches=len(micro_batches),
            seq_length=max(states.clean_ids_BT.shape[1] for states in micro_batches),
            micro_batch_size=2 * len(micro_batches[0].lengths_B),
            forward_only=True,
            collect_non_loss_data=True,
        )
        scores = collected if self.student.is_last_stage else [states.weights_BT.clone() for states in micro_batches]
        return [self.student.context.add_up_(self.student.link.share(scores_BT).wait()) for scores_BT in scores]

    def _forward_step(self, data_iterator: Iterator[SuperSetStates], model: torch.nn.Module):
        states = next(data_iterator)
        columns = self.student.context.columns(states.clean_ids_BT.shape[1])
        part = states.columns(columns)
        streams = torch.cat([part.clean_ids_BT, part.noisy_ids_BT])
        positions_T = torch.arange(columns.start, columns.stop, device=streams.device)

        def scores(hidden_TBH: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
            is_masked_BT = part.is_masked_BT
            result = cross_entropy_of(
                self.student,
                hidden_TBH,
                states,
                is_masked_BT,
                torch.zeros_like(part.weights_BT),
                self.shard,
                self.config.rollout,
                self.config.divergence.chunk_size,
            )
            scores_BT = torch.zeros_like(states.weights_BT)
            scores_BT[:, columns][is_masked_BT] = result.log_prob_N.float()
            return scores_BT

        return model(streams, positions_T, states.lengths_B), scores
