"""The simulated rollout against one that counts every forward, and the planner's balance against the trainer's."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_opdlm.planning.decoding import row_imbalance, simulate


def by_counting(lengths: list[int], num_slots: int, seconds_per_forward) -> float:
    """One rank, forward after forward."""
    waiting, active, clock = list(lengths), [], 0.0
    while waiting or active:
        while waiting and len(active) < num_slots:
            active.append(waiting.pop(0))
        clock += seconds_per_forward(len(active))
        active = [left - 1 for left in active if left > 1]
    return clock


def one_second(active: int) -> float:
    return 1.0


def test_the_longest_sequence_and_its_company_decide_the_time_worked_out_by_hand():
    finish = simulate([5, 2, 3], num_ranks=1, num_slots=2, seconds_per_forward=float, tokens_per_step=1.0)
    # two forwards of two, three more of two, none left
    assert finish.seconds == 2 * 2 + 3 * 2 and finish.num_forwards == [5] and finish.mean_active == 2.0


def test_tokens_of_a_step_shorten_it():
    finish = simulate([30], num_ranks=1, num_slots=1, seconds_per_forward=one_second, tokens_per_step=1.5)
    assert finish.seconds == 20


@pytest.mark.parametrize("seed", range(5))
def test_a_rank_alone_takes_as_long_as_counted(seed):
    generator = random.Random(seed)
    lengths = [generator.randint(1, 30) for _ in range(17)]

    def seconds(active: int) -> float:
        return 1.0 + 0.25 * active

    finish = simulate(lengths, num_ranks=1, num_slots=4, seconds_per_forward=seconds, tokens_per_step=1.0)
    assert finish.seconds == pytest.approx(by_counting(lengths, 4, seconds))


def test_sharing_leaves_ranks_less_to_wait_for_and_a_static_batch_more():
    lengths = [40, 1, 30, 1, 20, 1, 10, 1]  # the first rank's own are the long ones
    seconds = {
        sharing: simulate(
            lengths, num_ranks=2, num_slots=1, seconds_per_forward=one_second, tokens_per_step=1.0, sharing=sharing
        ).seconds
        for sharing in ("shared", "own", "static")
    }
    assert seconds == {"shared": 52, "own": 100, "static": 100}
    batch = simulate(
        [10, 1, 10, 1], num_ranks=1, num_slots=2, seconds_per_forward=one_second, tokens_per_step=1.0, sharing="static"
    )
    assert batch.seconds == 20


def test_all_wait_for_a_rank_that_is_late():
    finish = simulate([10, 5], num_ranks=2, num_slots=1, seconds_per_forward=one_second, tokens_per_step=1.0)
    assert finish.seconds_by_rank == [10, 5] and finish.idle_share == pytest.approx(0.25)


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize("is_balanced", [True, False])
def test_the_busiest_rank_is_the_one_that_the_trainer_would_have(micro_batch_size, is_balanced):
    from megatron_opdlm.training.balance import assign_rows, tokens_by_rank

    generator = random.Random(0)
    lengths = [generator.randint(5, 90) for _ in range(16)]
    busiest, means = [], []
    for begin in (0, 8):
        lengths_WB = torch.tensor(lengths[begin : begin + 8]).view(4, 2).T.contiguous()
        home_WB = torch.arange(2)[:, None].expand(2, 4)
        ranks_WB = assign_rows(lengths_WB, micro_batch_size, 8) if is_balanced else home_WB
        busiest.append(int(tokens_by_rank(lengths_WB, ranks_WB, micro_batch_size, 8).max()))
        means.append(sum(-(-length // 8) * 8 for length in lengths[begin : begin + 8]) / 2)
    imbalance = row_imbalance(
        lengths,
        num_ranks=2,
        global_batch_size=8,
        micro_batch_size=micro_batch_size,
        pad_to_multiple=8,
        is_balanced=is_balanced,
    )
    assert imbalance == pytest.approx(sum(busiest) / sum(means))
