"""What three stages tell each other."""

from __future__ import annotations

import time

import pytest
import torch

from tests.ranks import run_on_ranks


def on_stage(rank: int) -> dict:
    import torch.distributed as dist

    from megatron_opdlm.parallel.stage_link import StageLink

    link = StageLink(dist.group.WORLD, torch.device("cpu"))
    if not link.is_first_stage:
        received = link.receive((2,), torch.float32)
    link.send(torch.full((2,), 10.0 + rank))
    if link.is_first_stage:  # what the last stage sends on closes the ring
        received = link.receive((2,), torch.float32)
    first, second = link.share(torch.tensor([rank, 1])), link.share(torch.tensor([rank, 2]))
    shared = [first.wait().tolist(), second.wait().tolist()]
    link.clock.take()
    if link.is_last_stage:
        time.sleep(0.4)
    link.share(torch.zeros(1)).wait()
    return {
        "received": received.tolist(),
        "shared": shared,
        "union": link.union({f"layer {rank}": rank}),
        "idle": link.idle_share(1.0),
        "idle after that": link.idle_share(1.0),
        "ends": (link.is_first_stage, link.is_last_stage),
    }


@pytest.fixture(scope="module")
def stages() -> list[dict]:
    return run_on_ranks(on_stage, 3)


def test_activations_go_to_the_next_stage_and_from_the_last_to_the_first(stages):
    assert [stage["received"] for stage in stages] == [[12.0, 12.0], [10.0, 10.0], [11.0, 11.0]]


def test_what_the_last_stage_shares_reaches_all_in_order(stages):
    assert [stage["shared"] for stage in stages] == [[[2, 1], [2, 2]]] * 3


def test_a_union_has_the_values_of_all_stages(stages):
    assert all(stage["union"] == {"layer 0": 0, "layer 1": 1, "layer 2": 2} for stage in stages)


def test_waiting_for_a_slow_last_stage_is_idle_time_of_the_other_two(stages):
    assert len({stage["idle"] for stage in stages}) == 1
    assert 0.7 / 3 < stages[0]["idle"] < 2.0, "two of three stages wait for 0.4 s of 1 s"
    assert stages[0]["idle after that"] < 0.05, "taken once"


def test_the_ends_of_the_pipeline_know_that_they_are(stages):
    assert [stage["ends"] for stage in stages] == [(True, False), (False, False), (False, True)]
