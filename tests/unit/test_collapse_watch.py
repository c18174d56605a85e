"""Each way in which responses go to pieces is told once, by the name of its metric."""

from __future__ import annotations

import pytest
import torch

from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.observability.collapse_watch import BOUNDS, CollapseWatch

HEALTHY = {
    "rollout/response_length": 200.0,
    "rollout/repetition_rate": 0.1,
    "rollout/end_token_fraction": 0.9,
    "train/student_entropy": 0.6,
}
SICK = {
    "rollout/response_length": 3.0,
    "rollout/repetition_rate": 0.9,
    "rollout/end_token_fraction": 0.1,
    "train/student_entropy": 0.001,
}


def test_every_bound_has_a_case():
    assert SICK.keys() == HEALTHY.keys() == BOUNDS.keys()


@pytest.mark.parametrize("name", SICK)
def test_a_metric_that_goes_bad_is_named_once(caplog, name):
    watch = CollapseWatch()
    for step in range(40):
        watch.write(step, HEALTHY | ({name: SICK[name]} if step >= 10 else {}))
    (message,) = caplog.messages
    assert message.startswith("collapse watch, step ") and f"{name} is " in message


def test_a_healthy_run_is_left_alone(caplog):
    watch = CollapseWatch()
    for step in range(40):
        watch.write(step, HEALTHY | {"rollout/response_length": 100.0 + 10 * step})
    assert caplog.messages == []


def test_one_bad_step_is_no_collapse(caplog):
    watch = CollapseWatch()
    for step in range(20):
        watch.write(step, HEALTHY | (SICK if step == 10 else {}) | {"train/student_entropy": float("nan")})
    assert caplog.messages == []


def test_it_warns_again_after_a_recovery(caplog):
    watch = CollapseWatch()
    for step in range(90):
        watch.write(step, HEALTHY | ({"rollout/repetition_rate": 0.9} if step // 30 != 1 else {}))
    assert len(caplog.messages) == 2


def test_a_resumed_run_goes_on_from_its_records_without_saying_them_again(caplog):
    whole = CollapseWatch()
    steps = [HEALTHY | ({"rollout/end_token_fraction": 0.1} if step >= 14 else {}) for step in range(30)]
    for step, metrics in enumerate(steps):
        whole.write(step, metrics)
    expected = caplog.messages
    resumed = CollapseWatch(steps[:15])
    for step, metrics in enumerate(steps[15:], start=15):
        resumed.write(step, metrics)
    assert expected == caplog.messages[len(expected) :] != []


@pytest.mark.parametrize(
    ("response", "rate"),
    [([1, 2, 3, 1, 2, 3, 1, 2, 3], 0.5), ([7, 7, 7, 7, 7], 0.5), ([1, 2, 3, 4, 5], 0.0), ([1], 0.0)],
)
def test_the_repetition_rate_is_the_share_of_runs_of_four_that_came_before(response, rate):
    given = {"prompt_id": 0, "sample_index": 0, "prompt_ids": [5], "max_new_tokens": 99, "domain": ""}
    trajectory = Trajectory.given(response_ids=response, fill_token_id=0, block_size=4, **given)
    assert trajectory.repetition_rate == pytest.approx(rate)
    assert torch.equal(trajectory.response_ids, torch.tensor(response))
