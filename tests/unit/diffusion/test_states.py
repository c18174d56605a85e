"""On-policy states against a hand-worked example and a brute-force reading of the method."""

from __future__ import annotations

import time
from collections import Counter

import pytest
import torch

from megatron_opdlm.diffusion.randomness import sequence_generator
from megatron_opdlm.diffusion.state_selections import draw_realised_steps
from megatron_opdlm.diffusion.states import OnPolicyStates, select_states
from megatron_opdlm.diffusion.trajectory import Trajectory

MASK, PAD, END, OTHER_END = 99, 98, 90, 91


def make_trajectory(terminal_ids, step_map, response_length, *, block_size=4, prompt_id=0, sample_index=0):
    return Trajectory(
        prompt_id=prompt_id,
        sample_index=sample_index,
        prompt_length=len(terminal_ids) - len(step_map),
        block_size=block_size,
        terminal_ids_T=torch.tensor(terminal_ids),
        step_map_R=torch.tensor(step_map),
        log_probs_R=-torch.arange(1, len(step_map) + 1).float() / 8,
        response_length=response_length,
        stop_reason="end_token" if END in terminal_ids else "length",
        domain="",
    )


def select(trajectories, *, block_size=4, seed=1, step=0, train_on_end_token=False) -> OnPolicyStates:
    return select_states(
        trajectories,
        block_size=block_size,
        mask_token_id=MASK,
        end_token_ids=(END, OTHER_END),
        pad_token_id=PAD,
        seed=seed,
        step=step,
        train_on_end_token=train_on_end_token,
    )


