"""Drawing a token at each masked position, and how sure the model is of it, from logits sharded over the vocabulary.

One uniform number decides a position's draw: the tokens of the filtered distribution lie side by side in the order of
their ids, each as wide as its probability, and the one that the number falls on is drawn. Each tensor-parallel rank
needs only what the ranks before it add up to; logits are never gathered.

Probabilities are made in float64 and kept as integers, multiples of about 2^-44 of the largest one (for 150,000
tokens). Integers add up to the same in any order, so a draw does not depend on the tensor-parallel size, not even by
rounding. A token that the grid rounds to zero is not drawn; all of these together are less than 1e-8 of the mass.

    draws = draw_tokens(logits_NV, uniforms_N, temperatures_N, shard, top_k=20, top_p=0.95)
    draws.ids_N, draws.log_probs_N.exp()         # the tokens and their confidences

Legend: `N` positions, `V` vocabulary rows of this rank, `C` outcomes on this rank (its rows, or the top-k candidates),
`R` ranks of the tensor-parallel group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from megatron_opdlm.parallel.device import to_device
from megatron_opdlm.parallel.nucleus import fixed_point_masses, fraction_bits, keep_nucleus_
from megatron_opdlm.parallel.vocabulary_shard import (
    VocabularyShard,
    gather_from_ranks,
    global_argmax,
    global_top_logits,
    sum_over_ranks_,
)


@dataclass(frozen=True)
class Draws:
    """One drawn token for each of N masked positions; the same on all ranks of the tensor-parallel group."""

    ids_N: torch.Tensor
    """int64."""
    log_probs_N: torch.Tensor
    """float32: log of the raw softmax (temperature 1, unfiltered) at the token; its exponential is the confidence. NaN
    where a logit is NaN or plus infinity, or no token has one that is finite; the id then means nothing."""
    entropies_N: torch.Tensor | None = None
    """float32, in nats, of the distribution the token was drawn from, which at temperature 0 has one outcome and so
    entropy 0. None where nobody asked."""


@torch.no_grad()
def draw_tokens(
    logits_NV: torch.Tensor,
    uniforms_N: torch.Tensor,
    temperatures_N: torch.Tensor | None,
    shard: VocabularyShard,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    with_entropy: bool = False,
) -> Draws:
    """Draws from the distribution after temperature, then top-k, then top-p; temperature 0 takes the most likely.

    Ties are decided for the lowest ids: of equal logits at the edge of the k or of the nucleus, and for the argmax.

    Args:
        logits_NV: float32, this rank's rows. Overwritten: minus infinity at padding and at the mask token.
        uniforms_N: float64 in [0, 1), the same on all ranks of the group, as are the temperatures.
        temperatures_N: float32, one for each position; None where all are 0, which takes far less.
        top_k: 0 for all tokens.
        top_p: over 0 and at most 1, of the mass that top-k leaves; the token that reaches it stays.

    Communicates over `shard.group`, a few numbers a position (and with `top_k` the candidates); all of its ranks must
    call it. Beside the logits it uses the memory of two float64 tensors of their shape, of three where `top_p` is below
    1. Nothing waits for the device.
    """
    assert logits_NV.dtype is torch.float32, "confidences must not be quantised by a narrow format"
    assert uniforms_N.dtype is torch.float64, "a float32 uniform number cannot tell rare tokens apart"
    assert logits_NV.shape[1] == shard.num_rows, "the logits must be those of this shard's rows"
    logits_NV.index_fill_(1, to_device(shard.dead_rows, logits_NV.device), -torch.inf)
    largest_N, best_ids_N = (x_1N[0] for x_1N in global_argmax([logits_NV], shard))
    log_total_N = _log_total(logits_NV, largest_N, shard)
    if temperatures_N is None:
        entropies_N = torch.zeros_like(largest_N) if with_entropy else None
        return Draws(best_ids_N.long(), (-log_total_N).float(), entropies_N)
    outcomes = _most_likely(logits_NV, top_k, shard) if top_k else _Outcomes(logits_NV, None, shard)
    masses_NC = fixed_point_masses(outcomes.logits_NC, largest_N, temperatures_N, shard.vocab_size)
    if top_p < 1:
        keep_nucleus_(masses_NC, outcomes.logits_NC, top_p, outcomes.shard)
    is_greedy_N = temperatures_N == 0
    entropies_N = _entropies(masses_NC, outcomes.shard).masked_fill(is_greedy_N, 0.0) if with_entropy else None
    drawn_ids_N, drawn_N = _inverse_cdf_(masses_NC, uniforms_N, outcomes)
    ids_N = torch.where(is_greedy_N, best_ids_N.long(), drawn_ids_N)
    chosen_N = torch.where(is_greedy_N, largest_N, drawn_N)
    return Draws(ids_N, (chosen_N.double() - largest_N - log_total_N).float(), entropies_N)


class _Outcomes(NamedTuple):
    """What may be drawn, in the order of the ids; `ids_NC` is None where they are the rows of the shard."""

    logits_NC: torch.Tensor
    ids_NC: torch.Tensor | None
    shard: VocabularyShard


def _most_likely(logits_NV: torch.Tensor, top_k: int, shard: VocabularyShard) -> _Outcomes:
    """The k most likely tokens of all ranks, on every rank: from here on there is nothing to communicate.

    The order of the logits is that at any temperature, and they do not get rounded.
    """
    values_NC, ids_NC = global_top_logits(logits_NV, top_k, shard)
    ids_NC, by_id_NC = ids_NC.sort(dim=-1)
    whole = replace(shard, first=0, num_rows=ids_NC.shape[1], group=None)
    return _Outcomes(values_NC.gather(1, by_id_NC), ids_NC, whole)


def _log_total(logits_NV: torch.Tensor, largest_N: torch.Tensor, shard: VocabularyShard) -> torch.Tensor:
    """float64: log of the sum of e^(logit - largest) over the vocabulary. Gathers one number a position."""
    sums_N = (logits_NV - largest_N[:, None]).exp_().sum(-1, dtype=torch.float64)
    return gather_from_ranks(sums_N, shard).sum(0).log()


def _entropies(masses_NC: torch.Tensor, shard: VocabularyShard) -> torch.Tensor:
    """float32 [N]: -sum (m/M) log (m/M) = log M - (sum m log m) / M, of masses m with the sum M.

    Gathers two numbers a position.
    """
    powers_NC = masses_NC.double().mul_(2.0 ** -fraction_bits(shard.vocab_size))
    total_N = powers_NC.sum(-1)
    own_N = torch.special.entr(powers_NC, out=powers_NC).sum(-1)
    total_N, own_N = gather_from_ranks(torch.stack([total_N, own_N]), shard).sum(0)
    return (total_N.log() + own_N / total_N).clamp(min=0).float()


def _inverse_cdf_(
    masses_NC: torch.Tensor, uniforms_N: torch.Tensor, outcomes: _Outcomes
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and logits [N] of the first tokens whose cumulative mass exceeds the uniform number's part of the total.

    Overwrites the masses. Gathers one number a position, and sums up two.
    """
    logits_NC, ids_NC, shard = outcomes
    sums_RN = gather_from_ranks(masses_NC.sum(-1), shard)
    total_N = sums_RN.sum(0)
    # u * total may round up to total, beyond the last token that has mass
    targets_N = (uniforms_N * total_N).long().minimum(total_N - 1) - sums_RN[: shard.rank].sum(0)
    is_here_N = (targets_N >= 0) & (targets_N < sums_RN[shard.rank])
    columns_N1 = torch.searchsorted(masses_NC.cumsum_(-1), targets_N[:, None], right=True)
    columns_N1 = columns_N1.clamp_(max=masses_NC.shape[1] - 1)
    ids_N1 = columns_N1 + shard.first if ids_NC is None else ids_NC.gather(1, columns_N1)
    # all ranks but the one that has the token add zeros; float32 holds the ids exactly (`EXACT_IDS`)
    found_2N = torch.cat([ids_N1.float(), logits_NC.gather(1, columns_N1)], dim=1).t()
    ids_N, logits_N = sum_over_ranks_(torch.where(is_here_N, found_2N, 0.0).contiguous(), shard)
    return ids_N.long(), logits_N
