"""Forward KL, KL(teacher || student), from hidden states, without ever holding the logits of all positions.

The output layers are applied here, to a chunk of positions at a time. The divergence is the last thing before the
loss, so its gradient with respect to the student's logits has a closed form and is made in the forward pass, while the
chunk's logits exist: they become gradients of the hidden states and of the weight, and are freed. The backward pass
only scales. No matmul is done twice. Under tensor parallelism the logits stay sharded over the vocabulary.

    result = forward_kl_loss(student_hidden_NH, student_layer.weight, teacher_hidden_NH, teacher_layer.weight,
                             loss_weights_N=weights_N, target_ids_N=ids_N, shard=shard, chunk_size=512)
    result.loss.backward()

With p = softmax(t) of the teacher, q = softmax(s) of the student and A the set of tokens summed over (all, or the
teacher's k most likely), one position contributes

    D = sum_{v in A} p_v (log p_v - log q_v),        dD/ds_v = q_v * sum_{u in A} p_u - p_v [v in A].

Shapes: N positions, V vocabulary rows of this rank, H hidden size (of the student or of the teacher), C positions of a
chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from megatron_opdlm.parallel.vocabulary_shard import (
    VocabularyShard,
    global_argmax,
    global_top_k,
    sum_over_ranks_,
)


@dataclass(frozen=True, eq=False)
class DivergenceResult:
    """The loss and what is worth logging about each position; float32 (float64 for float64 models)."""

    loss: torch.Tensor
    """Scalar, sum_n loss_weights_n * divergence_n; the only differentiable field."""
    divergence_N: torch.Tensor
    """KL(teacher || student), in nats."""
    student_log_prob_N: torch.Tensor
    """Log-probability the student gives the target id."""
    student_entropy_N: torch.Tensor
    """Entropy of the student's distribution, in nats."""
    agrees_N: torch.Tensor
    """bool: student and teacher have the same most likely token (lowest id on ties)."""


def forward_kl_loss(
    student_hidden_NH: torch.Tensor,
    student_weight_VH: torch.Tensor,
    teacher_hidden_NH: torch.Tensor,
    teacher_weight_VH: torch.Tensor,
    *,
    loss_weights_N: torch.Tensor,
    target_ids_N: torch.Tensor,
    shard: VocabularyShard,
    chunk_size: int,
    top_k: int = 0,
) -> DivergenceResult:
    """Weighted sum of KL(teacher || student) over N positions, differentiable in the student's side.

    Hidden states are the full ones, the same on all ranks of `shard.group`; weights are this rank's vocabulary rows.
    The gradient of `student_hidden_NH` is the full one on every rank, that of `student_weight_VH` is local.
    `target_ids_N` are int64 vocabulary ids (not the mask token). `top_k` > 0 sums over the teacher's k most likely
    tokens only, with the probabilities they have in the full vocabulary (the paper's un-normalised rule).

    Communicates over `shard.group`: per chunk an all-gather of maxima, with `top_k` an all-gather of candidates, and
    an all-reduce of per-position sums; in the backward pass an all-reduce of the hidden states' gradient. All ranks of
    the group must call it with the same N, `chunk_size` and `top_k`, and all or none must run the backward pass.

    Raises ValueError for a chunk size below 1 or a negative `top_k`.
    """
    if chunk_size < 1:
        raise ValueError(f"divergence.chunk_size ({chunk_size}) must be at least 1")
    if top_k < 0:
        raise ValueError(f"divergence.top_k ({top_k}) must be 0 (full vocabulary) or more")
    assert len(student_weight_VH) == len(teacher_weight_VH) == shard.num_rows, "both weights must be this shard's rows"
    gradients = _GradientSums(student_hidden_NH, student_weight_VH)
    report_4N = torch.empty(4, len(student_hidden_NH), dtype=gradients.dtype, device=student_hidden_NH.device)
    dead_rows = (~shard.is_live()).nonzero().flatten().to(student_hidden_NH.device)
    with torch.no_grad():
        for start in range(0, len(student_hidden_NH), chunk_size):
            chunk = slice(start, start + chunk_size)
            teacher_CV = _live_logits(teacher_hidden_NH[chunk], teacher_weight_VH, dead_rows)
            chosen_ids_Ck = global_top_k(teacher_CV, top_k, shard) if top_k else None
            student_CV = _live_logits(student_hidden_NH[chunk], student_weight_VH, dead_rows)
            report_4N[:, chunk], gradient_CV = _divergence_and_gradient(
                student_CV, teacher_CV, chosen_ids_Ck, loss_weights_N[chunk], target_ids_N[chunk], shard
            )
            gradients.add_(chunk, gradient_CV)
            del teacher_CV, student_CV, gradient_CV  # freed before the logits of the next chunk are made
    divergence_N, log_prob_N, entropy_N, agrees_N = report_4N
    loss = _WithGradients.apply(
        student_hidden_NH, student_weight_VH, divergence_N @ loss_weights_N.to(gradients.dtype), gradients, shard
    )
    return DivergenceResult(loss, divergence_N, log_prob_N, entropy_N, agrees_N.bool())