def random_trajectory(generator, *, block_size, prompt_length, num_blocks, prompt_id):
    """A response as a decoder writes it: each block's positions are committed in random steps without gaps."""
    num_tokens = (prompt_length // block_size + num_blocks) * block_size
    ids = torch.randint(0, 80, (num_tokens,), generator=generator).tolist()
    step_map = []
    for block in range(prompt_length // block_size, num_tokens // block_size):
        size = min(block_size, (block + 1) * block_size - prompt_length)
        raw = torch.randint(0, size, (size,), generator=generator).tolist()
        step_map += [sorted(set(raw)).index(step) + 1 for step in raw]
    response_length = int(torch.randint(1, num_tokens - prompt_length + 1, (), generator=generator))
    if int(torch.randint(0, 2, (), generator=generator)):
        ids[prompt_length + response_length - 1] = END
    if prompt_length:
        ids[0] = END
    return make_trajectory(ids, step_map, response_length, block_size=block_size, prompt_id=prompt_id)


@pytest.mark.parametrize(
    ("prompt_length", "noisy", "trained"),
    # One step per block, so there is nothing to draw: every response position is masked. The end token is at 6.
    [
        (0, [MASK] * 8, [0, 1, 2, 3, 4, 5]),
        (1, [10] + [MASK] * 7, [1, 2, 3, 4, 5]),
        (2, [10, 11] + [MASK] * 6, [2, 3, 4, 5]),
        (3, [10, 11, 12] + [MASK] * 5, [3, 4, 5]),
        (4, [10, 11, 12, 13] + [MASK] * 4, [4, 5]),
        (5, [10, 11, 12, 13, 14] + [MASK] * 3, [5]),
    ],
)
def test_defect_3_states_lie_on_the_absolute_grid_for_every_prompt_length(prompt_length, noisy, trained):
    terminal = [10, 11, 12, 13, 14, 15, END, 17]
    states = select([make_trajectory(terminal, [1] * (8 - prompt_length), 7 - prompt_length)])
    assert states.clean_ids_BT.tolist() == [terminal]
    assert states.noisy_ids_BT.tolist() == [noisy]
    assert states.is_trained_BT[0].nonzero()[:, 0].tolist() == trained
    assert states.lengths_B.tolist() == [8]


def test_defect_3_positions_of_one_absolute_block_share_one_drawn_step():
    # Grid of the response: [10..13] [14..17]; absolute grid: [.., .., 10, 11] [12..15] [16, 17, ..].
    trajectory = make_trajectory([1, 2, *list(range(10, 20))], [1, 2, 1, 2, 3, 4, 4, 3, 2, 1], 10)
    seen = set()
    for step in range(200):
        is_masked = select([trajectory], step=step).noisy_ids_BT[0] == MASK
        seen.add((tuple(is_masked[:4].tolist()), tuple(is_masked[4:8].tolist()), tuple(is_masked[8:].tolist())))
    first, second, third = ({blocks[i] for blocks in seen} for i in range(3))
    assert first == {(False, False, True, True), (False, False, False, True)}
    assert second == {(True,) * 4, (False, True, True, True), (False, False, True, True), (False, False, False, True)}
    assert third == {(True,) * 4, (True, True, True, False), (True, True, False, False), (True, False, False, False)}
    # Every combination occurs: blocks are drawn independently of each other.
    assert len(seen) == 2 * 4 * 4


def test_hand_worked_states_of_a_block_decoded_in_three_steps():
    trajectory = make_trajectory([1, 2, 3, 4, 20, 21, 22, 23], [2, 1, 3, 2], 4)
    expected = {
        1: ([MASK, MASK, MASK, MASK], [1, 1, 1, 1], [0, 1, 0, 0]),
        2: ([MASK, 21, MASK, MASK], [1, 0, 1, 1], [1, 0, 0, 1]),
        3: ([20, 21, MASK, 23], [0, 0, 1, 0], [0, 0, 1, 0]),
    }
    seen = set()
    for step in range(40):
        states = select([trajectory], step=step)
        row = tuple(tensor[0, 4:].int().tolist() for tensor in (states.noisy_ids_BT, states.is_trained_BT))
        drawn = next(r for r, (noisy, _, _) in expected.items() if row[0] == noisy)
        assert row == expected[drawn][:2]
        assert states.is_committed_BT[0].int().tolist() == [0, 0, 0, 0, *expected[drawn][2]]
        assert states.log_probs_BT[0].tolist() == [0, 0, 0, 0, -0.125, -0.25, -0.375, -0.5]
        seen.add(drawn)
    assert seen == {1, 2, 3}


def test_states_match_a_brute_force_reading_of_the_step_map():
    generator = torch.Generator().manual_seed(0)
    for block_size in (1, 2, 4, 5):
        trajectories = [
            random_trajectory(
                generator, block_size=block_size, prompt_length=length, num_blocks=1 + length % 3, prompt_id=length
            )
            for length in range(0, 11)
        ]
        states = select(trajectories, block_size=block_size)
        for row, trajectory in enumerate(trajectories):
            assert_row_is_realised(states, row, trajectory, block_size)


def assert_row_is_realised(states, row, trajectory, block_size):
    """The row shows, block by block, what the step map says was visible at one of the block's steps."""
    num_prompt, ids = trajectory.prompt_length, trajectory.terminal_ids_T.tolist()
    steps = [None] * num_prompt + trajectory.step_map_R.tolist()
    noisy, committed = states.noisy_ids_BT[row].tolist(), states.is_committed_BT[row].tolist()
    for start in range(0, len(ids), block_size):
        block = range(start, start + block_size)
        realised = {steps[i] for i in block if steps[i] is not None}
        candidates = [
            r
            for r in sorted(realised) or [0]
            if all(noisy[i] == (MASK if steps[i] is not None and steps[i] >= r else ids[i]) for i in block)
        ]
        assert len(candidates) == 1, f"block at {start} shows a state that was never visited"
        for i in block:
            assert committed[i] == (steps[i] is not None and steps[i] == candidates[0])
    response = ids[num_prompt:]
    end = response.index(END) if END in response else len(response)
    for i in range(states.clean_ids_BT.shape[1]):
        is_counted = num_prompt <= i < num_prompt + min(end, trajectory.response_length)
        assert states.is_trained_BT[row, i] == (is_counted and noisy[i] == MASK)
    assert noisy[len(ids) :] == states.clean_ids_BT[row, len(ids) :].tolist() == [PAD] * (len(noisy) - len(ids))


def test_each_realised_step_is_drawn_equally_often():
    steps_MK = torch.tensor([[1, 2, 3, 2], [0, 0, 1, 1], [0, 2, 1, 2], [4, 3, 2, 1]]).repeat(1000, 1)
    drawn = draw_realised_steps(steps_MK, sequence_generator(1, 0, 0, 0, purpose="states")).view(1000, 4)
    counts = [Counter(drawn[:, row].tolist()) for row in range(4)]
    assert [set(count) for count in counts] == [{1, 2, 3}, {1}, {1, 2}, {1, 2, 3, 4}]
    for count in counts:
        # Over four standard deviations of a binomial count on either side.
        assert all(abs(times - 1000 / len(count)) < 65 for times in count.values())


def test_a_step_that_no_position_was_committed_in_is_never_drawn():
    steps_MK = torch.tensor([[2, 5, 5, 2]]).repeat(100, 1)
    drawn = draw_realised_steps(steps_MK, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {2, 5}


def test_defect_2_padding_of_short_responses_is_never_trained():
    short = make_trajectory([1, 2, 10, END], [1, 1], 2, prompt_id=0)
    long = make_trajectory(list(range(12)), [1] * 10, 10, prompt_id=1)
    states = select([short, long])
    assert states.lengths_B.tolist() == [4, 12]
    assert states.is_trained_BT[0].nonzero()[:, 0].tolist() == [2]
    assert states.is_trained_BT[1].nonzero()[:, 0].tolist() == list(range(2, 12))
    for padding_is in (states.is_committed_BT[0, 4:], states.log_probs_BT[0, 4:]):
        assert not padding_is.any()
    assert states.clean_ids_BT[0, 4:].tolist() == states.noisy_ids_BT[0, 4:].tolist() == [PAD] * 8


def test_defect_2_a_row_weighs_the_same_however_much_padding_it_has():
    short = make_trajectory([1, 2, 10, END], [1, 1], 2, prompt_id=0)
    long = make_trajectory(list(range(12)), [1] * 10, 10, prompt_id=1)
    assert select([short, long]).loss_weights_BT("sequence").sum(dim=1).tolist() == pytest.approx([1.0, 1.0])
    alone = select([short]).padded_to(64)
    for reduction in ("sequence", "token"):
        assert alone.loss_weights_BT(reduction)[0].nonzero()[:, 0].tolist() == [2]
    assert (alone.loss_count("sequence"), alone.loss_count("token")) == (1, 1)


def test_neither_the_end_token_nor_anything_after_it_is_trained():
    states = select([make_trajectory([1, 2, 3, 4, 10, END, 12, END], [1, 1, 1, 1], 2)])
    assert states.is_trained_BT[0].nonzero()[:, 0].tolist() == [4]
    assert states.noisy_ids_BT[0, 4:].tolist() == [MASK] * 4


def test_the_first_end_token_is_trained_where_that_is_asked_for_and_it_is_masked():
    ends_in_block = make_trajectory([1, 2, 3, 4, 10, END, 12, END], [1, 1, 1, 1], 2)
    states = select([ends_in_block], train_on_end_token=True)
    assert states.is_trained_BT[0].nonzero()[:, 0].tolist() == [4, 5]
    # the end token was committed first: whenever another token is drawn to be masked, it may be visible
    visible = make_trajectory([1, 2, 3, 4, 10, END, 12, END], [2, 1, 2, 2], 2)
    seen = set()
    for seed in range(20):
        states = select([visible], seed=seed, train_on_end_token=True)
        trained = states.is_trained_BT[0].nonzero()[:, 0].tolist()
        assert trained == ([4, 5] if states.noisy_ids_BT[0, 5] == MASK else [4])
        seen.add(len(trained))
    assert seen == {1, 2}


def test_an_end_token_beyond_the_length_limit_is_never_trained():
    states = select([make_trajectory([1, 2, 3, 4, 10, 11, 12, END], [1, 1, 1, 1], 3)], train_on_end_token=True)
    assert states.is_trained_BT[0].nonzero()[:, 0].tolist() == [4, 5, 6]


def test_every_end_token_ends_the_trained_positions():
    states = select([make_trajectory([1, 2, 3, 4, 10, 11, OTHER_END, 12], [1, 1, 1, 1], 3)])
    assert states.is_trained_BT[0].nonzero()[:, 0].tolist() == [4, 5]


def test_an_end_token_in_the_prompt_ends_nothing():
    states = select([make_trajectory([1, END, 3, END, 10, 11, 12, 13], [1, 1, 1, 1], 4)])
    assert states.is_trained_BT[0].nonzero()[:, 0].tolist() == [4, 5, 6, 7]


def test_tokens_beyond_the_length_limit_are_not_trained():
    states = select([make_trajectory([1, 2, 3, 4, 10, 11, 12, 13], [1, 1, 1, 1], 3)])
    assert states.is_trained_BT[0].nonzero()[:, 0].tolist() == [4, 5, 6]


def test_a_rows_state_does_not_depend_on_its_batch():
    generator = torch.Generator().manual_seed(1)
    trajectories = [
        random_trajectory(generator, block_size=4, prompt_length=5, num_blocks=1 + i, prompt_id=i) for i in range(4)
    ]
    together = select(trajectories)
    for row, trajectory in enumerate(trajectories):
        alone, length = select([trajectory]), len(trajectory.terminal_ids_T)
        assert torch.equal(alone.noisy_ids_BT[0], together.noisy_ids_BT[row, :length])


def test_seed_step_prompt_and_sample_each_lead_to_other_states():
    ids, steps = list(range(64)), [1, 2, 3, 4] * 16
    base = select([make_trajectory(ids, steps, 64)]).noisy_ids_BT
    assert torch.equal(base, select([make_trajectory(ids, steps, 64)]).noisy_ids_BT)
    others = [
        select([make_trajectory(ids, steps, 64)], seed=2),
        select([make_trajectory(ids, steps, 64)], step=1),
        select([make_trajectory(ids, steps, 64, prompt_id=1)]),
        select([make_trajectory(ids, steps, 64, sample_index=1)]),
    ]
    assert all(not torch.equal(base, states.noisy_ids_BT) for states in others)


def test_a_trajectory_from_another_grid_is_refused():
    with pytest.raises(AssertionError, match="decoded in blocks of 4, not 2"):
        select([make_trajectory([1, 2, 3, 4], [1, 1], 2)], block_size=2)


def three_rows() -> OnPolicyStates:
    """Rows of 4, 8 and 12 tokens, with 2, 0 and 10 trained positions."""
    return select(
        [
            make_trajectory([1, 2, 10, 11], [1, 1], 2, prompt_id=0),
            make_trajectory([1, 2, 3, 4, END, 10, 11, 12], [1, 1, 1, 1], 1, prompt_id=1),
            make_trajectory(list(range(12)), [1] * 10, 10, prompt_id=2),
        ]
    )


def test_weights_sum_up_to_the_mean_over_rows_of_the_mean_over_trained_positions():
    states = three_rows()
    assert states.num_trained_B.tolist() == [2, 0, 10]
    divergence_BT = torch.rand(3, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means = [divergence_BT[row][states.is_trained_BT[row]].mean() for row in (0, 2)]
    weights_BT = states.loss_weights_BT("sequence")
    assert weights_BT.dtype == torch.float32
    total, count = float((weights_BT * divergence_BT).sum()), states.loss_count("sequence")
    assert total / count == pytest.approx(float(sum(means)) / 3, rel=1e-6)
    assert not weights_BT[1].any()


def test_weights_by_token_give_the_mean_over_all_trained_positions():
    states = three_rows()
    divergence_BT = torch.rand(3, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total, count = float((states.loss_weights_BT("token") * divergence_BT).sum()), states.loss_count("token")
    assert count == 12
    assert total / count == pytest.approx(float(divergence_BT[states.is_trained_BT].mean()), rel=1e-6)


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_weights_and_counts_are_the_same_for_every_split_into_micro_batches(reduction):
    states = three_rows()
    whole, rows = states.loss_weights_BT(reduction), [states.rows([row]) for row in range(3)]
    assert torch.equal(torch.cat([row.loss_weights_BT(reduction) for row in rows]), whole)
    assert sum(row.loss_count(reduction) for row in rows) == states.loss_count(reduction)


def test_parts_of_the_positions_add_up_to_the_trained_positions_of_the_rows():
    states = three_rows()
    parts = [states.columns(slice(0, 8)), states.columns(slice(8, 12))]
    assert [part.loss_count("token") for part in parts] == [8, 4]


@pytest.mark.parametrize("index", [slice(0, 2), [1, 0], torch.tensor([2])], ids=["slice", "list", "tensor"])
def test_rows_are_picked_in_every_field(index):
    states = three_rows()
    picked = states.rows(index)
    assert picked.num_rows == len(states.lengths_B[index])
    for name, tensor in vars(states).items():
        assert torch.equal(getattr(picked, name), tensor[index])


@pytest.mark.parametrize(("index", "multiple", "width"), [([0], 4, 4), ([0, 1], 4, 8), ([0, 1], 16, 16), ([2], 8, 16)])
def test_a_micro_batch_is_as_wide_as_its_own_longest_row_needs(index, multiple, width):
    states = three_rows().rows(index)
    padded = states.padded_to(multiple)
    for name, tensor in vars(states).items():
        after = getattr(padded, name)
        assert after.dtype == tensor.dtype
        if name.endswith("_B"):
            assert torch.equal(after, tensor)
            continue
        assert after.shape == (len(index), width)
        for row, length in enumerate(states.lengths_B.tolist()):
            assert torch.equal(after[row, :length], tensor[row, :length])
    assert torch.equal(padded.num_trained_B, states.num_trained_B)


def test_every_field_moves_to_the_device():
    moved = three_rows().to("meta")
    assert {tensor.device.type for tensor in vars(moved).values()} == {"meta"}


def test_fields_of_different_shapes_are_refused():
    states = three_rows()
    with pytest.raises(AssertionError, match="lengths_B"):
        OnPolicyStates(**(vars(states) | {"lengths_B": torch.ones(2)}))
    with pytest.raises(AssertionError, match="is_trained_BT"):
        OnPolicyStates(**(vars(states) | {"is_trained_BT": states.is_trained_BT[:, :4]}))


def test_128_rows_of_1000_blocks_are_selected_in_a_moment():
    step_map = [3, 1, 4, 2] * 1000
    trajectories = [make_trajectory(list(range(4000)), step_map, 4000, prompt_id=i) for i in range(128)]
    seconds = []
    for _ in range(3):
        start = time.process_time()
        select(trajectories)
        seconds.append(time.process_time() - start)
    # Processor time, so that a busy machine does not count: 0.08 s. A loop over tokens would take seconds.
    assert min(seconds) < 0.2, seconds
