"""Masks by learnability, against the rule in plain Python."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_opdlm.config.schema import ObjectiveConfig
from megatron_opdlm.diffusion.lift_masks import draw_levels, keep_by_learnability, kept_masks, mask_super_sets
from tests.unit.diffusion.test_supervised_states import END, MASK, PAD, given


def kept_slowly(log_probs, is_masked, t, rho, places) -> list[bool]:
    """One block, literally."""
    masked = [i for i in range(len(log_probs)) if is_masked[i]]
    num_kept = round(len(masked) * t / (t + rho))
    if t < 1 / 3:
        order = sorted(masked, key=lambda i: log_probs[i])
    elif t <= 2 / 3:
        order = sorted(masked, key=lambda i: places[i])
    else:
        order = sorted(masked, key=lambda i: -log_probs[i])
    return [i in order[:num_kept] for i in range(len(log_probs))]


def super_sets(trajectories, **settings):
    objective = ObjectiveConfig(name="lift", **settings)
    return mask_super_sets(trajectories, objective, mask_token_id=MASK, pad_token_id=PAD, seed=1, step=0)


def test_what_stays_masked_is_what_the_rule_says_literally():
    draw = random.Random(0)
    for _ in range(300):
        size, t = draw.choice([1, 4, 8]), draw.random()
        rho = draw.uniform(0, 1 - t)
        # Of few values, so that some are equal.
        log_probs, places = ([draw.choice([-3.0, -1.0, -0.5, -0.25]) for _ in range(size)] for _ in range(2))
        is_masked = [draw.random() < 0.7 for _ in range(size)]
        row = [torch.tensor([log_probs]), torch.tensor([is_masked])]
        levels = [torch.full((1, size), value, dtype=torch.float64) for value in (t, t / (t + rho))]
        actual = kept_masks(*row, *levels, torch.tensor([places], dtype=torch.float64))
        assert actual[0].tolist() == kept_slowly(log_probs, is_masked, t, rho, places)


@pytest.mark.parametrize(("t", "expected"), [(0.2, [2]), (0.5, [0]), (0.8, [1])])
def test_little_noise_keeps_the_hardest_much_noise_the_easiest_and_some_any(t, expected):
    log_probs, places = [-1.0, -0.1, -5.0], [0.1, 0.2, 0.3]
    level = torch.full((1, 3), t, dtype=torch.float64)
    share = torch.full((1, 3), 0.4, dtype=torch.float64)
    kept = kept_masks(
        torch.tensor([log_probs]), torch.ones(1, 3, dtype=torch.bool), level, share, torch.tensor([places])
    )
    assert kept[0].nonzero().flatten().tolist() == expected


def test_the_surplus_leaves_the_super_set_a_probability():
    noise_M1, surplus_M1 = draw_levels(20_000, 0.001, 1.0, torch.Generator().manual_seed(0))
    room_M1 = 1 - noise_M1
    assert ((surplus_M1 >= 0) & (surplus_M1 <= room_M1)).all()
    assert surplus_M1[room_M1 > 0.1].min() >= 0.1
    assert surplus_M1[room_M1 <= 0.1].min() < 0.01
    half = (noise_M1 - 0.5).abs() < 0.01
    assert surplus_M1[half].mean().item() == pytest.approx((0.1 + 0.5) / 2, abs=0.02)


def test_the_super_set_is_masked_as_often_as_its_two_levels_say():
    states = super_sets([given(prompt=[3, 5, 3, 5], response=[7] * 39_996)], noise_low=0.5, noise_high=0.5)
    # t + rho is uniform between 0.6 and 1.
    assert states.is_masked_BT[:, 4:].double().mean().item() == pytest.approx(0.8, abs=0.02)


def test_kept_states_mask_a_part_of_the_super_set_and_give_the_rest_its_tokens_back():
    trajectories = [given(prompt_id=i, response=[*(3 + j % 5 for j in range(9 + i)), END]) for i in range(4)]
    states = super_sets(trajectories)
    log_probs_BT = -torch.rand(states.clean_ids_BT.shape, generator=torch.Generator().manual_seed(0))
    kept = keep_by_learnability(states, log_probs_BT, block_size=4)
    assert not (kept.is_masked_BT & ~states.is_masked_BT).any()
    for row in range(4):
        for begin in range(0, states.clean_ids_BT.shape[1], 4):
            place = slice(begin, begin + 4)
            is_masked = states.is_masked_BT[row, place].tolist()
            if any(is_masked):
                t, share = states.noise_BT[row, begin].item(), states.kept_share_BT[row, begin].item()
                columns = log_probs_BT[row, place].tolist(), states.place_BT[row, place].tolist()
                expected = kept_slowly(columns[0], is_masked, t, t / share - t, columns[1])
                assert kept.is_masked_BT[row, place].tolist() == expected
    assert (kept.is_trained_BT == states.is_trained_BT & kept.is_masked_BT).all()
    assert kept.num_trained_by_trajectory_B.equal(kept.is_trained_BT.sum(dim=1))
    assert 0 < kept.is_trained_BT.sum() < states.is_trained_BT.sum()
