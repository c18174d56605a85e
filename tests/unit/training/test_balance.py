"""Dealing rows out to ranks, against every other way of doing it, and the exchange in a world of one."""

from __future__ import annotations

import doctest
import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatron_opdlm.config.schema import TrainingConfig
from megatron_opdlm.diffusion.states import OnPolicyStates
from megatron_opdlm.training import balance
from megatron_opdlm.training.balance import TokenImbalance, assign_rows, balance_rows, exchange_rows, tokens_by_rank


def lengths_of(num_ranks: int, num_rows: int) -> st.SearchStrategy[list[list[int]]]:
    rows = st.lists(st.integers(1, 40), min_size=num_rows, max_size=num_rows)
    return st.lists(rows, min_size=num_ranks, max_size=num_ranks)


def tokens(lengths: list[int], micro_batch_size: int, multiple: int) -> int:
    """Tokens of one rank as it pads its micro-batches."""
    ordered, total = sorted(lengths), 0
    while ordered:
        micro_batch, ordered = ordered[:micro_batch_size], ordered[micro_batch_size:]
        while micro_batch[-1] % multiple:
            micro_batch[-1] += 1
        total += micro_batch[-1] * micro_batch_size
    return total


def splits(rows: list[int], num_rows: int) -> Iterator[list[list[int]]]:
    """Every way to split `rows` into groups of `num_rows`."""
    if not rows:
        yield []
    for others in itertools.combinations(range(1, len(rows)), num_rows - 1):
        rest = [row for place, row in enumerate(rows) if place and place not in others]
        for split in splits(rest, num_rows):
            yield [[rows[0], *(rows[place] for place in others)], *split]


def busiest(lengths: list[list[int]], micro_batch_size: int, multiple: int) -> int:
    return max(tokens(rank, micro_batch_size, multiple) for rank in lengths)


def fewest(lengths: list[list[int]], micro_batch_size: int, multiple: int) -> int:
    """Tokens of the busiest rank in the best of all splits."""
    every_row = [length for rank in lengths for length in rank]
    return min(busiest(split, micro_batch_size, multiple) for split in splits(every_row, len(lengths[0])))


def dealt(lengths: list[list[int]], micro_batch_size: int, multiple: int) -> list[list[int]]:
    """The lengths each rank trains."""
    lengths_WB = torch.tensor(lengths)
    destination_WB = assign_rows(lengths_WB, micro_batch_size, multiple)
    return [lengths_WB[destination_WB == rank].tolist() for rank in range(len(lengths))]


def test_example_of_the_module_holds():
    result = doctest.testmod(balance, extraglobs={"torch": torch})
    assert result.attempted and not result.failed


@pytest.mark.parametrize(("num_ranks", "num_rows", "micro_batch_size"), [(3, 2, 1), (2, 4, 2)])
@given(data=st.data(), multiple=st.sampled_from([1, 4]))
def test_with_two_micro_batches_per_rank_no_other_split_is_better(
    num_ranks, num_rows, micro_batch_size, data, multiple
):
    lengths = data.draw(lengths_of(num_ranks, num_rows))
    actual = busiest(dealt(lengths, micro_batch_size, multiple), micro_batch_size, multiple)
    assert actual == fewest(lengths, micro_batch_size, multiple)


@pytest.mark.parametrize(("num_ranks", "num_rows", "micro_batch_size"), [(2, 4, 1), (3, 3, 1)])
@given(data=st.data(), multiple=st.sampled_from([1, 4]))
def test_the_busiest_rank_is_within_a_third_of_the_best_split(num_ranks, num_rows, micro_batch_size, data, multiple):
    lengths = data.draw(lengths_of(num_ranks, num_rows))
    actual = busiest(dealt(lengths, micro_batch_size, multiple), micro_batch_size, multiple)
    assert actual <= 4 / 3 * fewest(lengths, micro_batch_size, multiple)
    assert actual <= busiest(lengths, micro_batch_size, multiple)


