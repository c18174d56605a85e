"""The loss and its gradients from hidden states, without ever holding the logits of all positions.

The output layers are applied here, to a chunk of positions at a time. The divergence is the last thing before the
loss, so its gradient with respect to the student's logits has a closed form and is made in the forward pass, while the
chunk's logits exist: they become gradients of the hidden states and of the weight, and are freed. The backward pass
only scales. No matmul is done twice. Under tensor parallelism the logits stay sharded over the vocabulary.

    result = divergence_loss(student_hidden_NH, student_layer.weight, teacher_hidden_NH, teacher_layer.weight,
                             loss_weights_N=weights_N, target_ids_N=ids_N, settings=DivergenceConfig(), shard=shard)
    result.loss.backward()

Shapes: N positions, V vocabulary rows of this rank, H hidden size (of the student or of the teacher), C positions of a
chunk, k candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from megatron_opdlm.config.schema import DivergenceConfig
from megatron_opdlm.distillation.logit_gradients import figures_and_gradient
from megatron_opdlm.distillation.teacher_filters import filter_target_
from megatron_opdlm.parallel.vocabulary_shard import VocabularyShard, global_top_k, sum_over_ranks_


@dataclass(frozen=True, eq=False)
class DivergenceResult:
    """The loss and what is worth logging about each position; float32 (float64 for float64 models)."""

    loss: torch.Tensor
    """Scalar, sum_n loss_weights_n * divergence_n; the only differentiable field."""
    divergence_N: torch.Tensor
    """From the teacher, of the chosen kind, in nats."""
    student_log_prob_N: torch.Tensor
    """Log-probability the student gives the target id."""
    student_entropy_N: torch.Tensor
    """Entropy of the student's distribution, in nats."""
    agrees_N: torch.Tensor
    """bool: student and teacher have the same most likely token (lowest id on ties)."""


def divergence_loss(
    student_hidden_NH: torch.Tensor,
    student_weight_VH: torch.Tensor,
    teacher_hidden_NH: torch.Tensor,
    teacher_weight_VH: torch.Tensor,
    *,
    loss_weights_N: torch.Tensor,
    target_ids_N: torch.Tensor,
    settings: DivergenceConfig,
    shard: VocabularyShard,
) -> DivergenceResult:
    """Weighted sum of the divergence from the teacher over N positions, differentiable in the student's side.

    Hidden states are the full ones, the same on all ranks of `shard.group`; weights are this rank's vocabulary rows.
    The gradient of `student_hidden_NH` is the full one on every rank, that of `student_weight_VH` is local.
    `target_ids_N` are int64 vocabulary ids (not the mask token). `settings` say which divergence, over which tokens and
    from which target.

    Memory, beside the gradients (that of the weight in float32): the chunk-sized float32 buffers that
    `figures_and_gradient` and `filter_target_` count.

    Communicates over `shard.group`: per chunk an all-gather of maxima and all-reduces of per-position sums, with
    `top_k` also of candidates, and what `filter_target_` says; in the backward pass an all-reduce of the hidden states'
    gradient. All ranks of the group must call it with the same N and `settings`, and all or none must run the backward
    pass.
    """
    assert len(student_weight_VH) == len(teacher_weight_VH) == shard.num_rows, "both weights must be this shard's rows"
    gradients = GradientSums(student_hidden_NH, student_weight_VH)
    figures_4N = torch.empty(4, len(student_hidden_NH), dtype=gradients.dtype, device=student_hidden_NH.device)
    dead_rows = shard.dead_rows.to(student_hidden_NH.device)
    with torch.no_grad():
        for start in range(0, len(student_hidden_NH), settings.chunk_size):
            chunk = slice(start, start + settings.chunk_size)
            teacher_CV = live_logits(teacher_hidden_NH[chunk], teacher_weight_VH, dead_rows)
            # before the filters, which could leave fewer than k tokens to choose from
            chosen_ids_Ck = global_top_k(teacher_CV, settings.top_k, shard) if settings.top_k else None
            filter_target_(teacher_CV, settings, shard)
            student_CV = live_logits(student_hidden_NH[chunk], student_weight_VH, dead_rows)
            figures_4N[:, chunk], gradient_CV = figures_and_gradient(
                student_CV, teacher_CV, chosen_ids_Ck, target_ids_N[chunk], settings, shard
            )
            gradient_CV.mul_(loss_weights_N[chunk, None])
            gradients.add_(chunk, gradient_CV)
            del teacher_CV, student_CV, gradient_CV  # freed before the logits of the next chunk are made
    divergence_N, log_prob_N, entropy_N, agrees_N = figures_4N
    loss = WithGradients.apply(
        student_hidden_NH, student_weight_VH, divergence_N @ loss_weights_N.to(gradients.dtype), gradients, shard
    )
    return DivergenceResult(loss, divergence_N, log_prob_N, entropy_N, agrees_N.bool())