def _live_logits(hidden_CH: torch.Tensor, weight_VH: torch.Tensor, dead_rows: torch.Tensor) -> torch.Tensor:
    """Logits [C, V] in float32 at least, minus infinity at padding and at the mask token."""
    logits_CV = hidden_CH @ weight_VH.t()
    return logits_CV.to(_wide(logits_CV.dtype)).index_fill_(1, dead_rows, -torch.inf)


def _divergence_and_gradient(
    student_CV: torch.Tensor,
    teacher_CV: torch.Tensor,
    chosen_ids_Ck: torch.Tensor | None,
    loss_weights_C: torch.Tensor,
    target_ids_C: torch.Tensor,
    shard: VocabularyShard,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-position figures [4, C] and the gradient [C, V] of the loss with respect to the student's logits.

    Overwrites both logits: with the teacher's exponentials, three chunk-sized buffers are alive. Communicates over
    `shard.group`; all of its ranks must call it.
    """
    top_2C, best_2C = global_argmax([student_CV, teacher_CV], shard)
    _shift_(student_CV, top_2C[0])
    _shift_(teacher_CV, top_2C[1])
    target_row_C, is_here_C = shard.locate(target_ids_C)
    target_C = student_CV.gather(1, target_row_C[:, None])[:, 0] * is_here_C
    student_exp_CV, teacher_exp_CV, sums = _exponentials(student_CV, teacher_CV, target_C, chosen_ids_Ck, shard)
    log_student_C, log_teacher_C = sums.student_C.log(), sums.teacher_C.log()
    divergence_C = (sums.cross_C + sums.kept_C * (log_student_C - log_teacher_C)) / sums.teacher_C
    entropy_C = log_student_C - sums.energy_C / sums.student_C
    agrees_C = (best_2C[0] == best_2C[1]).to(divergence_C.dtype)
    scale_C = loss_weights_C.to(divergence_C.dtype) / sums.teacher_C
    gradient_CV = student_exp_CV.mul_((scale_C * sums.kept_C / sums.student_C)[:, None])
    gradient_CV.addcmul_(teacher_exp_CV, scale_C[:, None], value=-1)
    return torch.stack([divergence_C, sums.target_C - log_student_C, entropy_C, agrees_C]), gradient_CV


class _Sums(NamedTuple):
    """Per-position sums over the vocabulary, of the shifted logits s of the student and t of the teacher."""

    student_C: torch.Tensor  # e^s
    teacher_C: torch.Tensor  # e^t
    kept_C: torch.Tensor  # e^t over the tokens that the divergence sums over
    cross_C: torch.Tensor  # e^t (t - s) over the same tokens
    energy_C: torch.Tensor  # e^s s
    target_C: torch.Tensor  # s of the target id


def _exponentials(
    student_CV: torch.Tensor,
    teacher_CV: torch.Tensor,
    target_C: torch.Tensor,
    chosen_ids_Ck: torch.Tensor | None,
    shard: VocabularyShard,
) -> tuple[torch.Tensor, torch.Tensor, _Sums]:
    """e^s [C, V]; e^t [C, V], zero outside the chosen ids; the sums, in one all-reduce over `shard.group`.

    Both arguments are used up: the first returned tensor lies in the memory of `teacher_CV`.
    """
    teacher_exp_CV = teacher_CV.exp()
    teacher_C = teacher_exp_CV.sum(-1)
    if chosen_ids_Ck is not None:
        _keep_only_(teacher_exp_CV, chosen_ids_Ck, shard)
    cross_C = teacher_CV.sub_(student_CV).mul_(teacher_exp_CV).sum(-1)
    student_exp_CV = torch.exp(student_CV, out=teacher_CV)
    energy_C = student_CV.mul_(student_exp_CV).sum(-1)
    local = _Sums(student_exp_CV.sum(-1), teacher_C, teacher_exp_CV.sum(-1), cross_C, energy_C, target_C)
    return student_exp_CV, teacher_exp_CV, _Sums(*sum_over_ranks_(torch.stack(local), shard))


def _shift_(logits_CV: torch.Tensor, largest_C: torch.Tensor) -> None:
    """Subtracts each position's largest logit, in place.

    What is left of minus infinity is a finite number whose exponential is still zero, so that zero probability times
    a difference of two such logits is zero and not NaN.
    """
    logits_CV.sub_(largest_C[:, None]).clamp_(min=torch.finfo(logits_CV.dtype).min / 4)


def _keep_only_(values_CV: torch.Tensor, chosen_ids_Ck: torch.Tensor, shard: VocabularyShard) -> None:
    """Zeroes, in place, what is not at one of the chosen vocabulary ids."""
    rows_Ck, is_here_Ck = shard.locate(chosen_ids_Ck)
    kept_Ck = values_CV.gather(1, rows_Ck) * is_here_Ck
    # An id of another rank adds zero to row 0.
    values_CV.zero_().scatter_add_(1, rows_Ck, kept_Ck)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that logits of this dtype are computed with: float32, or float64 as it is."""
    return torch.promote_types(dtype, torch.float32)


class _GradientSums:
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


class _WithGradients(torch.autograd.Function):
    """Returns a loss whose gradients are known already. Its backward pass can run once."""

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, loss, gradients: _GradientSums, shard: VocabularyShard) -> torch.Tensor:
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
