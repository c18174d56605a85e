"""Which data-parallel rank trains which row of a global batch.

Responses differ in length, and the ranks wait for each other at the end of every global batch. So the rows that the
ranks rolled out are dealt out anew, by their tokens. The rows of a global batch stay the same, only their ranks
change, and its gradient is a sum over rows: the optimizer step is the same but for rounding.

What counts is the tokens of a rank's micro-batches, padding included: the linear layers of the student's two streams
and of the teacher, forward and backward, all take time in proportion to them. Left out is attention's part that grows
with the square, for rows of 4,000 tokens 9 % of the linear layers' work in Qwen3-8B and 52 % in Qwen3-0.6B.

The unit that is dealt out is a micro-batch: the rows sorted by length, cut into micro-batches. A micro-batch is as
wide as its longest row, and in no other way of filling micro-batches are the widest, the second widest and so on as
narrow, so no other way lets the busiest rank have fewer tokens. The longest goes first, to the rank with the fewest
tokens that has room; all get equally many, since Megatron wants as many micro-batches on each rank.

Example: two ranks that rolled out two rows each, micro-batches of one row, padded to a multiple of 4 tokens. Rank 1
gives a row of 20 tokens to rank 0 and gets its row of 4: 12 and 40 tokens become 28 and 24.

    >>> lengths_WB = torch.tensor([[8, 4], [20, 20]])
    >>> destination_WB = assign_rows(lengths_WB, micro_batch_size=1, pad_to_multiple=4)
    >>> destination_WB.tolist()
    [[0, 1], [0, 1]]
    >>> tokens_by_rank(lengths_WB, destination_WB, micro_batch_size=1, pad_to_multiple=4).tolist()
    [28, 24]

Legend: `W` data-parallel ranks, `B` rows of one of them, `T` tokens of the longest row, `X` bytes of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from megatron_opdlm.config.schema import TrainingConfig
from megatron_opdlm.diffusion.blocks import round_up_to_grid
from megatron_opdlm.diffusion.states import OnPolicyStates
from megatron_opdlm.parallel.device import device


@dataclass(frozen=True)
class TokenImbalance:
    """Tokens of the busiest rank over the mean of the ranks in one global batch; 1 if all have as many.

    The mean is that of the ranks the rows were dealt out to, in both figures. So their quotient tells how much sooner
    the busiest rank is done.
    """

    before: float
    """As the rows were rolled out."""
    after: float
    """As they are trained. Never above `before`."""


def balance_rows(
    states: OnPolicyStates, training: TrainingConfig, group: dist.ProcessGroup, rows_per_trajectory: int = 1
) -> tuple[OnPolicyStates, list[TokenImbalance]]:
    """This rank's rows of a step after they were dealt out, and the imbalance of each global batch.

    Communicates over the data-parallel `group`: all its ranks must call it, with the same number of rows. A global
    batch is the same slice of rows on every rank, before and after. With one rank nothing is communicated. Without
    `training.balance_rows` every row stays where it is.
    """
    lengths_WB = _gather_lengths(states.lengths_B, group)
    batches = lengths_WB.split(training.global_batch_size * rows_per_trajectory // group.size(), dim=1)
    destinations, imbalances = zip(*(_deal_out(batch_WB, training) for batch_WB in batches), strict=True)
    destination_WB = torch.cat(destinations, dim=1)
    if not destination_WB.equal(_home(lengths_WB)):
        states = exchange_rows(states, destination_WB, int(lengths_WB.max()), group)
    return states, list(imbalances)


def _deal_out(lengths_WB: torch.Tensor, training: TrainingConfig) -> tuple[torch.Tensor, TokenImbalance]:
    """The destinations [W, B] of the rows of one global batch, and its imbalance."""
    packing = (training.micro_batch_size, training.pad_to_multiple)
    home_WB = _home(lengths_WB)
    destination_WB = assign_rows(lengths_WB, *packing) if training.balance_rows else home_WB
    before_W, after_W = (tokens_by_rank(lengths_WB, ranks_WB, *packing) for ranks_WB in (home_WB, destination_WB))
    mean = after_W.double().mean()
    return destination_WB, TokenImbalance(float(before_W.max() / mean), float(after_W.max() / mean))


def assign_rows(lengths_WB: torch.Tensor, micro_batch_size: int, pad_to_multiple: int) -> torch.Tensor:
    """The rank that trains each row of a global batch, int64 [W, B], every rank B times.

    `lengths_WB` has the tokens of the rows, by the rank that holds them. All rows stay if that leaves the busiest rank
    with no more tokens. Ties go to the row that stands first and to the lowest rank, so all ranks decide the same.
    """
    num_ranks, num_rows = lengths_WB.shape
    lengths = lengths_WB.flatten()
    destination = torch.empty_like(lengths)
    tokens, room = [0] * num_ranks, [num_rows // micro_batch_size] * num_ranks
    for rows in lengths.argsort(descending=True, stable=True).split(micro_batch_size):
        rank = min((rank for rank in range(num_ranks) if room[rank]), key=tokens.__getitem__)
        tokens[rank] += micro_batch_size * round_up_to_grid(int(lengths[rows[0]]), pad_to_multiple)
        room[rank] -= 1
        destination[rows] = rank
    home_WB = _home(lengths_WB)
    is_better = max(tokens) < tokens_by_rank(lengths_WB, home_WB, micro_batch_size, pad_to_multiple).max()
    return destination.view_as(lengths_WB) if is_better else home_WB


def tokens_by_rank(
    lengths_WB: torch.Tensor, destination_WB: torch.Tensor, micro_batch_size: int, pad_to_multiple: int
) -> torch.Tensor:
    """Tokens of each rank's micro-batches with their padding, int64 [W], if row by row `destination_WB` trains them.

    A rank sorts its rows of a global batch by length, and a micro-batch is as wide as its last row, rounded up.
    """
    by_rank = destination_WB.flatten().argsort(stable=True)
    sorted_WB = lengths_WB.flatten()[by_rank].view_as(lengths_WB).sort(dim=1).values
    widths_WM = round_up_to_grid(sorted_WB[:, micro_batch_size - 1 :: micro_batch_size], pad_to_multiple)
    return micro_batch_size * widths_WM.sum(dim=1)


def exchange_rows(
    states: OnPolicyStates, destination_WB: torch.Tensor, width: int, group: dist.ProcessGroup
) -> OnPolicyStates:
    """The rows of all ranks whose destination is this rank, padded to `width` tokens, on the device of `states`.

    One all-to-all over `group`, which all its ranks must enter with the same `destination_WB` [W, B]; it names every
    rank B times. Row b of the result comes from the same global batch as row b of `states` if that holds for each
    global batch alone: rows keep the order of their places, those of one place the order of their ranks.
    """
    to_me_WB = destination_WB == group.rank()
    by_receiver = destination_WB[group.rank()].argsort(stable=True)
    num_sent = destination_WB[group.rank()].bincount(minlength=group.size()).tolist()
    sent_BX = _to_bytes(states, width)[by_receiver].to(device())
    received_BX = torch.empty_like(sent_BX)
    dist.all_to_all_single(received_BX, sent_BX, to_me_WB.sum(dim=1).tolist(), num_sent, group=group)
    # Rows arrive by sender, the rows of each by place, which is also the order of `nonzero`.
    _, place_B = to_me_WB.nonzero(as_tuple=True)
    by_place = place_B.argsort(stable=True)
    return _from_bytes(received_BX.to(states.lengths_B.device)[by_place], states, width)


def _gather_lengths(lengths_B: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[W, B] on the CPU."""
    if group.size() == 1:
        return lengths_B[None]
    own_B = lengths_B.to(device())
    lengths_WB = [torch.empty_like(own_B) for _ in range(group.size())]
    dist.all_gather(lengths_WB, own_B, group=group)
    return torch.stack(lengths_WB).cpu()


