"""A rollout as a simulation: which rank decodes what, how many sequences share a forward, when each rank is done.

    finish = simulate([2000, 100, 100, 100], num_ranks=2, num_slots=1, seconds_per_forward=lambda active: 0.01,
                      tokens_per_step=1.0)
    finish.seconds_by_rank                                              # [20.0, 3.0]

Every rank decodes up to `num_slots` sequences at a time, one denoising step of each in a forward. With work sharing
(`rollout.work_queue`) a rank that has room takes the next task, whoever's it is; without, each rank has every so manyth
task, as if the ranks were alone. A static batch is what a plain sampler does: it begins the next one when all of its
sequences have ended.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

Sharing = Literal["shared", "own", "static"]


@dataclass(frozen=True)
class Finish:
    """When the ranks of a rollout are done."""

    seconds_by_rank: list[float]
    num_forwards: list[int]
    """Of each rank."""
    mean_active: float
    """Sequences in a forward."""

    @property
    def seconds(self) -> float:
        """Until the last rank is done."""
        return max(self.seconds_by_rank)

    @property
    def idle_share(self) -> float:
        """Of the ranks' time, waiting for the last one."""
        return 1 - fmean(self.seconds_by_rank) / self.seconds if self.seconds else 0.0


@dataclass
class _Rank:
    tasks: deque[float]
    num_slots: int
    is_static: bool
    forward: float = 0.0
    clock: float = 0.0
    slot_forwards: float = 0.0
    ends: list[float] = field(default_factory=list)

    def fill(self) -> None:
        if self.is_static and self.ends:
            return
        while self.tasks and len(self.ends) < self.num_slots:
            heapq.heappush(self.ends, self.forward + self.tasks.popleft())

    def next_end(self, seconds_per_forward: Callable[[int], float]) -> float:
        return self.clock + (self.ends[0] - self.forward) * seconds_per_forward(len(self.ends))

    def take_to_next_end(self, seconds_per_forward: Callable[[int], float]) -> None:
        self.clock = self.next_end(seconds_per_forward)
        self.slot_forwards += (self.ends[0] - self.forward) * len(self.ends)
        self.forward = heapq.heappop(self.ends)


def simulate(
    lengths: Sequence[int],
    *,
    num_ranks: int,
    num_slots: int,
    seconds_per_forward: Callable[[int], float],
    tokens_per_step: float,
    sharing: Sharing = "shared",
) -> Finish:
    """Decodes responses of these lengths. `seconds_per_forward` takes the number of sequences in it.

    Tasks are dealt in their order, one to each rank in turn, as the queue deals equal ones.
    """
    steps = [length / tokens_per_step for length in lengths]
    queue = deque(steps)
    own = [deque(steps[place::num_ranks]) for place in range(num_ranks)]
    ranks = [
        _Rank(queue if sharing == "shared" else own[place], num_slots, sharing == "static")
        for place in range(num_ranks)
    ]
    if sharing == "shared":
        _deal(queue, ranks)
    for rank in ranks:
        rank.fill()
    times = [(rank.next_end(seconds_per_forward), place) for place, rank in enumerate(ranks) if rank.ends]
    heapq.heapify(times)
    while times:
        _, place = heapq.heappop(times)
        rank = ranks[place]
        rank.take_to_next_end(seconds_per_forward)
        rank.fill()
        if rank.ends:
            heapq.heappush(times, (rank.next_end(seconds_per_forward), place))
    num_forwards = [round(rank.forward) for rank in ranks]
    active = sum(rank.slot_forwards for rank in ranks) / max(sum(rank.forward for rank in ranks), 1e-9)
    return Finish([rank.clock for rank in ranks], num_forwards, active)


def _deal(queue: deque[float], ranks: list[_Rank]) -> None:
    """The first tasks, one to each rank in turn, until the slots are full."""
    for _ in range(ranks[0].num_slots):
        for rank in ranks:
            if queue:
                heapq.heappush(rank.ends, queue.popleft())


def row_imbalance(
    lengths: Sequence[int],
    *,
    num_ranks: int,
    global_batch_size: int,
    micro_batch_size: int,
    pad_to_multiple: int,
    is_balanced: bool = True,
) -> float:
    """Tokens of the busiest data-parallel rank over the mean of all, in the mean over the global batches of a step.

    `lengths` are those of the rows, by place: row i is rank i % num_ranks's. The rule is `training.balance`'s.
    """
    widths = [-(-length // pad_to_multiple) * pad_to_multiple for length in lengths]
    busiest = whole = 0.0
    for begin in range(0, len(widths) - global_batch_size + 1, global_batch_size):
        rows = widths[begin : begin + global_batch_size]
        home = [_tokens(rows[place::num_ranks], micro_batch_size) for place in range(num_ranks)]
        dealt = _dealt(rows, num_ranks, micro_batch_size) if is_balanced else home
        busiest += min(max(dealt), max(home))
        whole += sum(rows) / num_ranks
    return busiest / whole if whole else 1.0


def _tokens(widths: Sequence[int], micro_batch_size: int) -> int:
    """Of one rank's micro-batches of neighbours in length, each as wide as its widest row."""
    ordered = sorted(widths)
    return micro_batch_size * sum(ordered[micro_batch_size - 1 :: micro_batch_size])


def _dealt(widths: Sequence[int], num_ranks: int, micro_batch_size: int) -> list[int]:
    """Micro-batches, the widest first, each to the rank with the fewest tokens that has room."""
    tokens, room = [0] * num_ranks, [len(widths) // num_ranks // micro_batch_size] * num_ranks
    for width in sorted(widths, reverse=True)[::micro_batch_size]:
        rank = min((rank for rank in range(num_ranks) if room[rank]), key=tokens.__getitem__)
        tokens[rank] += micro_batch_size * width
        room[rank] -= 1
    return tokens
