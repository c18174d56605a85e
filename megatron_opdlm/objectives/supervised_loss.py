"""From the student's hidden states to the cross-entropy of given tokens, and its figures for the metrics."""

from __future__ import annotations

import torch

from megatron_opdlm.config.method import Normaliser
from megatron_opdlm.config.schema import RolloutConfig
from megatron_opdlm.diffusion.logit_shift import predicting_outputs_of_streams
from megatron_opdlm.diffusion.supervised_states import SupervisedStates
from megatron_opdlm.distillation.cross_entropy import CrossEntropyResult, cross_entropy_loss
from megatron_opdlm.models.pipeline import PipelineModel
from megatron_opdlm.parallel.vocabulary_shard import VocabularyShard

SUMS = ("loss", "loss_count", "trained_tokens", "likeliest_tokens")
"""What `supervised_loss` adds up for the metrics."""


def supervised_loss(
    student: PipelineModel,
    hidden_TBH: torch.Tensor,
    states: SupervisedStates,
    shard: VocabularyShard,
    rollout: RolloutConfig,
    *,
    normaliser: Normaliser,
    chunk_size: int,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum of the cross-entropy over the trained positions, and sums for the metrics.

    `loss_count` is what these rows add to the divisor that Megatron divides by, once, over the global batch. Ranks that
    share sequences each add up their part of the positions, and the first one counts the divisor. All ranks of the
    tensor-parallel group of the last pipeline stage must call it with the same states.
    """
    weights_BT, divisor = states.loss_terms(normaliser)
    columns = student.context.columns(states.clean_ids_BT.shape[1])
    is_trained_BT = states.is_trained_BT[:, columns]
    result = cross_entropy_of(
        student, hidden_TBH, states, is_trained_BT, weights_BT[:, columns], shard, rollout, chunk_size
    )
    sums = {
        "loss": result.loss.detach().clone(),  # Megatron's schedule scales the loss in place
        "loss_count": torch.tensor(float(divisor if student.context.is_first else 0)),
        "trained_tokens": is_trained_BT.sum().float(),
        "likeliest_tokens": result.is_likeliest_N.sum().float(),
    }
    return result.loss, sums


def cross_entropy_of(
    student: PipelineModel,
    hidden_TBH: torch.Tensor,
    states: SupervisedStates,
    is_chosen_BT: torch.Tensor,
    weights_BT: torch.Tensor,
    shard: VocabularyShard,
    rollout: RolloutConfig,
    chunk_size: int,
) -> CrossEntropyResult:
    """The cross-entropy of the clean tokens at the N chosen positions of this rank's part of the rows.

    `is_chosen_BT` and `weights_BT` are of that part, the states of all positions.
    """
    clean_BTH, noisy_BTH = student.whole_sequence(hidden_TBH).transpose(0, 1).chunk(2)
    outputs_BTH = predicting_outputs_of_streams(clean_BTH, noisy_BTH, rollout.block_size, rollout.logit_shift)
    columns = student.context.columns(states.clean_ids_BT.shape[1])
    return cross_entropy_loss(
        outputs_BTH[is_chosen_BT],
        student.output_weight,
        loss_weights_N=weights_BT[is_chosen_BT],
        target_ids_N=states.clean_ids_BT[:, columns][is_chosen_BT],
        shard=shard,
        chunk_size=chunk_size,
    )
