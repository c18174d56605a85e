"""Random masks: what they may mask, how often, and what they depend on."""

from __future__ import annotations

import pytest
import torch

from megatron_opdlm.diffusion.random_masks import draw_masks

RESPONSE_MK = torch.tensor([[False, False, True, True], [True, True, True, True], [True, True, True, True]])
MANY_MK = torch.ones(20_000, 4, dtype=torch.bool)


def draw(is_response_MK=RESPONSE_MK, seed=0, **settings):
    return draw_masks(is_response_MK, torch.Generator().manual_seed(seed), **settings)


@pytest.mark.parametrize("noise_level", ["block", "sequence"])
def test_a_position_is_masked_where_its_number_is_below_its_noise_level(noise_level):
    masks = draw(noise_level=noise_level, at_least_one=False)
    for block, is_response_K in enumerate(RESPONSE_MK.tolist()):
        for place, is_response in enumerate(is_response_K):
            below = bool(masks.uniform_MK[block, place] < masks.noise_MK[block, place])
            assert masks.is_masked_MK[block, place].item() == (is_response and below)


def test_every_block_masks_a_position_of_the_response_if_asked_to_and_only_the_lowest_is_added():
    for seed in range(50):
        free = draw(seed=seed, low=0.0, high=0.2, at_least_one=False)
        forced = draw(seed=seed, low=0.0, high=0.2)
        added_MK = forced.is_masked_MK & ~free.is_masked_MK
        assert forced.is_masked_MK.any(dim=1).all() and not (forced.is_masked_MK & ~RESPONSE_MK).any()
        for block in range(3):
            numbers = [(masked, n) for masked, n in zip(RESPONSE_MK[block], free.uniform_MK[block], strict=True)]
            lowest = min(range(4), key=lambda place: float(numbers[place][1]) if numbers[place][0] else 2.0)
            expected = [] if free.is_masked_MK[block].any() else [lowest]
            assert added_MK[block].nonzero().flatten().tolist() == expected


def test_noise_levels_are_of_a_block_or_of_the_sequence_and_within_their_bounds():
    by_block, by_sequence = (draw(noise_level=level, low=0.3, high=0.8).noise_MK for level in ("block", "sequence"))
    assert len(by_block.unique()) == 3 and (by_block == by_block[:, :1]).all()
    assert len(by_sequence.unique()) == 1
    many = draw(MANY_MK, low=0.3, high=0.8).noise_MK[:, 0]
    assert 0.3 <= many.min() < 0.31 and 0.79 < many.max() < 0.8
    assert many.mean().item() == pytest.approx(0.55, abs=0.01)


def test_masks_are_as_frequent_as_the_noise_level_says():
    masks = draw(MANY_MK, low=0.25, high=0.25, at_least_one=False)
    assert masks.is_masked_MK.double().mean().item() == pytest.approx(0.25, abs=0.01)


def test_the_same_generator_gives_the_same_masks():
    assert draw(seed=3).is_masked_MK.equal(draw(seed=3).is_masked_MK)
    assert not draw(MANY_MK, seed=3).is_masked_MK.equal(draw(MANY_MK, seed=4).is_masked_MK)
