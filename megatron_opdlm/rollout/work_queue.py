"""Tasks that wait to be decoded, shared by the data-parallel ranks.

A rank takes tasks when it has room for them, so one whose sequences end early decodes more of them than others. The
longest expected come first, because what is left at the end should be short. How many tasks a rank gets follows from
how many forwards its sequences took and not from how long these lasted: the ranks meet every so many forwards, tell
each other their room, and all work out the same distribution. A run that is repeated is therefore repeated exactly.

    queue = WorkQueue([300, 20, 40], group)         # expected lengths of three tasks
    mine = queue.deal(room=1)                       # indices of tasks; all ranks must call it
    queue.is_empty
    queue.stop()                                    # in place of a deal: nobody gets any more tasks

What a rank has decoded goes where it is trained, by `exchange`. Both run on gloo; on several GPUs not yet.
"""

from __future__ import annotations

import pickle
from collections import deque
from typing import Any

import torch
import torch.distributed as dist

from megatron_opdlm.parallel.device import device

_STOP = -1
"""What a rank says of its room when the tasks that are left shall stay undone."""


class WorkQueue:
    """The tasks that no rank of the group has yet; the same on all of them. `group` is None for a rank alone."""

    def __init__(self, expected_lengths: list[int], group: dist.ProcessGroup | None) -> None:
        self._group = group if group is not None and group.size() > 1 else None
        order = sorted(range(len(expected_lengths)), key=lambda index: -expected_lengths[index])
        self._waiting = deque(order)
        self.is_stopped = False
        """Whether a rank of the group has stopped the dealing; known to all of them after the next `deal`."""

    @property
    def num_ranks(self) -> int:
        """Ranks that share the tasks."""
        return 1 if self._group is None else self._group.size()

    @property
    def is_empty(self) -> bool:
        """Whether every task has been dealt."""
        return not self._waiting

    def deal(self, room: int) -> list[int]:
        """The tasks that this rank gets; no more than it has room for. A rank alone gets all.

        One all-gather over the group, whose ranks must all call it.
        """
        if self._group is None:
            mine, self._waiting = list(self._waiting), deque()
            return mine
        rooms = [torch.zeros(1, dtype=torch.long, device=device()) for _ in range(self._group.size())]
        dist.all_gather(rooms, torch.tensor([room], device=device()), group=self._group)
        return self._distribute(torch.cat(rooms).tolist())[self._group.rank()]

    def stop(self) -> None:
        """Where others may still call `deal`, answers them once, so that all ranks find the queue stopped and empty."""
        if not self.is_empty:
            self.deal(_STOP)

    def _distribute(self, rooms: list[int]) -> list[list[int]]:
        """The tasks of each rank: the next one goes to the rank with the most room left, or the lowest of these."""
        dealt: list[list[int]] = [[] for _ in rooms]
        if _STOP in rooms:
            self.is_stopped, self._waiting = True, deque()
        while self._waiting and max(rooms) > 0:
            rank = rooms.index(max(rooms))
            dealt[rank].append(self._waiting.popleft())
            rooms[rank] -= 1
        return dealt


def exchange(parcels: list[Any], group: dist.ProcessGroup) -> list[Any]:
    """Gives `parcels[r]` to rank r of the group; what each rank gave to this one, in their order.

    Two all-to-alls over the group, whose ranks must all call it.
    """
    sent = [torch.frombuffer(bytearray(pickle.dumps(parcel)), dtype=torch.uint8) for parcel in parcels]
    sizes = torch.tensor([len(part) for part in sent], device=device())
    received_sizes = torch.empty_like(sizes)
    dist.all_to_all_single(received_sizes, sizes, group=group)
    counts = received_sizes.tolist()
    received = torch.empty(sum(counts), dtype=torch.uint8, device=device())
    dist.all_to_all_single(received, torch.cat(sent).to(device()), counts, sizes.tolist(), group=group)
    return [pickle.loads(part.numpy().tobytes()) for part in received.cpu().split(counts)]
