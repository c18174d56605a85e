"""Draws on one rank against float64 arithmetic over lists, hand-worked edges, and what the sampler costs."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opdlm.config.schema import RolloutConfig
from megatron_opdlm.parallel.vocabulary_shard import VocabularyShard
from megatron_opdlm.rollout.token_sampling import Draws, draw_tokens
from tests.references import slow_distribution
from tests.sampling_cases import NUM_DRAWS, SPREAD, chi_square_p_value, counted_case, random_case


def draw(logits_NV: torch.Tensor, uniforms, temperature: float | None = 1.0, group=None, **filters) -> Draws:
    num_rows = logits_NV.shape[1]
    shard = VocabularyShard(0, num_rows, num_rows, mask_token_id=num_rows, group=group)
    uniforms_N = torch.as_tensor(uniforms, dtype=torch.float64)
    logits_NV = logits_NV.expand(len(uniforms_N), -1).clone()
    temperatures_N = None if temperature is None else torch.full(uniforms_N.shape, temperature)
    return draw_tokens(logits_NV, uniforms_N, temperatures_N, shard, **filters)


def kept_tokens(logits: list[float], **filters) -> list[int]:
    """The tokens that evenly spread uniform numbers reach."""
    return draw(torch.tensor([logits]), (torch.arange(1000) + 0.5) / 1000, **filters).ids_N.unique().tolist()


@settings(max_examples=100)
@given(st.integers(0, 2**32))
def test_a_draw_is_the_inverse_of_the_cumulative_distribution_in_float64(seed):
    case = random_case(seed)
    draws = case.draw()
    for position in range(len(draws.ids_N)):
        found = case.possible(position)
        drawn = [float(x[position]) for x in (draws.ids_N, draws.log_probs_N, draws.entropies_N)]
        assert any(drawn == pytest.approx(one, rel=1e-6, abs=1e-6) for one in found), (drawn, found)


def test_the_padding_and_the_mask_token_are_never_drawn_nor_do_they_count():
    logits_NV = torch.tensor([[1.0, 99.0, 0.0, 2.0, 99.0, 99.0]]).expand(500, -1).clone()
    shard = VocabularyShard(first=0, num_rows=6, vocab_size=4, mask_token_id=1, group=None)
    uniforms_N = (torch.arange(500).double() + 0.5) / 500
    draws = draw_tokens(logits_NV, uniforms_N, torch.full((500,), 50.0), shard)
    assert draws.ids_N.unique().tolist() == [0, 2, 3]
    expected_N = torch.tensor([1.0, 99.0, 0.0, 2.0])[[0, 2, 3]].log_softmax(0)[torch.tensor([0, 0, 1, 2])[draws.ids_N]]
    torch.testing.assert_close(draws.log_probs_N, expected_N)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1e-9, 1), (0.4, 1), (0.499, 1), (0.501, 2), (0.749, 2), (0.751, 3), (0.874, 3), (0.876, 4), (1, 4)],
)
def test_the_token_that_reaches_top_p_stays_and_the_next_one_does_not(top_p, kept):
    logits = torch.tensor([0.25, 0.125, 0.5, 0.125]).log().tolist()
    by_probability = [2, 0, 1, 3]
    assert kept_tokens(logits, top_p=top_p) == sorted(by_probability[:kept])


def test_of_equal_tokens_at_the_edge_the_lowest_ids_stay():
    assert kept_tokens([0.0, 0.0, 0.0, 0.0], top_p=0.5) == [0, 1], "exactly half"
    assert kept_tokens([0.0, 5.0, 0.0, 0.0, 0.0], top_k=3) == [0, 1, 2]
    assert kept_tokens([-0.0, 0.0, -0.0, 0.0], top_p=0.75) == [0, 1, 2], "both zeros are the same number"
    assert kept_tokens([0.0, 0.0, 0.0, 0.0], top_k=3, top_p=0.6) == [0, 1], "of the mass that top-k leaves"


def test_temperature_0_takes_the_most_likely_token_with_the_lowest_id_and_leaves_no_entropy():
    draws = draw(torch.tensor([[0.0, 2.0, 1.0, 2.0]]), [0.0, 0.9999], temperature=0.0, top_k=2, with_entropy=True)
    assert draws.ids_N.tolist() == [1, 1] and draws.entropies_N.tolist() == [0.0, 0.0]
    raw = torch.tensor([0.0, 2.0, 1.0, 2.0]).log_softmax(0)[1]
    torch.testing.assert_close(draws.log_probs_N, raw.expand(2))


def test_no_temperatures_are_temperature_0_to_the_bit():
    logits_NV = torch.randn(50, 200, generator=torch.Generator().manual_seed(0)) * 5
    for with_entropy in (False, True):
        draws, expected = (
            [draw(row_V[None], [0.7], temperature, with_entropy=with_entropy) for row_V in logits_NV]
            for temperature in (None, 0.0)
        )
        for one, other in zip(draws, expected, strict=True):
            assert (one.ids_N, one.log_probs_N, one.entropies_N) == (other.ids_N, other.log_probs_N, other.entropies_N)


def test_very_low_temperatures_take_the_most_likely_tokens_alike():
    assert kept_tokens([0.0, 3.0, 2.9999, 3.0], temperature=1e-38) == [1, 3]


def test_entropy_is_that_of_the_filtered_distribution_and_made_only_on_request():
    logits_NV = torch.tensor([[0.0, 0.0, 0.0, 0.0, -torch.inf]])
    for filters, num_equal in (({}, 4), ({"top_k": 2}, 2), ({"top_p": 0.7}, 3)):
        entropies_N = draw(logits_NV, [0.3], with_entropy=True, **filters).entropies_N
        torch.testing.assert_close(entropies_N, torch.tensor([float(num_equal)]).log())
    assert draw(logits_NV, [0.3]).entropies_N is None


def test_rare_tokens_of_a_large_vocabulary_are_drawn_as_often_as_they_should():
    """100,000 tokens of equal logits far below the largest, which a float32 cumulative sum would lose."""
    logits_NV = torch.full((1, 100_001), -18.0)
    logits_NV[0, 0] = 0.0
    rare = 100_000 * torch.tensor(-18.0, dtype=torch.float64).exp()
    share = rare / (1 + rare)
    uniforms = [1 - share * (1 - part) for part in (-1e-5, 0.00001, 0.25, 0.5, 0.99999)]
    assert draw(logits_NV, uniforms).ids_N.tolist() == pytest.approx([0, 1, 25_001, 50_001, 99_999], abs=1)


def test_no_positions_give_no_draws():
    for filters in ({}, {"top_k": 2, "top_p": 0.5, "with_entropy": True}):
        draws = draw(torch.zeros(1, 6), [], **filters)
        assert draws.ids_N.shape == draws.log_probs_N.shape == (0,)


@pytest.mark.parametrize("name", SPREAD)
def test_counts_of_draws_pass_a_chi_square_test_and_fail_it_for_a_neighbouring_distribution(name):
    """p > 0.001 for the exact distribution; below one in a million for settings that differ a little."""
    case, logits = counted_case(SPREAD[name]), counted_case({}).live_logits(0)
    counts = case.draw().ids_N.bincount(minlength=case.vocab_size)
    assert counts.sum() == NUM_DRAWS
    exact = RolloutConfig(**SPREAD[name])
    assert chi_square_p_value(counts, slow_distribution(logits, exact)) > 1e-3
    for change in ({"temperature": exact.temperature * 1.2}, {"temperature": exact.temperature / 1.2}, {"top_k": 7}):
        neighbour = RolloutConfig(**(SPREAD[name] | change))
        assert chi_square_p_value(counts, slow_distribution(logits, neighbour)) < 1e-6


def test_a_group_of_one_rank_sends_nothing(world_of_one, monkeypatch):
    for name in ("all_gather", "all_reduce"):
        monkeypatch.setattr(dist, name, None)
    draw(torch.zeros(1, 8), [0.5], group=dist.group.WORLD, top_p=0.5, with_entropy=True)
    draw(torch.zeros(1, 8), [0.5], group=dist.group.WORLD, top_k=3)


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 50}, {"with_entropy": True}], ids=str)
def test_beside_the_logits_the_memory_of_at_most_three_float64_tensors_of_their_shape_is_used(filters):
    logits_NV = torch.randn(8, 40_000)
    shard = VocabularyShard(0, 40_000, 40_000, mask_token_id=3, group=None)
    uniforms_N, temperatures_N = torch.rand(8, dtype=torch.float64), torch.ones(8)
    with torch.profiler.profile(profile_memory=True) as profile:
        draw_tokens(logits_NV, uniforms_N, temperatures_N, shard, **filters)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    peak = max(itertools.accumulate(sizes))
    assert 8 * logits_NV.numel() < peak < 3 * 8 * logits_NV.numel()
