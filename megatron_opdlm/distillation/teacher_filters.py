"""The target distribution that the teacher sets: temperature, then top-k, then top-p, then min-p, as in sampling.

What a filter leaves out has probability zero in the target, and the rest is divided by what it adds up to. Logits stay
sharded over the vocabulary: a filter is a threshold that the ranks find together.

    filter_target_(teacher_CV, DivergenceConfig(teacher_temperature=0.8, teacher_top_p=0.95), shard)
    teacher_CV                               # minus infinity at what was left out

Of equal logits at the edge of the k or of the nucleus the lowest ids stay, as in the rollout (`parallel.nucleus`).

Shapes: C positions, V vocabulary rows of this rank, k candidates.
"""

from __future__ import annotations

import math

import torch

from megatron_opdlm.config.schema import DivergenceConfig
from megatron_opdlm.parallel.nucleus import fixed_point_masses, keep_nucleus_
from megatron_opdlm.parallel.vocabulary_shard import VocabularyShard, global_argmax, global_top_k


def filter_target_(logits_CV: torch.Tensor, settings: DivergenceConfig, shard: VocabularyShard) -> None:
    """Applies the teacher's filters of `settings` to its logits, in place; rows that take no part are -inf already.

    Communicates over `shard.group` where a filter is on: the k candidates, or a few numbers a position. All of its
    ranks must call it. `teacher_top_p` below 1 uses the memory of four chunk-sized float32 buffers beside the logits,
    freed before the student's logits are made; the others of less than one.
    """
    if settings.teacher_temperature != 1:
        logits_CV.div_(settings.teacher_temperature)
    if settings.teacher_top_k:
        _keep_most_likely_(logits_CV, settings.teacher_top_k, shard)
    if settings.teacher_top_p < 1:
        _keep_nucleus_(logits_CV, settings.teacher_top_p, shard)
    if settings.teacher_min_p:
        (largest_C,) = global_argmax([logits_CV], shard)[0]
        # p >= min_p * largest p, in logarithms: the sum over the vocabulary cancels
        logits_CV.masked_fill_(logits_CV < (largest_C + math.log(settings.teacher_min_p))[:, None], -torch.inf)


def _keep_most_likely_(logits_CV: torch.Tensor, top_k: int, shard: VocabularyShard) -> None:
    rows_Ck, is_here_Ck = shard.locate(global_top_k(logits_CV, top_k, shard))
    kept_Ck = logits_CV.gather(1, rows_Ck).masked_fill_(~is_here_Ck, -torch.inf)
    # Ids of other ranks have row 0, whose logit, if it stays, is more than their minus infinity.
    logits_CV.fill_(-torch.inf).scatter_reduce_(1, rows_Ck, kept_Ck, "amax")


def _keep_nucleus_(logits_CV: torch.Tensor, top_p: float, shard: VocabularyShard) -> None:
    ranked_CV = logits_CV.float()  # the order of float32 numbers is what `keep_nucleus_` searches in
    (largest_C,) = global_argmax([ranked_CV], shard)[0]
    masses_CV = fixed_point_masses(ranked_CV, largest_C, torch.ones_like(largest_C), shard.vocab_size)
    keep_nucleus_(masses_CV, ranked_CV, top_p, shard)
    logits_CV.masked_fill_(masses_CV == 0, -torch.inf)
