"""What is drawn, and how sure the model is of it, does not depend on how many ranks share the vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_opdlm.config.schema import RolloutConfig
from megatron_opdlm.rollout.token_sampling import Draws
from tests.ranks import run_on_ranks
from tests.references import slow_distribution
from tests.sampling_cases import NUM_DRAWS, SPREAD, SamplingCase, chi_square_p_value, counted_case, random_case

CASES = [random_case(seed, num_positions=24) for seed in range(10_000, 10_080)]
WIDTHS = (64, 4096)


def as_lists(draws: Draws) -> tuple[list, list, list]:
    return draws.ids_N.tolist(), draws.log_probs_N.tolist(), draws.entropies_N.tolist()


def on_rank(rank: int) -> dict[str, Any]:
    """What each test looks at, in one start of the processes."""
    group, size = dist.group.WORLD, dist.get_world_size()
    counted = {name: counted_case(SPREAD[name]).draw(rank, size, group) for name in SPREAD}
    return {
        "cases": [as_lists(case.draw(rank, size, group)) for case in CASES],
        "counts": {name: draws.ids_N.bincount(minlength=38).tolist() for name, draws in counted.items()},
        "ids": {name: draws.ids_N.tolist() for name, draws in counted.items()},
        "sent": {(width, top_k): numbers_sent(wide_case(width, top_k), rank) for width in WIDTHS for top_k in (0, 5)},
    }


def wide_case(width: int, top_k: int) -> SamplingCase:
    logits_NV = torch.randn(3, width, generator=torch.Generator().manual_seed(1))
    return SamplingCase(logits_NV, torch.full((3,), 0.5).double(), torch.ones(3), width, 7, top_k, top_p=0.9)


def numbers_sent(case: SamplingCase, rank: int) -> list[int]:
    """How many numbers each collective of one call takes from this rank."""
    sent, originals = [], (dist.all_gather, dist.all_reduce)

    def all_gather(gathered, values, group):
        sent.append(values.numel())
        originals[0](gathered, values, group=group)

    def all_reduce(values, group):
        sent.append(values.numel())
        originals[1](values, group=group)

    dist.all_gather, dist.all_reduce = all_gather, all_reduce
    case.draw(rank, 2, dist.group.WORLD)
    dist.all_gather, dist.all_reduce = originals
    return sent


@pytest.fixture(scope="module")
def both_ranks() -> list[dict[str, Any]]:
    return run_on_ranks(on_rank, 2)


def test_two_ranks_draw_what_one_rank_draws(both_ranks):
    for place, case in enumerate(CASES):
        ids, log_probs, entropies = as_lists(case.draw())
        for results in both_ranks:
            assert results["cases"][place][0] == ids, place
            assert results["cases"][place][1] == pytest.approx(log_probs, abs=1e-6)
            assert results["cases"][place][2] == pytest.approx(entropies, abs=1e-6)


def test_both_ranks_know_the_same_numbers_exactly(both_ranks):
    first, second = both_ranks
    assert first["cases"] == second["cases"] and first["ids"] == second["ids"]


def test_what_two_ranks_draw_is_what_the_oracle_draws(both_ranks):
    for place, case in enumerate(CASES[:20]):
        for position, draw in enumerate(zip(*both_ranks[1]["cases"][place], strict=True)):
            found = case.possible(position)
            assert any(draw == pytest.approx(one, rel=1e-6, abs=1e-6) for one in found), (place, position)


@pytest.mark.parametrize("name", SPREAD)
def test_draws_on_two_ranks_pass_a_chi_square_test(both_ranks, name):
    counts, logits = torch.tensor(both_ranks[0]["counts"][name]), counted_case({}).live_logits(0)
    assert counts.sum() == NUM_DRAWS
    exact = RolloutConfig(**SPREAD[name])
    assert chi_square_p_value(counts, slow_distribution(logits, exact)) > 1e-3
    assert chi_square_p_value(counts.roll(1), slow_distribution(logits, exact)) < 1e-6, "the test can fail"
    assert both_ranks[0]["ids"][name] == counted_case(SPREAD[name]).draw().ids_N.tolist()


@pytest.mark.parametrize("top_k", [0, 5])
def test_what_the_ranks_tell_each_other_does_not_grow_with_the_vocabulary(both_ranks, top_k):
    for results in both_ranks:
        narrow, wide = (results["sent"][width, top_k] for width in WIDTHS)
        assert narrow == wide
        assert 0 < max(narrow) <= 3 * max(3, 2 * top_k), "three positions, three numbers or k candidates with ids"
