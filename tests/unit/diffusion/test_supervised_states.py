"""Given responses as states, and each preset's loss worked out by hand."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from megatron_opdlm.config.schema import ObjectiveConfig
from megatron_opdlm.config.sft_presets import PRESETS, with_preset
from megatron_opdlm.diffusion import supervised_states
from megatron_opdlm.diffusion.random_masks import RandomMasks
from megatron_opdlm.diffusion.states import select_states
from megatron_opdlm.diffusion.supervised_states import mask_responses
from megatron_opdlm.diffusion.trajectory import Trajectory

MASK, END, PAD = 0, 9, 2


def given(response=(7, 6, 8, 1, END), prompt=(3, 5), limit=100, **fields) -> Trajectory:
    numbers = {"prompt_id": 0, "sample_index": 0, "domain": ""} | fields
    return Trajectory.given(
        prompt_ids=prompt, response_ids=response, max_new_tokens=limit, fill_token_id=END, block_size=4, **numbers
    )


def states_of(trajectories, objective, seed=1, step=0):
    return mask_responses(trajectories, objective, mask_token_id=MASK, pad_token_id=PAD, seed=seed, step=step)


def test_a_given_response_is_laid_on_whole_blocks_and_filled_up():
    trajectory = given()
    assert trajectory.terminal_ids_T.tolist() == [3, 5, 7, 6, 8, 1, 9, 9]
    assert trajectory.response_length == 5 and trajectory.response_ids.tolist() == [7, 6, 8, 1, 9]
    assert trajectory.is_given and len(trajectory.log_probs_R) == 6
    assert given(response=[7, 6, 8, 1, 4, END]).terminal_ids_T.tolist() == [3, 5, 7, 6, 8, 1, 4, 9]


def test_a_response_that_is_cut_short_goes_on_to_the_end_of_the_block_and_only_the_limit_counts():
    trajectory = given(response=[7, 6, 8, 1, 4, 4, 4, END], limit=3)
    assert trajectory.terminal_ids_T.tolist() == [3, 5, 7, 6, 8, 1, 4, 4]
    assert trajectory.response_ids.tolist() == [7, 6, 8]


HAND_MADE = {
    "sdar": (2 / 0.4 + 4 / 0.4) / 5,
    "dllm": (2 / 0.4 + 4 / 0.4 + 6 / 0.4) / 6,
    "llada2": (2 + 4 + 6) / 3,
    "fast_dllm_v2": ((2 + 4) + (1 + 3 + 5)) / 5,
}
"""Positions 1, 3 and 5 of six are masked at t = 0.4, and position i costs i + 1. The sixth is fill."""


@pytest.mark.parametrize("preset", PRESETS)
def test_the_loss_of_each_preset_is_the_one_worked_out_by_hand(preset):
    is_masked_MK = torch.tensor([[False, False, False, True], [False, True, False, True]])
    masks = RandomMasks(is_masked_MK, torch.full((2, 4), 0.4, dtype=torch.float64), torch.zeros(2, 4))
    objective = with_preset(ObjectiveConfig(name="sft", preset=preset))
    with mock.patch.object(supervised_states, "draw_masks", return_value=masks) as draw:
        states = states_of([given()], objective)
    level = "block" if preset == "fast_dllm_v2" else "sequence"
    low, high = (0.3, 0.8) if preset == "llada2" else (0.001, 1.0)
    assert draw.call_args.kwargs == {"noise_level": level, "low": low, "high": high, "at_least_one": False}
    weights_BT, divisor = states.loss_terms(objective.normaliser)
    cost_T = torch.tensor([100, 100, 1, 2, 3, 4, 5, 6.0])
    assert (weights_BT * cost_T).sum().item() / divisor == pytest.approx(HAND_MADE[preset])


def test_the_three_normalisers_differ_as_they_say():
    """Two responses, of 5 and of 1 tokens; three positions are masked, and all cost 1."""
    is_masked = [[[0, 0, 1, 1], [0, 0, 0, 0]], [[0, 0, 1, 0]]]
    drawn = [
        RandomMasks(torch.tensor(rows, dtype=torch.bool), torch.ones(len(rows), 4), torch.zeros(len(rows), 4))
        for rows in is_masked
    ]
    with mock.patch.object(supervised_states, "draw_masks", side_effect=drawn):
        states = states_of([given(), given(response=[END])], ObjectiveConfig(name="sft"))
    losses = {}
    for normaliser in ("tokens", "response", "masked"):
        weights_BT, divisor = states.loss_terms(normaliser)
        losses[normaliser] = weights_BT.sum().item() / divisor
    assert losses == pytest.approx({"tokens": 3 / 6, "response": (2 / 5 + 1 / 1) / 2, "masked": 1.0})


def test_the_end_token_is_trained_what_fills_the_block_only_if_asked_for():
    everything = {"noise_low": 1.0, "noise_high": 1.0}
    trained = [
        states_of([given()], ObjectiveConfig(name="sft", train_fill=fill, **everything)) for fill in (False, True)
    ]
    assert trained[0].noisy_ids_BT.tolist() == [[3, 5, 0, 0, 0, 0, 0, 0]]
    assert trained[0].is_trained_BT.int().tolist() == [[0, 0, 1, 1, 1, 1, 1, 0]]
    assert trained[1].is_trained_BT.int().tolist() == [[0, 0, 1, 1, 1, 1, 1, 1]]
    assert [states.num_response_B.item() for states in trained] == [5, 6]


def test_the_complementary_rows_train_each_token_of_the_response_once():
    objective = ObjectiveConfig(name="sft", complementary=True)
    trajectories = [given(prompt_id=i, response=[*range(3, 3 + i), END]) for i in range(1, 6)]
    states = states_of(trajectories, objective)
    assert states.num_rows == 10
    first, second = states.is_trained_BT[::2].int(), states.is_trained_BT[1::2].int()
    assert (first + second).sum(dim=1).tolist() == [i + 1 for i in range(1, 6)] and (first + second).max() == 1
    assert states.clean_ids_BT[::2].equal(states.clean_ids_BT[1::2])


def test_a_row_does_not_depend_on_its_batch_but_on_seed_step_prompt_and_sample():
    objective, others = ObjectiveConfig(name="sft"), [given(prompt_id=i, response=[7] * 40) for i in range(3)]
    alone = states_of([others[1]], objective)
    assert states_of(others, objective).rows([1]).noisy_ids_BT.equal(alone.noisy_ids_BT)
    variants = [
        states_of([others[1]], objective, seed=2),
        states_of([others[1]], objective, step=1),
        states_of([given(prompt_id=4, response=[7] * 40)], objective),
        states_of([given(prompt_id=1, sample_index=1, response=[7] * 40)], objective),
    ]
    assert not any(variant.noisy_ids_BT.equal(alone.noisy_ids_BT) for variant in variants)


def test_rows_columns_and_padding_keep_the_kind_and_the_weights():
    states = states_of([given()], ObjectiveConfig(name="sft", loss_weight="1/t"))
    wider = states.padded_to(16).rows([0]).columns(slice(0, 16)).to("cpu")
    assert type(wider) is type(states) and wider.clean_ids_BT.shape == (1, 16)
    assert wider.loss_terms("tokens")[0][:, :8].equal(states.loss_terms("tokens")[0])
    assert not wider.is_masked_BT[:, 8:].any()


def test_among_rolled_out_sequences_a_given_one_is_masked_at_random_and_has_no_gap_to_measure():
    states = select_states(
        [given(response=[7] * 40)],
        block_size=4,
        mask_token_id=MASK,
        end_token_ids=[END],
        pad_token_id=PAD,
        seed=1,
        step=0,
    )
    assert not states.is_committed_BT.any()
    is_masked_MK = (states.noisy_ids_BT == MASK).view(-1, 4)
    num_masked = is_masked_MK.sum(dim=1).tolist()
    assert min(num_masked) >= 1 and set(num_masked) >= {1, 2, 4}, "its step map would mask whole blocks"
