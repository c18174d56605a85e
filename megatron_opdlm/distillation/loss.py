"""From the student's hidden states to the loss and the figures that are logged with it."""

from __future__ import annotations

import torch

from megatron_opdlm.config.schema import DivergenceConfig, LossReduction, RolloutConfig
from megatron_opdlm.diffusion.logit_shift import predicting_outputs_of_streams
from megatron_opdlm.diffusion.states import OnPolicyStates
from megatron_opdlm.distillation.chunked_loss import divergence_loss
from megatron_opdlm.models.pipeline import PipelineModel
from megatron_opdlm.parallel.vocabulary_shard import VocabularyShard

SUMS = ("loss", "loss_count", "trained_tokens", "agreements", "student_entropy", "committed_tokens", "on_policy_gap")
"""What `distillation_loss` adds up for the metrics."""


def distillation_loss(
    student: PipelineModel,
    teacher: PipelineModel,
    student_hidden_TBH: torch.Tensor,
    teacher_hidden_NH: torch.Tensor,
    states: OnPolicyStates,
    shard: VocabularyShard,
    divergence: DivergenceConfig,
    rollout: RolloutConfig,
    loss_reduction: LossReduction,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum of the divergence over trained positions, and sums for the metrics.

    `student_hidden_TBH` holds the clean rows, then the noisy ones. Ranks that share sequences each have the hidden
    states of their part, and the states of all positions. Each adds up what its part contributes, under the weights of
    the whole rows; of `loss_count` it has its part's trained positions, or the first of them all trajectories. Megatron
    divides the loss by the sum of `loss_count` over the global batch. All ranks of the tensor-parallel group of the
    last pipeline stage must call it with the same states.
    """
    clean_BTH, noisy_BTH = student.whole_sequence(student_hidden_TBH).transpose(0, 1).chunk(2)
    hidden_BTH = predicting_outputs_of_streams(clean_BTH, noisy_BTH, rollout.block_size, rollout.logit_shift)
    columns = student.context.columns(states.clean_ids_BT.shape[1])
    weights_BT = states.loss_weights_BT(loss_reduction)[:, columns]
    states = states.columns(columns)
    counts_here = loss_reduction == "token" or student.context.is_first
    loss_count = states.loss_count(loss_reduction) if counts_here else 0
    is_trained_BT = states.is_trained_BT
    result = divergence_loss(
        hidden_BTH[is_trained_BT],
        student.output_weight,
        teacher_hidden_NH,
        teacher.output_weight,
        loss_weights_N=weights_BT[is_trained_BT],
        target_ids_N=states.clean_ids_BT[is_trained_BT],
        settings=divergence,
        shard=shard,
    )
    is_committed_N = states.is_committed_BT[is_trained_BT]
    gaps_N = (result.student_log_prob_N - states.log_probs_BT[is_trained_BT]).abs()
    sums = {
        "loss": result.loss.detach().clone(),  # Megatron's schedule scales the loss in place
        "loss_count": torch.tensor(float(loss_count)),
        "trained_tokens": is_trained_BT.sum().float(),
        "agreements": result.agrees_N.sum().float(),
        "student_entropy": result.student_entropy_N.sum().float(),
        "committed_tokens": is_committed_N.sum().float(),
        "on_policy_gap": gaps_N[is_committed_N].sum().float(),
    }
    return result.loss, sums
