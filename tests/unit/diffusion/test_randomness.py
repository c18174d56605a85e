"""Generators that belong to one sequence."""

from __future__ import annotations

import torch

from megatron_opdlm.diffusion.randomness import sequence_generator, sequence_seed


def test_seeds_never_change_from_one_machine_or_version_to_another():
    assert sequence_seed(1234, 3, 7, 0, purpose="rollout") == 4963321789710316435
    assert sequence_seed(0, 0, 0, 0, purpose="states") == 5839134001040306585
    assert sequence_generator(1234, 3, 7, 0, purpose="rollout").initial_seed() == 4963321789710316435


def test_each_part_of_a_sequences_name_changes_its_seed():
    names = [(1, 2, 3, 4), (0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0), (12, 3, 4, 0), (1, 23, 4, 0)]
    seeds = {sequence_seed(*name, purpose=purpose) for name in names for purpose in ("rollout", "states")}
    assert len(seeds) == 2 * len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_sequence_draws_the_same_whatever_was_drawn_before():
    first = torch.rand(4, generator=sequence_generator(1, 2, 3, 0, purpose="states"))
    torch.rand(100)
    other = torch.rand(4, generator=sequence_generator(1, 2, 4, 0, purpose="states"))
    again = torch.rand(4, generator=sequence_generator(1, 2, 3, 0, purpose="states"))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_neighbouring_sequences_draw_uniform_numbers():
    draws = torch.cat([torch.rand(1, generator=sequence_generator(1, 0, i, 0, purpose="x")) for i in range(1000)])
    counts = torch.histc(draws, bins=4, min=0, max=1)
    assert counts.min() > 200 and counts.max() < 300
