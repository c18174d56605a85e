"""Every selection of states against rows worked out by hand and a literal reading of the step map."""

from __future__ import annotations

import doctest

import pytest
import torch

from megatron_opdlm.config.schema import StatesConfig
from megatron_opdlm.diffusion import state_selections
from megatron_opdlm.diffusion.state_selections import rows_per_trajectory, select_masks
from megatron_opdlm.diffusion.states import OnPolicyStates, select_states
from tests.unit.diffusion.test_states import END, MASK, PAD, make_trajectory, random_trajectory

ALL_STEPS = StatesConfig(selection="all_steps")
RANDOM_MASK = StatesConfig(selection="random_mask")


def select(trajectories, settings, *, num_steps=4, block_size=4, seed=1, step=0) -> OnPolicyStates:
    return select_states(
        trajectories,
        settings,
        num_rows=rows_per_trajectory(settings, num_steps),
        block_size=block_size,
        mask_token_id=MASK,
        end_token_ids=(END,),
        pad_token_id=PAD,
        seed=seed,
        step=step,
    )


def masks_of(steps, settings, num_rows=4):
    return select_masks(torch.tensor(steps), settings, num_rows=num_rows, generator=torch.Generator().manual_seed(0))


def test_example_of_the_module_holds():
    result = doctest.testmod(state_selections)
    assert result.attempted and not result.failed


def test_all_steps_of_two_blocks_worked_out_by_hand():
    # Block 0: prompt, prompt, then two tokens in one step. Block 1: steps 2, 1, 3, 2; its last token is the end.
    states = select([make_trajectory([1, 2, 10, 11, 12, 13, 14, END], [1, 1, 2, 1, 3, 2], 6)], ALL_STEPS)
    assert states.noisy_ids_BT.tolist() == [
        [1, 2, MASK, MASK, MASK, MASK, MASK, MASK],
        [1, 2, 10, 11, MASK, 13, MASK, MASK],
        [1, 2, 10, 11, 12, 13, MASK, END],
        [1, 2, 10, 11, PAD, PAD, PAD, PAD],  # no state left: the first block, with nothing to learn
    ]
    assert states.lengths_B.tolist() == [8, 8, 8, 4]
    assert [row.nonzero()[:, 0].tolist() for row in states.is_trained_BT] == [[2, 3, 4, 5, 6], [4, 6], [6], []]
    assert [row.nonzero()[:, 0].tolist() for row in states.is_committed_BT] == [[2, 3, 5], [4, 7], [6], []]
    assert states.is_first_row_B.tolist() == [True, False, False, False]
    assert states.num_trained_by_trajectory_B.tolist() == [8] * 4
    assert states.clean_ids_BT[1].tolist() == [1, 2, 10, 11, 12, 13, 14, END]


def test_shrink_merges_neighbouring_steps_into_the_state_of_the_first():
    steps = [[3, 1, 2, 4]]
    masks = masks_of(steps, StatesConfig(selection="all_steps", shrink=2), num_rows=2)
    assert masks.is_masked_RMK[:, 0].int().tolist() == [[1, 1, 1, 1], [1, 0, 0, 1]]
    assert masks.is_committed_RMK[:, 0].int().tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    masks = masks_of(steps, StatesConfig(selection="all_steps", shrink=3), num_rows=2)
    assert masks.is_masked_RMK[:, 0].int().tolist() == [[1, 1, 1, 1], [0, 0, 0, 1]]
    assert masks.is_committed_RMK[:, 0].int().tolist() == [[0, 1, 0, 0], [0, 0, 0, 1]]


def test_steps_that_committed_nothing_are_no_rows():
    masks = masks_of([[2, 5, 5, 2]], ALL_STEPS)
    assert masks.is_masked_RMK[:, 0].int().tolist() == [[1, 1, 1, 1], [0, 1, 1, 0], [0] * 4, [0] * 4]


