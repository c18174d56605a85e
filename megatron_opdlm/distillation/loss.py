"""From the student's hidden states to the loss and the figures that are logged with it."""

from __future__ import annotations

import torch

from megatron_opdlm.config.schema import DivergenceConfig, RolloutConfig
from megatron_opdlm.diffusion.logit_shift import predicting_outputs_of_streams
from megatron_opdlm.diffusion.states import OnPolicyStates
from megatron_opdlm.distillation.divergences import forward_kl_loss
from megatron_opdlm.models.pipeline import PipelineModel
from megatron_opdlm.parallel.vocabulary_shard import VocabularyShard

SUMS = ("loss", "rows", "trained_tokens", "agreements", "committed_tokens", "on_policy_gap")
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
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The sum over trajectories of the mean divergence over each one's trained positions, and sums for the metrics.

    `student_hidden_TBH` holds the clean rows, then the noisy ones. Ranks that share sequences each have the hidden
    states of their part, and the states of all positions. Each adds up what its part contributes to a mean, and the
    first one counts the trajectory, so sums over these ranks are those of whole rows. Megatron divides by the number of
    trajectories of the global batch. All ranks of the tensor-parallel group of the last pipeline stage must call it
    with the same states.
    """
    clean_BTH, noisy_BTH = student.whole_sequence(student_hidden_TBH).transpose(0, 1).chunk(2)
    hidden_BTH = predicting_outputs_of_streams(clean_BTH, noisy_BTH, rollout.block_size, rollout.logit_shift)
    columns = student.context.columns(states.clean_ids_BT.shape[1])
    weights_BT = states.loss_weights_BT(1)[:, columns]
    num_trajectories = states.num_trajectories if student.context.is_first else 0
    states = states.columns(columns)
    is_trained_BT = states.is_trained_BT
    result = forward_kl_loss(
        hidden_BTH[is_trained_BT],
        student.output_weight,
        teacher_hidden_NH,
        teacher.output_weight,
        loss_weights_N=weights_BT[is_trained_BT],
        target_ids_N=states.clean_ids_BT[is_trained_BT],
        shard=shard,
        chunk_size=divergence.chunk_size,
        top_k=divergence.top_k,
    )
    is_committed_N = states.is_committed_BT[is_trained_BT]
    gaps_N = (result.student_log_prob_N - states.log_probs_BT[is_trained_BT]).abs()
    sums = {
        "loss": result.loss.detach().clone(),  # Megatron's schedule scales the loss in place
        "rows": torch.tensor(float(num_trajectories)),
        "trained_tokens": is_trained_BT.sum().float(),
        "agreements": result.agrees_N.sum().float(),
        "committed_tokens": is_committed_N.sum().float(),
        "on_policy_gap": gaps_N[is_committed_N].sum().float(),
    }
    return result.loss, sums
