"""Cross-entropy of given tokens from hidden states, without ever holding the logits of all positions.

It is the forward KL from a target that has all its probability on one token, and is computed in the same way: chunk by
chunk, vocabulary-parallel, with the gradient made in the forward pass (see `chunked_loss`). With q = softmax(s) of the
student and the true token y, one position contributes

    D = -log q_y,        dD/ds_v = q_v - [v = y].

    result = cross_entropy_loss(hidden_NH, student.output_weight, loss_weights_N=weights_N, target_ids_N=ids_N,
                                shard=shard, chunk_size=512)
    result.loss.backward()

Shapes: N positions, V vocabulary rows of this rank, H hidden size, C positions of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_opdlm.distillation.chunked_loss import GradientSums, WithGradients, live_logits
from megatron_opdlm.distillation.divergences import LOWEST
from megatron_opdlm.parallel.vocabulary_shard import VocabularyShard, global_argmax, sum_over_ranks_


@dataclass(frozen=True, eq=False)
class CrossEntropyResult:
    """The loss and what is worth logging about each position; float32 (float64 for float64 models)."""

    loss: torch.Tensor
    """Scalar, sum_n loss_weights_n * -log q_n; the only differentiable field."""
    log_prob_N: torch.Tensor
    """Log-probability the student gives the target id."""
    is_likeliest_N: torch.Tensor
    """bool: the target id is the student's most likely token (lowest id on ties)."""


def cross_entropy_loss(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    *,
    loss_weights_N: torch.Tensor,
    target_ids_N: torch.Tensor,
    shard: VocabularyShard,
    chunk_size: int,
) -> CrossEntropyResult:
    """Weighted sum of the cross-entropy over N positions. Arguments, gradients and communication are those of
    `divergence_loss`; all ranks of `shard.group` must call it with the same N and `chunk_size`."""
    gradients = GradientSums(hidden_NH, weight_VH)
    report_2N = torch.empty(2, len(hidden_NH), dtype=gradients.dtype, device=hidden_NH.device)
    dead_rows = shard.dead_rows.to(hidden_NH.device)
    with torch.no_grad():
        for start in range(0, len(hidden_NH), chunk_size):
            chunk = slice(start, start + chunk_size)
            logits_CV = live_logits(hidden_NH[chunk], weight_VH, dead_rows)
            report_2N[:, chunk], gradient_CV = _log_prob_and_gradient(
                logits_CV, loss_weights_N[chunk], target_ids_N[chunk], shard
            )
            gradients.add_(chunk, gradient_CV)
            del logits_CV, gradient_CV  # freed before the logits of the next chunk are made
    log_prob_N, is_likeliest_N = report_2N
    value = -(log_prob_N @ loss_weights_N.to(gradients.dtype))
    loss = WithGradients.apply(hidden_NH, weight_VH, value, gradients, shard)
    return CrossEntropyResult(loss, log_prob_N, is_likeliest_N.bool())


def _log_prob_and_gradient(
    logits_CV: torch.Tensor, loss_weights_C: torch.Tensor, target_ids_C: torch.Tensor, shard: VocabularyShard
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-position figures [2, C] and the gradient [C, V] of the loss with respect to the logits, in their memory."""
    top_1C, best_1C = global_argmax([logits_CV], shard)
    logits_CV.sub_(top_1C[0][:, None]).clamp_(min=LOWEST)
    target_row_C1, is_here_C1 = (x[:, None] for x in shard.locate(target_ids_C))
    target_C = (logits_CV.gather(1, target_row_C1) * is_here_C1)[:, 0]
    exp_CV = logits_CV.exp_()
    sum_C, target_C = sum_over_ranks_(torch.stack([exp_CV.sum(-1), target_C]), shard)
    weights_C1 = loss_weights_C.to(exp_CV.dtype)[:, None]
    gradient_CV = exp_CV.mul_(weights_C1 / sum_C[:, None])
    # A target of another rank takes nothing from row 0.
    gradient_CV.scatter_add_(1, target_row_C1, -weights_C1 * is_here_C1)
    is_likeliest_C = (best_1C[0] == target_ids_C).to(exp_CV.dtype)
    return torch.stack([target_C - sum_C.log(), is_likeliest_C]), gradient_CV
