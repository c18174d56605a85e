"""From the logits of a chunk of positions to the divergence at each of them and its gradient with respect to them.

The logits stay sharded over the vocabulary. What ranks tell each other is one number per position for each sum over
outcomes (`divergences` says which), and with `divergence.top_k` the k candidates. The outcomes are

- all tokens, where `top_k` is 0;
- the set A of the teacher's k most likely tokens, with the probabilities that they have in the whole vocabulary, for
  `top_k_tail: none`. The sum over A alone can be negative: it is the paper's rule, and no divergence;
- A with both distributions divided by the probability of A, for `renormalize`;
- A and one more outcome, all other tokens, for `bucket`.

The gradient at a token outside A is its probability q_v times a factor: -sum_A h for `none`, where only the softmax's
sum depends on it; 0 for `renormalize`; for `bucket` the gradient at the last outcome over that outcome's probability,
of which the token has the part q_v.

    figures_4C, gradient_CV = figures_and_gradient(student_CV, teacher_CV, None, target_ids_C, settings, shard)

Shapes: C positions, V vocabulary rows of this rank, k candidates, O outcomes.
"""

from __future__ import annotations

import torch

from megatron_opdlm.config.schema import DivergenceConfig
from megatron_opdlm.distillation.divergences import LOWEST, divergence_and_slopes
from megatron_opdlm.parallel.vocabulary_shard import VocabularyShard, global_argmax, sum_over_ranks_


