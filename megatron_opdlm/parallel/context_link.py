"""What the ranks that share a sequence tell each other, under context parallelism.

Each of them has all rows of a micro-batch, but of both streams its own part of the positions alone: of two ranks and
eight positions the first has 0 to 3, the second 4 to 7. Linear layers, norms and the loss look at single positions and
do not notice. Attention swaps positions for heads: each rank gives the others its positions of their heads, and gets
all positions of its own heads. So every backend attends to whole sequences, and all ranks have equally much to do
(DeepSpeed-Ulysses, https://arxiv.org/abs/2309.14509).

    link = ContextLink(groups.cp)
    part = states.columns(link.columns(8))
    query, key, value = link.whole_sequences(query, key, value)      # [S / 2, B, heads, D] -> [S, B, heads / 2, D]
    attended = link.own_positions(attended)                          # and back

While they decode, they are data-parallel ranks like others: each has sequences of its own (`rollout.work_queue`).

Alone, a rank has all positions and sends nothing. Runs on gloo; on several GPUs it has not been run yet.

Legend: `S` positions of the whole sequence, `P` of one rank's part, `B` sequences, `D` head dimension, `H` hidden.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


class ContextLink:
    """This rank's place among those that share its sequences. All of them must make the same calls in the same order.

    `group` is the context-parallel group, or None for a rank that is alone.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.size = 1 if group is None else group.size()
        self.rank = 0 if group is None else group.rank()
        self._group = group

    @property
    def is_first(self) -> bool:
        """Whether this rank has the first position; what belongs to a row as a whole is counted there."""
        return self.rank == 0

    def columns(self, num_positions: int) -> slice:
        """This rank's part of so many positions, which must be a multiple of the ranks."""
        width, rest = divmod(num_positions, self.size)
        assert not rest, f"{num_positions} positions are not {self.size} equal parts"
        return slice(self.rank * width, (self.rank + 1) * width)

    def whole_sequences(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """All positions of this rank's heads, `[S, B, heads / size, D]`, from its positions `[P, B, heads, D]`.

        The heads of each tensor are cut into neighbouring ones, so query heads stay with the key-value head they read.
        One all-to-all over the group for all tensors, and one in the backward pass. The results share memory.
        """
        if self.size == 1:
            return tensors
        by_rank = [tensor.unflatten(2, (self.size, -1)).movedim(2, 0) for tensor in tensors]
        received = _AllToAll.apply(torch.cat(by_rank, dim=3), self._group)
        return received.flatten(0, 1).split([part.shape[3] for part in by_rank], dim=2)

    def own_positions(self, tensor: torch.Tensor) -> torch.Tensor:
        """The inverse of `whole_sequences`: `[P, B, heads, D]` from `[S, B, heads / size, D]`."""
        if self.size == 1:
            return tensor
        received = _AllToAll.apply(tensor.unflatten(0, (self.size, -1)), self._group)
        return received.movedim(0, 2).flatten(2, 3)

    def from_part_before(self, last_BH: torch.Tensor) -> torch.Tensor:
        """What the rank with the positions before this one's gives as `last_BH`; the first rank gets the last one's.

        One all-gather over the group.
        """
        if self.size == 1:
            return last_BH
        by_rank = [torch.empty_like(last_BH) for _ in range(self.size)]
        dist.all_gather(by_rank, last_BH.contiguous(), group=self._group)
        return by_rank[self.rank - 1]

    def add_up_(self, values: torch.Tensor) -> torch.Tensor:
        """Adds `values` up over the group, in place."""
        if self.size > 1:
            dist.all_reduce(values, group=self._group)
        return values


class _AllToAll(torch.autograd.Function):
    """Gives `parts[r]` to rank r and returns what each rank gave, in their order: its own transpose."""

    @staticmethod
    def forward(ctx, parts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _all_to_all(parts, group)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_to_all(grad, ctx.group), None


def _all_to_all(parts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received