def _home(lengths_WB: torch.Tensor) -> torch.Tensor:
    """The destinations that leave every row where it is."""
    return torch.arange(len(lengths_WB))[:, None].expand_as(lengths_WB)


def _to_bytes(states: OnPolicyStates, width: int) -> torch.Tensor:
    """All fields of a row side by side, uint8 [B, X], so that one message carries them whatever their types."""
    columns = []
    for field in fields(states):
        tensor = getattr(states, field.name)
        # As in `OnPolicyStates.padded_to`, 0 is a valid token id.
        values_BN = pad(tensor, (0, width - tensor.shape[1])) if tensor.dim() == 2 else tensor[:, None]
        columns.append(values_BN.contiguous().view(torch.uint8))
    return torch.cat(columns, dim=1)


def _from_bytes(bytes_BX: torch.Tensor, like: OnPolicyStates, width: int) -> OnPolicyStates:
    """The inverse of `_to_bytes`; `like` has the types of the fields."""
    tensors = {field.name: getattr(like, field.name) for field in fields(like)}
    sizes = [tensor.dtype.itemsize * (width if tensor.dim() == 2 else 1) for tensor in tensors.values()]
    values = {}
    for (name, tensor), column_BN in zip(tensors.items(), bytes_BX.split(sizes, dim=1), strict=True):
        # A copy begins at an address where numbers of any type may lie.
        values_BN = column_BN.clone(memory_format=torch.contiguous_format).view(tensor.dtype)
        values[name] = values_BN if tensor.dim() == 2 else values_BN.squeeze(1)
    return type(like)(**values)
