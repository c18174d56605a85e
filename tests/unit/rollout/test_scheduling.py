"""Pages, slots, and who reads what next: bookkeeping without a model."""

from __future__ import annotations

from collections import deque

import pytest
import torch

from megatron_opdlm.config.schema import RolloutConfig
from megatron_opdlm.data.special_tokens import SpecialTokens
from megatron_opdlm.rollout.page_pool import PagePool
from megatron_opdlm.rollout.scheduler import Scheduler
from megatron_opdlm.rollout.sequences import DecodingRequest, Slots, Waiting

SPECIAL = SpecialTokens(vocab_size=100, mask_token_id=99, end_token_ids=(7,), pad_token_id=0)


def request(index: int, prompt_length: int, max_new_tokens: int = 8) -> DecodingRequest:
    return DecodingRequest(
        index=index,
        prompt_id=index,
        prompt_ids=list(range(20, 20 + prompt_length)),
        max_new_tokens=max_new_tokens,
        temperature=1.0,
        generator=torch.Generator().manual_seed(index),
    )


def scheduler_of(lengths: list[int], *, num_slots: int, num_pages: int, **settings) -> Scheduler:
    """Pages of 8 tokens, blocks of 4."""
    rollout = RolloutConfig(**settings)
    slots = Slots(num_slots, 64, rollout, SPECIAL)
    waiting = deque(Waiting(request(index, length)) for index, length in enumerate(lengths))
    return Scheduler(slots, PagePool(range(1, 1 + num_pages), num_slots, 8, 8), waiting, rollout)


def carry_out(scheduler: Scheduler) -> list[tuple[int, int, bool]]:
    """What the next forward reads, by slot; then the cache has it."""
    scheduler.admit()
    plan = scheduler.plan()
    scheduler.slots.num_cached_B[plan.slots_A] += plan.num_clean_A
    rows = (plan.slots_A, plan.num_clean_A, plan.is_denoising_A)
    return list(zip(*(column.tolist() for column in rows), strict=True))


def commit_block(slots: Slots, slot: int, tokens: list[int]) -> None:
    start = int(slots.block_start_B[slot])
    slots.ids_BL[slot, start : start + 4] = torch.tensor(tokens)
    slots.is_masked_BL[slot, start : start + 4] = False
    slots.step_map_BL[slot, start : start + 4] = 1


def test_pages_belong_to_one_slot_at_a_time_and_come_back():
    pool = PagePool(range(1, 5), num_slots=2, max_pages=4, page_size=8)
    assert pool.grow(0, 9) and pool.grow(0, 16) and pool.grow(1, 8)
    assert pool.page_table_BP.tolist() == [[1, 2, 0, 0], [3, 0, 0, 0]]
    assert not pool.grow(1, 24) and pool.num_free == 1, "nothing is given where it is not enough"
    pool.release(0)
    assert pool.num_free == 3 and pool.page_table_BP[0].tolist() == [0, 0, 0, 0]
    assert pool.grow(1, 32) and sorted(pool.page_table_BP[1].tolist()) == [1, 2, 3, 4]
    assert pool.peak == 4


def test_a_prompt_is_read_with_the_first_denoising_step_of_its_sequence():
    scheduler = scheduler_of([6, 3], num_slots=2, num_pages=16)
    assert carry_out(scheduler) == [(0, 4, True), (1, 0, True)]
    assert carry_out(scheduler) == [(0, 0, True), (1, 0, True)]


def test_a_finished_block_is_committed_by_the_first_step_of_the_next_one():
    scheduler = scheduler_of([4], num_slots=1, num_pages=4)
    carry_out(scheduler)
    commit_block(scheduler.slots, 0, [1, 2, 3, 4])
    assert scheduler.slots.advance(torch.tensor([0])).tolist() == []
    assert carry_out(scheduler) == [(0, 4, True)]


def test_a_long_prompt_is_read_in_chunks_beside_sequences_that_denoise():
    scheduler = scheduler_of([1, 30], num_slots=2, num_pages=16, max_tokens_in_flight=18)
    # 4 tokens of the first sequence leave 14, that is three blocks; the rest of the prompt and the block fit behind
    assert carry_out(scheduler) == [(0, 0, True), (1, 12, False)]
    assert carry_out(scheduler) == [(0, 0, True), (1, 12, False)]
    assert carry_out(scheduler) == [(0, 0, True), (1, 4, True)]


def test_a_forward_has_room_for_two_blocks_of_each_sequence():
    scheduler = scheduler_of([1, 1, 1], num_slots=3, num_pages=16, max_tokens_in_flight=16)
    assert [slot for slot, _, _ in carry_out(scheduler)] == [0, 1]
    commit_block(scheduler.slots, 0, [20, 7, 1, 1])
    scheduler.finish(0)
    assert scheduler.admit() == 1


