"""The record of a rolled-out sequence."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
import torch

from megatron_opdlm.diffusion.trajectory import Trajectory, sort_steps


def make_trajectory(**changes) -> Trajectory:
    values = {
        "prompt_id": 12,
        "sample_index": 0,
        "prompt_length": 2,
        "block_size": 4,
        "terminal_ids_T": torch.tensor([3, 5, 7, 6, 8, 4, 9, 1, 2, 2, 2, 2]),
        "step_map_R": torch.tensor([1, 1, 2, 1, 2, 3, 1, 2, 3, 4]),
        "log_probs_R": torch.tensor([-0.1, -0.25, -1.0, -0.125, -0.5, -2.0, -0.3, 0.0, -1e-40, -123.456]),
        "response_length": 5,
        "stop_reason": "end_token",
        "domain": "math",
    }
    return Trajectory(**(values | changes))


def test_only_the_counted_response_tokens_are_the_response():
    assert make_trajectory().response_ids.tolist() == [7, 6, 8, 4, 9]


@pytest.mark.parametrize(
    ("response_length", "num_steps"),
    # Block 0 took 1 step, block 1 took 3, block 2 took 4; a block counts as soon as one of its tokens does.
    [(1, 1), (2, 1), (3, 4), (6, 4), (7, 8), (10, 8)],
)
def test_steps_are_those_of_all_blocks_that_hold_counted_tokens(response_length, num_steps):
    trajectory = make_trajectory(response_length=response_length)
    assert trajectory.num_steps == num_steps
    assert trajectory.tokens_per_step == response_length / num_steps


@pytest.mark.parametrize("prompt_length", [0, 1, 2, 3, 4, 7])
def test_the_step_map_lies_on_the_absolute_grid_for_every_prompt_length(prompt_length):
    num_response = 12 - prompt_length
    step_map = [position % 4 + 1 for position in range(prompt_length, 12)]
    trajectory = make_trajectory(
        prompt_length=prompt_length,
        step_map_R=torch.tensor(step_map),
        log_probs_R=torch.zeros(num_response),
        response_length=num_response,
    )
    flat = [0] * prompt_length + step_map
    expected = [flat[start : start + 4] for start in range(0, 12, 4) if start + 4 > prompt_length]
    assert trajectory.steps_by_block_MK.tolist() == expected


def test_distinct_steps_of_a_block_are_found_in_order():
    sorted_MK, is_first_MK = sort_steps(torch.tensor([[3, 1, 3, 2], [0, 0, 5, 5], [0, 0, 0, 0]]))
    realised = [row[first].tolist() for row, first in zip(sorted_MK, is_first_MK, strict=True)]
    assert realised == [[1, 2, 3], [5], []]


def test_json_gives_every_field_back_bit_for_bit():
    trajectory = make_trajectory(log_probs_R=torch.tensor([-0.1, -1 / 3, -1e-40, -3.4e38, 0.0] * 2))
    line = trajectory.to_json()
    assert "\n" not in line and json.loads(line)["terminal_ids_T"][:3] == [3, 5, 7]
    read = Trajectory.from_json(line)
    for field in fields(Trajectory):
        before, after = getattr(trajectory, field.name), getattr(read, field.name)
        if isinstance(before, torch.Tensor):
            assert before.dtype == after.dtype and torch.equal(before, after), field.name
        else:
            assert before == after, field.name


@pytest.mark.parametrize("line", ["[]", "{}", "not json"])
def test_a_line_that_is_no_trajectory_is_refused(line):
    with pytest.raises(ValueError):
        Trajectory.from_json(line)


def test_a_line_with_an_unknown_or_missing_field_is_refused():
    values = json.loads(make_trajectory().to_json())
    with pytest.raises(ValueError, match="exactly the fields"):
        Trajectory.from_json(json.dumps(values | {"text": "7"}))
    del values["domain"]
    with pytest.raises(ValueError, match="exactly the fields"):
        Trajectory.from_json(json.dumps(values))


@pytest.mark.parametrize(
    "changes",
    [
        {"terminal_ids_T": torch.arange(11)},
        {"terminal_ids_T": torch.arange(12).int()},
        {"terminal_ids_T": torch.arange(12)[None]},
        {"step_map_R": torch.ones(9, dtype=torch.int64)},
        {"step_map_R": torch.zeros(10, dtype=torch.int64)},
        {"log_probs_R": torch.zeros(9)},
        {"log_probs_R": torch.zeros(10, dtype=torch.float64)},
        {"response_length": 0},
        {"response_length": 11},
        {"prompt_length": 3},
        {"block_size": 5},
        {"stop_reason": "tired"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_tensors_that_do_not_fit_together_are_refused(changes):
    with pytest.raises(AssertionError):
        replace(make_trajectory(), **changes)
