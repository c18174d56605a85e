"""The length of responses grows from its first to its full value, on the block grid."""

from __future__ import annotations

import pytest

from megatron_opdlm.config.schema import CurriculaConfig, RolloutConfig
from megatron_opdlm.training.curricula import domain_limit, dynamic_threshold_at, max_new_tokens_at

PAPER = {"length_start": 100, "length_ramp_steps": 100}


@pytest.mark.parametrize(
    ("shape", "lengths"),
    [
        ("linear", {0: 100, 1: 140, 25: 1076, 50: 2052, 99: 3964, 100: 4000, 1000: 4000}),  # 2050 -> 2052
        ("sine", {0: 100, 50: 2860, 100: 4000, 150: 4000}),  # 100 + 3900 sin(pi/4) = 2857.7
        ("cosine", {0: 100, 50: 1244, 100: 4000}),  # 100 + 3900 (1 - cos(pi/4)) = 1242.3
    ],
)
def test_the_length_follows_its_shape_on_the_block_grid(shape, lengths):
    curricula = CurriculaConfig(length_shape=shape, **PAPER)
    rollout = RolloutConfig(block_size=4, max_new_tokens=4000)
    assert {step: max_new_tokens_at(step, curricula, rollout) for step in lengths} == lengths


def test_without_a_curriculum_the_full_length_holds_from_the_first_step():
    assert max_new_tokens_at(0, CurriculaConfig(), RolloutConfig(block_size=4, max_new_tokens=10)) == 12


def test_a_length_that_is_whole_blocks_up_to_rounding_gets_no_extra_block():
    curricula = CurriculaConfig(length_start=8, length_ramp_steps=35)
    rollout = RolloutConfig(block_size=4, max_new_tokens=148)
    assert 8 + (148 - 8) * (29 / 35) > 124  # in floating point; 8 + 4 x 29 is 124
    assert [max_new_tokens_at(step, curricula, rollout) for step in range(36)] == list(range(8, 149, 4))


def test_at_least_one_block_and_never_more_than_the_full_length():
    one_token = CurriculaConfig(length_start=1, length_ramp_steps=5)
    assert max_new_tokens_at(0, one_token, RolloutConfig(block_size=8, max_new_tokens=64)) == 8
    falling = CurriculaConfig(length_start=100, length_ramp_steps=5)
    assert max_new_tokens_at(0, falling, RolloutConfig(block_size=4, max_new_tokens=18)) == 20


def test_a_ramp_of_no_steps_is_the_full_length_at_once():
    assert max_new_tokens_at(0, CurriculaConfig(length_start=4, length_ramp_steps=0), RolloutConfig()) == 4000


def test_a_domain_has_its_own_cap_only_where_it_is_lower():
    rollout = RolloutConfig(max_new_tokens_by_domain={"code": 2048})
    assert domain_limit("code", 4000, rollout) == 2048
    assert domain_limit("code", 100, rollout) == 100
    assert domain_limit("math", 4000, rollout) == 4000
    assert domain_limit("", 4000, rollout) == 4000


def test_the_threshold_holds_and_then_goes_in_a_straight_line_to_its_full_value():
    curricula = CurriculaConfig(threshold_start=1.0, threshold_hold_steps=10, threshold_ramp_steps=20)
    rollout = RolloutConfig(dynamic_threshold=0.8)
    expected = {0: 1.0, 9: 1.0, 10: 1.0, 11: 0.99, 15: 0.95, 20: 0.9, 29: 0.81, 30: 0.8, 1000: 0.8}
    assert {step: dynamic_threshold_at(step, curricula, rollout) for step in expected} == pytest.approx(expected)


def test_the_threshold_may_rise_or_jump_or_stay():
    rollout = RolloutConfig(dynamic_threshold=0.9)
    rising = CurriculaConfig(threshold_start=0.5, threshold_ramp_steps=4)
    assert [dynamic_threshold_at(step, rising, rollout) for step in range(6)] == pytest.approx(
        [0.5, 0.6, 0.7, 0.8, 0.9, 0.9]
    )
    jumping = CurriculaConfig(threshold_start=0.5, threshold_hold_steps=2, threshold_ramp_steps=0)
    assert [dynamic_threshold_at(step, jumping, rollout) for step in range(4)] == [0.5, 0.5, 0.9, 0.9]
    assert dynamic_threshold_at(0, CurriculaConfig(), rollout) == 0.9
