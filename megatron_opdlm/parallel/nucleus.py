"""Top-p over a vocabulary that is sharded over ranks: the smallest set of most likely tokens with enough mass.

Sorting the vocabulary would need all of it in one place. A set of most likely tokens is what lies at or above some
logit, and the mass at or above a logit is a sum over ranks. So the edge of the nucleus is found by bisection: float32
numbers have the order of their bit patterns, read as integers, and 32 halvings leave one number exactly. Of the tokens
at the edge the lowest ids stay, as many as are needed.

Probabilities are kept as integers, multiples of about 2^-44 of the largest one (for 150,000 tokens). Integers add up to
the same in any order, so what is kept, or drawn, does not depend on the tensor-parallel size, not even by rounding.

    masses_NC = fixed_point_masses(logits_NC, largest_N, temperatures_N, shard.vocab_size)
    keep_nucleus_(masses_NC, logits_NC, 0.9, shard)     # zero mass outside the nucleus

Both the drawing of tokens and the teacher's target distribution build on this.

Legend: `N` positions, `C` outcomes on this rank in the order of their ids, `R` ranks.
"""

from __future__ import annotations

import torch

from megatron_opdlm.parallel.vocabulary_shard import VocabularyShard, gather_from_ranks, sum_over_ranks_

_SMALLEST_KEY, _LARGEST_KEY = -0x7F800001, 0x7F800000
"""Of minus and of plus infinity."""


def fraction_bits(vocab_size: int) -> int:
    """Bits behind the point of a mass, as many as let the sum over the vocabulary fit into an int64."""
    return 62 - (vocab_size - 1).bit_length()


def fixed_point_masses(
    logits_NC: torch.Tensor, largest_N: torch.Tensor, temperatures_N: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """int64: the un-normalised probabilities, of which the largest is 1 in fixed point; temperature 0 counts as 1."""
    divisors_N = torch.where(temperatures_N == 0, 1.0, temperatures_N)
    powers_NC = logits_NC.double().sub_(largest_N[:, None]).div_(divisors_N[:, None]).exp_()
    return powers_NC.mul_(2.0 ** fraction_bits(vocab_size)).round_().long()


def keep_nucleus_(masses_NC: torch.Tensor, logits_NC: torch.Tensor, top_p: float, shard: VocabularyShard) -> None:
    """Zeroes, in place, the masses outside the smallest set of most likely tokens that has `top_p` of all mass.

    The token that reaches it stays; of equally likely ones at the edge the lowest ids stay. `masses_NC` are int64,
    equal where `logits_NC` (float32) are equal. 34 times a few numbers a position are summed up or gathered over
    `shard.group`; all of its ranks must call it.
    """
    total_N = sum_over_ranks_(masses_NC.sum(-1), shard)
    needed_N = (total_N.double() * top_p).ceil().long().minimum(total_N)
    edge_N1 = _edge(masses_NC, logits_NC, needed_N, shard)[:, None]
    is_at_edge_NC = logits_NC == edge_N1
    num_kept_N = _num_kept_at_edge(masses_NC, logits_NC > edge_N1, is_at_edge_NC, needed_N, shard)
    is_behind_NC = is_at_edge_NC.cumsum(-1, dtype=torch.int32) > num_kept_N[:, None]
    masses_NC.masked_fill_((logits_NC < edge_N1) | (is_at_edge_NC & is_behind_NC), 0)


def _edge(
    masses_NC: torch.Tensor, logits_NC: torch.Tensor, needed_N: torch.Tensor, shard: VocabularyShard
) -> torch.Tensor:
    """float32 [N]: the largest number with at least the needed mass at or above it."""
    low_N = torch.full_like(needed_N, _SMALLEST_KEY)  # has enough mass above it
    high_N = torch.full_like(needed_N, _LARGEST_KEY + 1)  # has not
    for _ in range(32):
        middle_N = (low_N + high_N) >> 1
        mass_N = sum_over_ranks_(_mass_where(logits_NC >= _number(middle_N)[:, None], masses_NC), shard)
        is_enough_N = mass_N >= needed_N
        low_N, high_N = torch.where(is_enough_N, middle_N, low_N), torch.where(is_enough_N, high_N, middle_N)
    return _number(low_N)


def _num_kept_at_edge(
    masses_NC: torch.Tensor,
    is_above_NC: torch.Tensor,
    is_at_edge_NC: torch.Tensor,
    needed_N: torch.Tensor,
    shard: VocabularyShard,
) -> torch.Tensor:
    """How many of the tokens at the edge stay on this rank, after those with lower ids on the ranks before it.

    Zero or less for none, more than there are for all.
    """
    local_3N = torch.stack(
        [_mass_where(is_above_NC, masses_NC), _mass_where(is_at_edge_NC, masses_NC), is_at_edge_NC.sum(-1)]
    )
    by_rank_R3N = gather_from_ranks(local_3N, shard)
    above_N, at_edge_N, num_at_edge_N = by_rank_R3N.sum(0)
    mass_of_one_N = (at_edge_N // num_at_edge_N.clamp(min=1)).clamp(min=1)  # nothing is at the edge if it is no number
    num_needed_N = -((above_N - needed_N) // mass_of_one_N)  # rounded up
    return num_needed_N - by_rank_R3N[: shard.rank, 2].sum(0)


def _mass_where(condition_NC: torch.Tensor, masses_NC: torch.Tensor) -> torch.Tensor:
    return torch.where(condition_NC, masses_NC, 0).sum(-1)


def _number(keys_N: torch.Tensor) -> torch.Tensor:
    """The float32 number of an int64 key. Keys have the order of the numbers.

    Without its sign bit the pattern of a number grows with its magnitude; so the pattern itself is the key of a
    positive number, and that of a negative one has all other bits flipped.
    """
    return torch.where(keys_N < 0, keys_N ^ 0x7FFFFFFF, keys_N).to(torch.int32).view(torch.float32)
