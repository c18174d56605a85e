"""Who decodes next: which waiting sequences get a slot, and which tokens the next forward reads.

A forward reads, for each of its sequences, the clean tokens that the cache lacks and behind them the block that is
being denoised. Clean tokens are missing at the start, where that is the prompt (prefill); when a block has just become
clean; and after a sequence had to leave the cache. If they are many they are read in chunks, over several forwards, and
the sequence denoises in the one that reads the last chunk.

    scheduler = Scheduler(slots, pool, waiting, rollout)
    scheduler.admit()
    plan = scheduler.plan()                   # None: nothing to do

Sequences that denoise go first; what they leave of `rollout.max_tokens_in_flight` goes to the chunks of the others, by
age. Where the cache has no page left for a sequence, the youngest one gives its pages back and waits in front.

Legend: `A` sequences of a forward, `K` positions of a block.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch

from megatron_opdlm.config.schema import RolloutConfig
from megatron_opdlm.diffusion.blocks import block_start
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.rollout.page_pool import PagePool
from megatron_opdlm.rollout.sequences import Slots, Waiting


@dataclass(frozen=True)
class ForwardPlan:
    """What the next forward reads.

    Example: slot 0 takes the second step of its block, slot 2 commits a block of 4 and takes the first step of the next
    one, slot 3 reads 8 tokens of a long prompt:
        slots_A = [0, 2, 3], num_clean_A = [0, 4, 8], is_denoising_A = [True, True, False]
    """

    slots_A: torch.Tensor
    """Ascending."""
    num_clean_A: torch.Tensor
    """Clean tokens behind those in the cache; whole blocks."""
    is_denoising_A: torch.Tensor
    """Whether the sequence takes a denoising step."""


class Scheduler:
    """Fills the slots of one group of sequences from the sequences that wait."""

    def __init__(self, slots: Slots, pool: PagePool, waiting: deque[Waiting], rollout: RolloutConfig) -> None:
        self.slots, self.pool, self.waiting = slots, pool, waiting
        self.num_preemptions = 0
        self._block_size, self._budget = rollout.block_size, rollout.max_tokens_in_flight
        self._block_tokens = rollout.block_size if rollout.reads_block else 0
        self._by_age: list[int] = []
        """The slots that have a sequence, the longest admitted one first."""
        self._given_back: list[torch.Tensor] = []

    @property
    def num_active(self) -> int:
        """Sequences that have a slot."""
        return len(self._by_age)

    @property
    def num_empty(self) -> int:
        """Slots that have none."""
        return len(self.slots.requests) - self.num_active

    def admit(self, at_most: int | None = None) -> int:
        """Gives waiting sequences a slot, in their order, as long as there is room for the next one; their number."""
        limit = self.num_empty if at_most is None else min(self.num_empty, at_most)
        num_admitted = 0
        while num_admitted < limit and self.waiting and self._has_room(self.waiting[0]):
            slot, waiting = self.slots.requests.index(None), self.waiting.popleft()
            self.pool.grow(slot, self._first_tokens(waiting))
            self.slots.resume(slot, waiting)
            self._by_age.append(slot)
            num_admitted += 1
        return num_admitted

    def plan(self) -> ForwardPlan | None:
        """What the next forward reads; its positions have pages. None if no slot has a sequence."""
        if not self._by_age:
            return None
        cached = self.slots.num_cached_B.tolist()
        lacking = [start - has for start, has in zip(self.slots.block_start_B.tolist(), cached, strict=True)]
        chunks = self._share_budget(lacking)
        capacity = self.pool.capacity_B.tolist()
        for slot in list(self._by_age):
            if slot in chunks:
                end = cached[slot] + chunks[slot][0] + self._block_size * chunks[slot][1]
                if end > capacity[slot]:
                    self._find_pages(slot, end, chunks)
        slots = sorted(chunks)
        return ForwardPlan(
            torch.tensor(slots),
            torch.tensor([chunks[slot][0] for slot in slots]),
            torch.tensor([chunks[slot][1] for slot in slots]),
        )

    def take_pages_given_back(self) -> list[torch.Tensor]:
        """The pages of each sequence that has been preempted since the last call, whatever has been written to them.

        They are free, or belong to others who have not read them yet.
        """
        taken, self._given_back = self._given_back, []
        return taken

    def room(self) -> int:
        """Sequences of one page each that `admit` would give a slot."""
        return min(self.num_empty, self.pool.num_free, self._room_in_forward())

    def finish(self, slot: int) -> tuple[int, Trajectory]:
        """The index and the trajectory of a request that is done; its slot and its pages are free again."""
        self._by_age.remove(slot)
        self.pool.release(slot)
        return self.slots.requests[slot].index, self.slots.finish(slot)

    def _has_room(self, waiting: Waiting) -> bool:
        """Whether a forward has room for one more sequence, and the cache for what it has come to.

        A page stays free for every other sequence that may need one more, so that the first one to grow does not throw
        it out again. Alone, a sequence always has room.
        """
        if self.num_active == 0:
            return True
        if self._room_in_forward() == 0:
            return False
        num_pages = self.pool.pages_for(self._first_tokens(waiting))
        if num_pages + self.num_active <= self.pool.num_free:
            return True
        active = torch.tensor(self._by_age)
        num_growing = int((self.slots.end_B[active] > self.pool.capacity_B[active]).sum())
        return num_pages + num_growing <= self.pool.num_free

    def _room_in_forward(self) -> int:
        """Sequences that a forward has room for beside the active ones, each with a block to commit and one to denoise.

        Alone, a sequence always has room.
        """
        return max(self._budget // (2 * self._block_size) - self.num_active, int(self.num_active == 0))

    def _first_tokens(self, waiting: Waiting) -> int:
        """Tokens in the cache when a waiting sequence takes its next denoising step."""
        if waiting.rows is None:
            return block_start(len(waiting.request.prompt_ids), self._block_size) + self._block_size
        return int(waiting.rows["block_start_B"]) + self._block_size

    def _share_budget(self, lacking: list[int]) -> dict[int, tuple[int, bool]]:
        """Slot -> clean tokens to read, and whether a denoising step follows; by what each lacks."""
        if sum(lacking[slot] for slot in self._by_age) + self._block_tokens * self.num_active <= self._budget:
            return {slot: (lacking[slot], True) for slot in self._by_age}
        chunks, left = {}, self._budget
        # a block to commit is no prefill; the sort keeps the order of age
        for slot in sorted(self._by_age, key=lambda slot: lacking[slot] > self._block_size):
            is_denoising = lacking[slot] + self._block_tokens <= left
            chunk = lacking[slot] if is_denoising else min(lacking[slot], left // self._block_size * self._block_size)
            if chunk or is_denoising:
                chunks[slot] = (chunk, is_denoising)
                left -= chunk + self._block_tokens * is_denoising
        return chunks

    def _find_pages(self, slot: int, num_tokens: int, chunks: dict[int, tuple[int, bool]]) -> None:
        """Pages for so many tokens of the slot. As long as there are too few, the youngest sequence leaves the plan."""
        while slot in chunks and not self.pool.grow(slot, num_tokens):
            chunks.pop(self._preempt_youngest(), None)

    def _preempt_youngest(self) -> int:
        """Takes the slot and the pages from the sequence admitted last; it waits in front of all others."""
        assert len(self._by_age) > 1, "the cache holds any one sequence"
        slot = self._by_age.pop()
        self._given_back.append(self.pool.page_table_BP[slot].clone())
        self.pool.release(slot)
        self.waiting.appendleft(self.slots.suspend(slot))
        self.num_preemptions += 1
        return slot