def test_a_sequence_is_admitted_if_a_page_is_left_for_each_that_may_grow():
    assert len(carry_out(scheduler_of([7, 7], num_slots=2, num_pages=2))) == 1
    assert len(carry_out(scheduler_of([7, 7], num_slots=2, num_pages=3))) == 2


def test_the_sequence_admitted_last_makes_room_and_goes_on_where_it_was():
    scheduler = scheduler_of([7, 7], num_slots=2, num_pages=3)
    slots = scheduler.slots
    assert carry_out(scheduler) == [(0, 4, True), (1, 4, True)]
    for slot in (0, 1):
        commit_block(slots, slot, [24, 25, 26, slot])
    slots.advance(torch.tensor([0, 1]))
    kept = slots.ids_BL[1].clone(), slots.uniforms_BSK[1].clone()
    assert carry_out(scheduler) == [(0, 4, True)], "the last page is for the older one"
    assert scheduler.num_preemptions == 1 and len(scheduler.waiting) == 1
    commit_block(slots, 0, [1, 2, 7, 4])
    assert slots.advance(torch.tensor([0])).tolist() == [0]
    index, trajectory = scheduler.finish(0)
    assert (index, trajectory.response_ids.tolist()) == (0, [0, 1, 2, 7])
    assert carry_out(scheduler) == [(0, 8, True)], "all its clean tokens are read again"
    assert slots.ids_BL[0].equal(kept[0]) and slots.uniforms_BSK[0].equal(kept[1])


def test_the_longest_wait_is_ended_first():
    scheduler = scheduler_of([1, 1, 1], num_slots=1, num_pages=2)
    order = []
    while scheduler.admit():
        commit_block(scheduler.slots, 0, [20, 7, 1, 1])
        order.append(scheduler.finish(0)[0])
    assert order == [0, 1, 2]


@pytest.mark.parametrize("rooms", [[1, 1], [0, 5], [3, 2], [9, 9]])
def test_tasks_go_to_the_rank_with_the_most_room_the_longest_first(rooms):
    from megatron_opdlm.rollout.work_queue import WorkQueue

    queue = WorkQueue([5, 50, 10, 40, 20], None)
    dealt = queue._distribute(list(rooms))
    num_dealt = min(5, sum(rooms))
    assert sorted(task for mine in dealt for task in mine) == sorted([1, 3, 4, 2, 0][:num_dealt])
    assert all(len(mine) <= room for mine, room in zip(dealt, rooms, strict=True))
    assert abs(len(dealt[0]) - len(dealt[1])) <= max(1, abs(rooms[0] - rooms[1]))
    assert queue.is_empty == (num_dealt == 5)


def test_a_rank_alone_gets_everything_at_once():
    from megatron_opdlm.rollout.work_queue import WorkQueue

    queue = WorkQueue([5, 50, 10], None)
    assert queue.deal(room=0) == [1, 2, 0] and queue.is_empty


@pytest.mark.parametrize("num_active", [0, 1, 3])
@pytest.mark.parametrize(("num_slots", "num_pages", "budget"), [(8, 64, 512), (8, 5, 512), (8, 64, 40), (4, 64, 8)])
def test_room_is_the_number_of_one_page_sequences_that_get_a_slot(num_slots, num_pages, budget, num_active):
    scheduler = scheduler_of([], num_slots=num_slots, num_pages=num_pages, max_tokens_in_flight=budget)
    waiting = [Waiting(request(index, prompt_length=3, max_new_tokens=4)) for index in range(12)]
    scheduler.waiting.extend(waiting[:num_active])
    scheduler.admit()
    room = scheduler.room()
    scheduler.waiting.clear()
    scheduler.waiting.extend(waiting[num_active:])
    assert scheduler.admit() == room


def test_pages_of_a_preempted_sequence_are_handed_over_once():
    scheduler = scheduler_of([7, 7], num_slots=2, num_pages=3)
    carry_out(scheduler)
    pages = scheduler.pool.page_table_BP[1].clone()
    for slot in (0, 1):
        commit_block(scheduler.slots, slot, [24, 25, 26, slot])
    scheduler.slots.advance(torch.tensor([0, 1]))
    assert scheduler.take_pages_given_back() == []
    carry_out(scheduler)
    (given_back,) = scheduler.take_pages_given_back()
    assert torch.equal(given_back, pages) and pages.any()
    assert scheduler.take_pages_given_back() == []