@given(lengths=lengths_of(4, 6), micro_batch_size=st.sampled_from([1, 2, 3]), multiple=st.sampled_from([1, 8]))
def test_all_ranks_get_equally_many_rows_and_none_is_lost(lengths, micro_batch_size, multiple):
    ranks = dealt(lengths, micro_batch_size, multiple)
    assert [len(rank) for rank in ranks] == [6] * 4
    assert sorted(itertools.chain(*ranks)) == sorted(itertools.chain(*lengths))
    assert busiest(ranks, micro_batch_size, multiple) <= busiest(lengths, micro_batch_size, multiple)


@given(lengths=lengths_of(3, 4), micro_batch_size=st.sampled_from([1, 2, 4]), multiple=st.sampled_from([1, 8]))
def test_tokens_count_padding_of_sorted_micro_batches(lengths, micro_batch_size, multiple):
    lengths_WB = torch.tensor(lengths)
    destination_WB = assign_rows(lengths_WB, micro_batch_size, multiple)
    expected = [tokens(rank, micro_batch_size, multiple) for rank in dealt(lengths, micro_batch_size, multiple)]
    assert tokens_by_rank(lengths_WB, destination_WB, micro_batch_size, multiple).tolist() == expected


def test_rows_stay_where_nothing_is_gained():
    home = [[0, 0], [1, 1]]
    assert assign_rows(torch.tensor([[8, 8], [8, 8]]), 1, 4).tolist() == home
    assert assign_rows(torch.tensor([[8, 7], [6, 5]]), 1, 4).tolist() == home, "equal once padded"
    assert assign_rows(torch.tensor([[8, 1], [7, 2]]), 2, 1).tolist() == home, "the longest row needs its padding"


def test_ties_go_to_the_first_row_and_the_lowest_rank():
    assert assign_rows(torch.tensor([[4, 4, 4], [8, 8, 8]]), 1, 4).tolist() == [[1, 1, 0], [0, 1, 0]]


def states_of(lengths: list[int]) -> OnPolicyStates:
    """Rows in which no two numbers are alike."""
    shape = len(lengths), max(lengths)
    ids_BT = torch.arange(shape[0] * shape[1]).view(shape)
    return OnPolicyStates(
        clean_ids_BT=ids_BT,
        noisy_ids_BT=ids_BT + 2**40,
        lengths_B=torch.tensor(lengths),
        is_trained_BT=ids_BT % 2 == 0,
        is_committed_BT=ids_BT % 3 == 0,
        log_probs_BT=-ids_BT.float() / 7,
    )


@pytest.mark.parametrize("lengths", [[3], [1], [5, 2, 7], [4, 8]])
def test_every_field_survives_the_exchange(world_of_one, lengths):
    states = states_of(lengths)
    there = exchange_rows(states, torch.zeros(1, len(lengths), dtype=torch.int64), 9, dist.group.WORLD)
    assert there.clean_ids_BT.shape == (len(lengths), 9)
    assert (there.clean_ids_BT[:, max(lengths) :] == 0).all() and not there.is_trained_BT[:, max(lengths) :].any()
    for name, expected in vars(states).items():
        actual = vars(there)[name]
        assert actual.dtype == expected.dtype
        assert actual[:, : max(lengths)].equal(expected) if expected.dim() == 2 else actual.equal(expected), name


def test_a_single_rank_keeps_its_rows_and_sends_nothing(world_of_one, monkeypatch):
    for collective in ("all_gather", "all_to_all_single"):
        monkeypatch.setattr(dist, collective, None)
    states = states_of([4, 8, 2, 6])
    training = TrainingConfig(global_batch_size=2, micro_batch_size=1, pad_to_multiple=2)
    kept, imbalances = balance_rows(states, training, dist.group.WORLD)
    assert kept is states
    assert imbalances == [TokenImbalance(1.0, 1.0)] * 2