def live_logits(hidden_CH: torch.Tensor, weight_VH: torch.Tensor, dead_rows: torch.Tensor) -> torch.Tensor:
    """Logits [C, V] in float32 at least, minus infinity at padding and at the mask token."""
    logits_CV = hidden_CH @ weight_VH.t()
    return logits_CV.to(_wide(logits_CV.dtype)).index_fill_(1, dead_rows, -torch.inf)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that logits of this dtype are computed with: float32, or float64 as it is."""
    return torch.promote_types(dtype, torch.float32)


class GradientSums:
    """Gradients of the student's hidden states and output weight, summed over chunks in float32 at least.

    One that nobody asked for is None.
    """

    def __init__(self, hidden_NH: torch.Tensor, weight_VH: torch.Tensor) -> None:
        self.inputs = hidden_NH.detach(), weight_VH.detach()
        self.dtype = _wide(weight_VH.dtype)
        self.hidden_NH, self.weight_VH = (
            torch.zeros_like(x, dtype=self.dtype, requires_grad=False)
            if x.requires_grad and torch.is_grad_enabled()
            else None
            for x in (hidden_NH, weight_VH)
        )

    def add_(self, chunk: slice, gradient_CV: torch.Tensor) -> None:
        """Takes in the gradient of the logits of one chunk; the matmuls run in the parameters' dtype."""
        hidden_NH, weight_VH = self.inputs
        gradient_CV = gradient_CV.to(weight_VH.dtype)
        if self.hidden_NH is not None:
            self.hidden_NH[chunk] = gradient_CV @ weight_VH
        if self.weight_VH is None:
            return
        if self.weight_VH.dtype == gradient_CV.dtype:
            self.weight_VH.addmm_(gradient_CV.t(), hidden_NH[chunk])
        else:
            self.weight_VH += gradient_CV.t() @ hidden_NH[chunk]


class WithGradients(torch.autograd.Function):
    """Returns a loss whose gradients are known already. Its backward pass can run once."""

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, loss, gradients: GradientSums, shard: VocabularyShard) -> torch.Tensor:
        ctx.shard, ctx.hidden_dtype = shard, hidden_NH.dtype
        in_parameter_dtype = None if gradients.weight_VH is None else gradients.weight_VH.to(weight_VH.dtype)
        ctx.save_for_backward(gradients.hidden_NH, in_parameter_dtype)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_NH, weight_VH = ctx.saved_tensors
        if hidden_NH is not None:
            # Each rank's rows give one part of the sum over the vocabulary.
            hidden_NH = sum_over_ranks_(hidden_NH * upstream, ctx.shard).to(ctx.hidden_dtype)
        if weight_VH is not None:
            # In place: nothing else uses it, and a copy would be as large as the output layer.
            weight_VH = weight_VH.mul_(upstream)
        return hidden_NH, weight_VH, None, None, None
