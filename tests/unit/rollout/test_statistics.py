"""Shares of several ranks are shares of all that they did, not means of shares."""

from __future__ import annotations

import pytest
import torch

from megatron_opdlm.rollout.statistics import RolloutStatistics


def statistics(offered: list[int], committed: list[int], **counts) -> RolloutStatistics:
    return RolloutStatistics(offered_K=torch.tensor(offered), committed_K=torch.tensor(committed), **counts)


def test_a_rank_reports_its_shares_and_nothing_of_what_did_not_happen():
    counts = {
        "num_forwards": 6,
        "num_replays": 3,
        "num_tokens": 4,
        "seconds": 1.5,
        "idle_seconds": 0.5,
        "num_pages": 8,
        "peak_pages": 2,
    }
    reported = statistics([8, 0], [2, 0], num_pairs=10, num_hidden_pairs=1, num_preemptions=3, **counts).metrics()
    assert reported.values() == {
        "rollout/acceptance_at_0": 0.25,
        "rollout/cache_use": 0.25,
        "rollout/forwards_per_token": 1.5,
        "rollout/idle_share": 0.25,
        "rollout/padding_share": 0.1,
        "rollout/preemptions": 3,
        "rollout/replay_share": 0.5,
        "rollout/tokens_per_second_per_rank": 2.0,
    }


def test_ranks_are_weighted_by_what_they_did():
    busy = statistics([9], [3], num_forwards=10, num_tokens=30, seconds=4.0)
    idle = statistics([1], [1], num_forwards=10, num_tokens=10, seconds=1.0, idle_seconds=3.0, pipeline_bubble=0.5)
    together = busy.metrics()
    together.merge([idle.metrics()])
    values = together.values()
    assert values["rollout/acceptance_at_0"] == pytest.approx(4 / 10)
    assert values["rollout/forwards_per_token"] == pytest.approx(20 / 40)
    assert values["rollout/tokens_per_second_per_rank"] == pytest.approx(40 / 8)
    assert values["rollout/idle_share"] == pytest.approx(3 / 8)
    assert values["rollout/pipeline_bubble"] == 0.5


def test_a_rank_that_decoded_nothing_changes_no_share():
    busy, nothing = statistics([4], [1], num_forwards=3, num_tokens=3), RolloutStatistics.of_blocks(1)
    together = nothing.metrics()
    together.merge([busy.metrics()])
    assert together.values() == busy.metrics().values()
