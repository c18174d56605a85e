"""What tensor-parallel ranks tell each other about logits they do not share.

Every rank of a tensor-parallel group holds the logits of its own vocabulary rows. A maximum, an argmax or a top-k over
the whole vocabulary needs only a few numbers per position from each rank; the logits stay where they are. Both the
divergence and the drawing of tokens build on this.

    shard = VocabularyShard(first=0, num_rows=8, vocab_size=7, mask_token_id=6, group=None)
    shard.dead_rows                              # 6 and 7: the mask token and the padding
    global_top_k(logits_NV, 2, shard)            # the ids of the two largest logits of every position

Shapes: N positions, V vocabulary rows of this rank, k candidates, R ranks of the group, L stacked logits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist

EXACT_IDS = 2**24
"""Ids travel beside float32 logits in one tensor; below this bound float32 holds every integer."""


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's rows of an output layer. Student and teacher are padded to the same size, so one shard fits both.

    Ranks hold consecutive rows in rank order, equally many each.
    """

    first: int
    """Vocabulary id of the first row."""
    num_rows: int
    """Rows on this rank, with padding."""
    vocab_size: int
    """Size of the vocabulary without padding; ids from here on are padding."""
    mask_token_id: int
    """The token that no distribution gives any probability to."""
    group: dist.ProcessGroup | None
    """Tensor-parallel group. None, or one rank, where the whole vocabulary is on this rank: then nothing is sent."""

    def __post_init__(self) -> None:
        assert self.first + self.num_rows <= EXACT_IDS, "ids must be exact in float32"

    @property
    def num_ranks(self) -> int:
        """Ranks that hold a part of the vocabulary."""
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        """This rank's place among them."""
        return 0 if self.group is None else self.group.rank()

    @functools.cached_property
    def dead_rows(self) -> torch.Tensor:
        """int64, on the CPU: the rows that take no part, those of padding and of the mask token."""
        ids = torch.arange(self.first, self.first + self.num_rows)
        return ((ids >= self.vocab_size) | (ids == self.mask_token_id)).nonzero()[:, 0]

    def locate(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(row on this rank, bool: is it on this rank) of each vocabulary id; the row is 0 for ids of other ranks."""
        rows = ids - self.first
        is_here = (rows >= 0) & (rows < self.num_rows)
        return rows * is_here, is_here


def gather_from_ranks(values: torch.Tensor, shard: VocabularyShard) -> torch.Tensor:
    """[R, *values.shape] in rank order. All ranks of `shard.group` must call it with the same shape."""
    if shard.num_ranks == 1:
        return values.unsqueeze(0)
    gathered = values.new_empty((shard.num_ranks, *values.shape))
    dist.all_gather(list(gathered.unbind(0)), values.contiguous(), group=shard.group)
    return gathered


def sum_over_ranks_(values: torch.Tensor, shard: VocabularyShard) -> torch.Tensor:
    """Sums `values` in place over `shard.group`; all of its ranks must call it with the same shape."""
    if shard.num_ranks > 1:
        dist.all_reduce(values, group=shard.group)
    return values


def global_argmax(logits_LNV: list[torch.Tensor], shard: VocabularyShard) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest logit [L, N] and its vocabulary id [L, N] (lowest id on ties), for L stacks of logits at once.

    One all-gather over `shard.group`; all of its ranks must call it. The ids come as exact floats.
    """
    values_LN, rows_LN = (torch.stack(part) for part in zip(*(x.max(dim=-1) for x in logits_LNV), strict=True))
    ids_LN = (rows_LN + shard.first).to(values_LN.dtype)
    values_RLN, ids_RLN = gather_from_ranks(torch.stack([values_LN, ids_LN]), shard).unbind(1)
    largest_LN = values_RLN.amax(0)
    return largest_LN, torch.where(values_RLN == largest_LN, ids_RLN, torch.inf).amin(0)


def global_top_k(logits_NV: torch.Tensor, k: int, shard: VocabularyShard) -> torch.Tensor:
    """The ids of `global_top_logits` alone, int64 [N, k]."""
    return global_top_logits(logits_NV, k, shard)[1]


def global_top_logits(logits_NV: torch.Tensor, k: int, shard: VocabularyShard) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest logits [N, k] and their vocabulary ids, int64 [N, k]: largest first, the lower id first on ties.

    `k` over the padded vocabulary size gives all ids. One all-gather over `shard.group`; all of its ranks must call it.
    """
    rows_Nk = _local_top_k(logits_NV, min(k, shard.num_rows))
    ids_Nk = (rows_Nk + shard.first).to(logits_NV.dtype)
    candidates_R2Nk = gather_from_ranks(torch.stack([logits_NV.gather(1, rows_Nk), ids_Nk]), shard)
    values_NC, ids_NC = candidates_R2Nk.permute(1, 2, 0, 3).flatten(2)
    ids_NC, by_id_NC = ids_NC.sort(dim=-1)
    values_NC, order_NC = values_NC.gather(1, by_id_NC).sort(dim=-1, descending=True, stable=True)
    return values_NC[:, :k], ids_NC.gather(1, order_NC[:, :k]).long()


def _local_top_k(logits_NV: torch.Tensor, k: int) -> torch.Tensor:
    """int64 [N, k]: rows of the k largest logits, the lowest rows among equal ones.

    `torch.topk` leaves open which of several equal logits it returns, and bfloat16 logits are often equal. So it
    decides only about the logits above the k-th largest; the rest are the lowest rows that equal the k-th largest.
    """
    values_Nk, rows_Nk = logits_NV.topk(k, dim=-1)
    threshold_N1 = values_Nk[:, -1:]
    lower_is_more_V = torch.arange(logits_NV.shape[1], 0, -1, device=logits_NV.device, dtype=logits_NV.dtype)
    is_tied_NV = logits_NV == threshold_N1
    tied_rows_Nk = torch.where(is_tied_NV, lower_is_more_V, 0.0).topk(k, dim=-1).indices
    num_above_N1 = (values_Nk > threshold_N1).sum(-1, keepdim=True)
    place_k = torch.arange(k, device=logits_NV.device)
    from_ties_Nk = tied_rows_Nk.gather(1, (place_k - num_above_N1).clamp_(min=0))
    return torch.where(place_k < num_above_N1, rows_Nk, from_ties_Nk)