@pytest.mark.parametrize("shrink", [1, 2, 3])
def test_all_steps_match_a_literal_reading_of_the_step_map(shrink):
    generator, settings = torch.Generator().manual_seed(shrink), StatesConfig(selection="all_steps", shrink=shrink)
    trajectories = [
        random_trajectory(generator, block_size=4, prompt_length=length, num_blocks=1 + length % 3, prompt_id=length)
        for length in range(8)
    ]
    num_rows = -(-4 // shrink)
    states = select(trajectories, settings)
    assert states.num_rows == 8 * num_rows
    for index, trajectory in enumerate(trajectories):
        ids, num_prompt = trajectory.terminal_ids_T.tolist(), trajectory.prompt_length
        steps = [0] * num_prompt + trajectory.step_map_R.tolist()
        for row in range(num_rows):
            noisy, committed = list(ids), [False] * len(ids)
            for start in range(0, len(ids), 4):
                realised = sorted({steps[i] for i in range(start, start + 4)} - {0})
                first_of_group = realised[row * shrink] if row * shrink < len(realised) else 99
                for i in range(start, start + 4):
                    noisy[i] = MASK if steps[i] >= first_of_group else ids[i]
                    committed[i] = steps[i] == first_of_group
            end = ids.index(END, num_prompt) if END in ids[num_prompt:] else len(ids)
            limit = min(end, num_prompt + trajectory.response_length)
            trained = [num_prompt <= i < limit and noisy[i] == MASK for i in range(len(ids))]
            length = len(ids) if row == 0 else max([i // 4 * 4 + 4 for i in range(len(ids)) if trained[i]], default=4)
            actual = states.rows([index * num_rows + row]).padded_to(4)
            assert actual.lengths_B.tolist() == [length]
            assert actual.noisy_ids_BT[0].tolist() == noisy[:length]
            assert actual.is_committed_BT[0].tolist() == committed[:length]
            assert actual.is_trained_BT[0].tolist() == trained[:length]


def test_each_trained_position_of_a_trajectory_weighs_the_same_in_all_its_rows():
    one = make_trajectory([1, 2, 3, 4, 10, 11, 12, 13], [1, 2, 3, 4], 4, prompt_id=0)
    other = make_trajectory([1, 2, 3, 4, 10, 11, 12, 13], [1, 1, 1, 1], 4, prompt_id=1)
    states = select([one, other], ALL_STEPS)
    assert states.num_trained_B.tolist() == [4, 3, 2, 1, 4, 0, 0, 0]
    assert states.num_trajectories == 2
    weights = states.loss_weights_BT("sequence")
    assert weights[:4][states.is_trained_BT[:4]].tolist() == pytest.approx([1 / 10] * 10)
    assert weights[4:][states.is_trained_BT[4:]].tolist() == pytest.approx([1 / 4] * 4)
    split = [states.rows([row]).padded_to(4) for row in range(8)]
    assert float(sum(row.loss_weights_BT("sequence").sum() for row in split)) == pytest.approx(2.0)
    assert sum(row.loss_count("sequence") for row in split) == states.loss_count("sequence") == 2
    assert sum(row.loss_count("token") for row in split) == states.loss_count("token") == 14


def test_a_random_mask_hides_at_least_one_response_position_of_each_block_and_no_prompt():
    for step in range(50):
        states = select(
            [make_trajectory([1, 2, 3, *range(10, 19)], [1, 2, 1, 4, 1, 2, 3, 1, 1], 9)], RANDOM_MASK, step=step
        )
        is_masked = states.noisy_ids_BT[0] == MASK
        assert not is_masked[:3].any() and bool(is_masked[3])
        assert is_masked.view(3, 4).any(dim=1).all()
        assert torch.equal(states.is_trained_BT[0], is_masked)
        assert not states.is_committed_BT.any()


def test_a_random_mask_hides_k_of_four_positions_as_often_as_a_uniform_noise_level_says():
    masks = masks_of([[1, 1, 1, 1]] * 4000, RANDOM_MASK, num_rows=1)
    counts = torch.bincount(masks.is_masked_RMK[0].sum(dim=1), minlength=5).tolist()
    # With t uniform, 0 to 4 masked positions are equally likely, 800 times each; none becomes one.
    assert counts[0] == 0
    for count, expected in zip(counts[1:], (1600, 800, 800, 800), strict=True):
        assert abs(count - expected) < 130, "four standard deviations"
    by_position = masks.is_masked_RMK[0].float().mean(dim=0)
    assert (by_position - 0.55).abs().max() < 0.04, "half, and a quarter of a fifth"


def test_a_random_mask_does_not_look_at_the_order_of_the_steps():
    ids = list(range(32))
    masks = [select([make_trajectory(ids, steps, 32)], RANDOM_MASK) for steps in ([1] * 32, [1, 2, 3, 4] * 8)]
    assert torch.equal(masks[0].noisy_ids_BT, masks[1].noisy_ids_BT)
    other = select([make_trajectory(ids, [1] * 32, 32)], RANDOM_MASK, step=1)
    assert not torch.equal(masks[0].noisy_ids_BT, other.noisy_ids_BT)


def test_the_number_of_rows_is_that_of_the_groups_of_steps():
    assert [rows_per_trajectory(StatesConfig(selection="all_steps", shrink=k), 4) for k in range(1, 6)] == [
        4,
        2,
        2,
        1,
        1,
    ]
    assert rows_per_trajectory(StatesConfig(), 4) == rows_per_trajectory(RANDOM_MASK, 4) == 1
    with pytest.raises(AssertionError, match="3 rows of a trajectory, with room for 2"):
        masks_of([[1, 2, 3, 3]], ALL_STEPS, num_rows=2)