def figures_and_gradient(
    student_CV: torch.Tensor,
    teacher_CV: torch.Tensor,
    chosen_ids_Ck: torch.Tensor | None,
    target_ids_C: torch.Tensor,
    settings: DivergenceConfig,
    shard: VocabularyShard,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Figures [4, C] and the gradient [C, V] of each position's divergence with respect to the student's logits.

    The figures: the divergence, the student's log-probability of the target id and its entropy, both over the whole
    vocabulary, and 1 where both have the same most likely token. `chosen_ids_Ck` is the set A, None for all tokens.

    Overwrites both logits. Three chunk-sized buffers are alive at a time, these two included; four for `mixture` and
    `jsd` over the whole vocabulary. Communicates over `shard.group`; all of its ranks must call it.
    """
    target_C, entropy_C, agrees_C = _to_log_probs_(student_CV, teacher_CV, target_ids_C, shard)
    log_q_CV, log_p_CV = student_CV, teacher_CV
    if chosen_ids_Ck is None:
        divergence_C, gradient_CV = _over_vocabulary(log_p_CV, log_q_CV, settings, shard)
    else:
        divergence_C, gradient_CV = _over_candidates(log_p_CV, log_q_CV, chosen_ids_Ck, settings, shard)
    return torch.stack([divergence_C, target_C, entropy_C, agrees_C]), gradient_CV


def _to_log_probs_(
    student_CV: torch.Tensor, teacher_CV: torch.Tensor, target_ids_C: torch.Tensor, shard: VocabularyShard
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Turns both logits into finite log-probabilities in place; the figures of the student that need no divergence.

    The largest logit goes first: what is left is small where the probability is large, and so are its roundings.
    """
    top_2C, best_2C = global_argmax([student_CV, teacher_CV], shard)
    student_CV.sub_(top_2C[0, :, None]).clamp_(min=LOWEST)
    teacher_CV.sub_(top_2C[1, :, None]).clamp_(min=LOWEST)
    row_C, is_here_C = shard.locate(target_ids_C)
    target_C = student_CV.gather(1, row_C[:, None])[:, 0] * is_here_C
    teacher_C, student_exp_CV = teacher_CV.exp().sum(-1), student_CV.exp()
    student_C = student_exp_CV.sum(-1)
    local_4C = torch.stack([student_C, teacher_C, student_exp_CV.mul_(student_CV).sum(-1), target_C])
    student_C, teacher_C, energy_C, target_C = sum_over_ranks_(local_4C, shard)
    student_CV.sub_(student_C.log()[:, None])
    teacher_CV.sub_(teacher_C.log()[:, None])
    log_student_C, agrees_C = student_C.log(), best_2C[0] == best_2C[1]
    return target_C - log_student_C, log_student_C - energy_C / student_C, agrees_C.to(target_C.dtype)


def _over_vocabulary(
    log_p_CV: torch.Tensor, log_q_CV: torch.Tensor, settings: DivergenceConfig, shard: VocabularyShard
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergence [C] and gradient [C, V] over all tokens. Both arguments are used up."""
    divergence_C, slopes_CV = divergence_and_slopes(log_p_CV, log_q_CV, settings)
    divergence_C, slope_C = sum_over_ranks_(torch.stack([divergence_C, slopes_CV.sum(-1)]), shard)
    return divergence_C, slopes_CV.addcmul_(log_q_CV.exp_(), slope_C[:, None], value=-1)


def _over_candidates(
    log_p_CV: torch.Tensor,
    log_q_CV: torch.Tensor,
    chosen_ids_Ck: torch.Tensor,
    settings: DivergenceConfig,
    shard: VocabularyShard,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergence [C] and gradient [C, V] over the chosen ids and what `top_k_tail` adds. Both arguments are used up.

    All ranks get the candidates, and each computes the divergence of these few outcomes for itself.
    """
    rows_Ck, is_here_Ck = shard.locate(chosen_ids_Ck)
    chosen_2Ck = torch.stack([log_probs.gather(1, rows_Ck) * is_here_Ck for log_probs in (log_p_CV, log_q_CV)])
    outcomes_2CO = sum_over_ranks_(chosen_2Ck, shard)
    others_CV = _zero_at_(log_q_CV.exp_(), rows_Ck, is_here_Ck)
    if settings.top_k_tail == "renormalize":
        outcomes_2CO = outcomes_2CO.log_softmax(-1)
    elif settings.top_k_tail == "bucket":
        of_teacher_C = _zero_at_(log_p_CV.exp_(), rows_Ck, is_here_Ck).sum(-1)
        rest_2C = sum_over_ranks_(torch.stack([of_teacher_C, others_CV.sum(-1)]), shard)
        outcomes_2CO = torch.cat([outcomes_2CO, rest_2C.log()[:, :, None]], dim=-1)
    divergence_C, gradient_CO, factor_C1 = _of_few_outcomes(*outcomes_2CO.clamp_(min=LOWEST), settings)
    gradient_Ck = gradient_CO[:, : chosen_ids_Ck.shape[1]] * is_here_Ck
    return divergence_C, others_CV.mul_(factor_C1).scatter_add_(1, rows_Ck, gradient_Ck)


def _of_few_outcomes(
    log_p_CO: torch.Tensor, log_q_CO: torch.Tensor, settings: DivergenceConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Divergence [C]; gradient at the outcomes [C, O]; factor [C, 1] of q_v at the tokens v that are none of them."""
    divergence_C, slopes_CO = divergence_and_slopes(log_p_CO, log_q_CO, settings)
    q_CO, slope_C1 = log_q_CO.exp(), slopes_CO.sum(-1, keepdim=True)
    gradient_CO = slopes_CO.addcmul_(q_CO, slope_C1, value=-1)
    # where all of the bucket rounds to zero, so does each of its tokens, and any finite factor will do
    in_bucket_C1 = gradient_CO[:, -1:] / q_CO[:, -1:].clamp(min=torch.finfo(q_CO.dtype).tiny)
    factors = {"none": -slope_C1, "renormalize": torch.zeros_like(slope_C1), "bucket": in_bucket_C1}
    return divergence_C, gradient_CO, factors[settings.top_k_tail]


def _zero_at_(values_CV: torch.Tensor, rows_Ck: torch.Tensor, is_here_Ck: torch.Tensor) -> torch.Tensor:
    """Zeroes the values at these rows, each of which is named once, in place.

    By subtraction, which is exact here: ids of other ranks have row 0, and take nothing from it.
    """
    return values_CV.scatter_add_(1, rows_Ck, -(values_CV.gather(1, rows_Ck) * is_here_Ck))
