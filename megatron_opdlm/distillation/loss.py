"""From the student's hidden states to the loss and the figures that are logged with it."""

from __future__ import annotations

import torch

from megatron_opdlm.config.schema import DivergenceConfig
from megatron_opdlm.diffusion.states import OnPolicyStates
from megatron_opdlm.distillation.divergences import VocabularyShard, forward_kl_loss
from megatron_opdlm.models.build import Qwen3Model


def distillation_loss(
    student: Qwen3Model,
    teacher: Qwen3Model,
    student_hidden_TBH: torch.Tensor,
    teacher_hidden_NH: torch.Tensor,
    states: OnPolicyStates,
    shard: VocabularyShard,
    divergence: DivergenceConfig,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The sum over rows of the mean divergence over each row's trained positions, and sums for the metrics.

    `student_hidden_TBH` holds the clean rows, then the noisy ones. Megatron divides by the number of rows of the global
    batch. All ranks of the tensor-parallel group must call it with the same states.
    """
    _, noisy_TBH = student.whole_sequence(student_hidden_TBH).chunk(2, dim=1)
    is_trained_BT = states.is_trained_BT
    result = forward_kl_loss(
        noisy_TBH.transpose(0, 1)[is_trained_BT],
        student.output_weight,
        teacher_hidden_NH,
        teacher.output_weight,
        loss_weights_N=states.loss_weights_BT(1)[is_trained_BT],
        target_ids_N=states.clean_ids_BT[is_trained_BT],
        shard=shard,
        chunk_size=divergence.chunk_size,
        top_k=divergence.top_k,
    )
    is_committed_N = states.is_committed_BT[is_trained_BT]
    gaps_N = (result.student_log_prob_N - states.log_probs_BT[is_trained_BT]).abs()
    sums = {
        "loss": result.loss.detach().clone(),  # Megatron's schedule scales the loss in place
        "rows": torch.tensor(float(len(states.lengths_B))),
        "trained_tokens": is_trained_BT.sum().float(),
        "agreements": result.agrees_N.sum().float(),
        "committed_tokens": is_committed_N.sum().float(),
        "on_policy_gap": gaps_N[is_committed_N].sum().float(),
    }
    return result.loss, sums
