"""What the stages of a pipeline tell each other outside Megatron's training schedules.

Activations go from a stage to the next one; what only the last stage can decide (drawn tokens, the loss) goes to all.

    link = StageLink(groups.pp, device())
    link.send(hidden)                                  # does not wait for the next stage
    hidden = link.receive((tokens, 1, hidden_size), torch.bfloat16)
    shared = link.share(draws)                         # begins; the stage may do something else
    draws = shared.wait()

Time spent waiting for another stage is counted, because it is what a pipeline loses. A pipeline of one stage sends
nothing. Runs on gloo; on several GPUs it has not been run yet.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


class IdleClock:
    """Seconds this stage has waited. A GPU waits by itself, behind the program, so there events mark both ends."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time of the `with` block."""
        if self._on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._marks.append((begin, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    def take(self) -> float:
        """The seconds since the last call; waits for the GPU."""
        if self._marks:
            self._marks[-1][1].synchronize()
            self._seconds += sum(begin.elapsed_time(end) for begin, end in self._marks) / 1000
            self._marks.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds


@dataclass
class Shared:
    """A tensor on its way from the last stage to all."""

    tensor: torch.Tensor
    work: dist.Work | None
    sends: list[tuple[dist.Work, torch.Tensor]]
    """Sends from before. They have arrived once the tensor has, for all stages do everything in the same order."""
    clock: IdleClock

    def wait(self) -> torch.Tensor:
        """The tensor of the last stage."""
        if self.work is not None:
            with self.clock.waiting():
                self.work.wait()
        for work, _ in self.sends:
            work.wait()
        self.sends.clear()
        return self.tensor


class StageLink:
    """This rank's place among the ranks of its pipeline. All stages must make the same calls in the same order."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.num_stages, self.stage = group.size(), group.rank()
        self.clock = IdleClock(device)
        self._group, self._device = group, device
        self._ranks = dist.get_process_group_ranks(group)
        self._sends: list[tuple[dist.Work, torch.Tensor]] = []

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank reads the tokens."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the output layer."""
        return self.stage == self.num_stages - 1

    def send(self, tensor: torch.Tensor) -> None:
        """Begins to send to the next stage; from the last one to the first, for its next chunk of layers."""
        receiver = self._ranks[(self.stage + 1) % self.num_stages]
        work = dist.isend(tensor, receiver, group=self._channel(self.is_last_stage))
        self._sends.append((work, tensor))

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """What the stage before has sent; the first stage receives from the last."""
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        with self.clock.waiting():
            dist.irecv(tensor, self._ranks[self.stage - 1], group=self._channel(self.is_first_stage)).wait()
        return tensor

    def share(self, tensor: torch.Tensor) -> Shared:
        """Begins to give the last stage's tensor to all. The others pass one of its shape and type, to be filled."""
        sends, self._sends = self._sends, []
        alone = self.num_stages == 1
        work = None if alone else dist.broadcast(tensor, self._ranks[-1], group=self._group, async_op=True)
        return Shared(tensor, work, sends, self.clock)

    def union(self, values: dict[str, Any]) -> dict[str, Any]:
        """The values of all stages, small ones, under names that only one of them has. All stages must call it."""
        if self.num_stages == 1:
            return values
        by_stage: list[dict[str, Any]] = [{}] * self.num_stages
        dist.all_gather_object(by_stage, values, group=self._group)
        return {name: value for stage in by_stage for name, value in stage.items()}

    def idle_share(self, seconds: float) -> float:
        """The share of the last `seconds` that the stages, all together, have waited; counted since the last call.

        Adds up over the pipeline-parallel group, whose ranks must all call it.
        """
        times = torch.tensor([self.clock.take(), seconds], dtype=torch.float64, device=self._device)
        if self.num_stages > 1:
            dist.all_reduce(times, group=self._group)
        return float(times[0] / times[1])

    def _channel(self, is_way_back: bool) -> dist.ProcessGroup:
        """From the last stage to the first another one: of two stages, NCCL would queue both ways in one order."""
        return dist.group.WORLD if is_way_back else self._group
