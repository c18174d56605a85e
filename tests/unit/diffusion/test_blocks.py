"""The absolute grid, against literal values and counting."""

from __future__ import annotations

import doctest

import pytest
import torch

from megatron_opdlm.diffusion import blocks, randomness, remasking, states, trajectory
from megatron_opdlm.diffusion.blocks import (
    block_index,
    block_start,
    commit_schedule,
    num_committed_at_step,
    round_up_to_grid,
)


@pytest.mark.parametrize("module", [blocks, remasking, randomness, trajectory, states], ids=lambda m: m.__name__)
def test_examples_in_the_docstrings_are_true(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


def test_positions_fall_into_the_blocks_they_are_counted_into():
    positions = list(range(10))
    assert [block_index(p, 4) for p in positions] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert [block_start(p, 4) for p in positions] == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]
    assert [round_up_to_grid(p, 4) for p in positions] == [0, 4, 4, 4, 4, 8, 8, 8, 8, 12]


def test_tensors_of_positions_give_the_same_as_single_positions():
    positions = torch.arange(10)
    for function in (block_index, block_start, round_up_to_grid):
        assert function(positions, 3).tolist() == [function(p, 3) for p in range(10)]


@pytest.mark.parametrize(
    ("block_size", "num_steps", "expected"),
    [(4, 4, [1, 1, 1, 1]), (4, 3, [2, 1, 1]), (4, 1, [4]), (8, 3, [3, 3, 2]), (5, 2, [3, 2]), (1, 1, [1])],
)
def test_steps_of_a_block_commit_n_of_s_positions(block_size, num_steps, expected):
    assert [num_committed_at_step(s, block_size, num_steps) for s in range(num_steps)] == expected
    schedule_S = commit_schedule(block_size, num_steps)
    assert schedule_S.tolist() == expected and schedule_S.dtype == torch.int64
    assert sum(expected) == block_size


@pytest.mark.parametrize("step", [-1, 3])
def test_a_step_outside_the_block_is_refused(step):
    with pytest.raises(AssertionError):
        num_committed_at_step(step, 4, 3)
