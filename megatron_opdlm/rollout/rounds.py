"""Rounds of forwards, for ranks that share the experts of a mixture.

Under expert parallelism the ranks that share the experts decode different prompts, and yet no forward of one is done
without all the others: its tokens travel to the experts wherever they are. So a forward is a round that all of these
ranks take part in. A rank with nothing to decode takes part with one token of its own, whose output nobody reads, until
all ranks are in that state.

    while is_anyone_decoding(model, plan is not None):
        forward(plan or COMPANY)

Where no experts are shared a rank decides by itself.

A rollout that may be left early asks every so many forwards, with one answer for all ranks that forward together:

    is_left, is_told_to_stop = on_any([True, signal_received], model)
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_opdlm.models.pipeline import PipelineModel
from megatron_opdlm.parallel.device import device
from megatron_opdlm.rollout.kv_cache import QueryTokens

_ZERO, _ONE = torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.long)
COMPANY = QueryTokens(ids_T=_ZERO, first_A=_ZERO, counts_A=_ONE, page_table_AP=_ZERO[None])
"""One token, in the page that belongs to nobody."""


def is_anyone_decoding(model: PipelineModel, is_decoding: bool) -> bool:
    """Whether any of the ranks that share experts is; adds up over them, who must all call it."""
    if model.expert_group is None:
        return is_decoding
    number = torch.tensor(int(is_decoding), device=device())
    dist.all_reduce(number, group=model.expert_group)
    return bool(number)


def on_any(flags: list[bool], model: PipelineModel) -> list[bool]:
    """Each flag: whether any rank has raised it of those that this one needs for its forwards, who must all call it.

    These are the ranks that hold one model together, and all such ranks whose models share experts.
    """
    raised = torch.tensor(flags, dtype=torch.int, device=device())
    for group in (model.replica_group, model.expert_group):
        if group is not None and group.size() > 1:
            dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=group)
    return raised.bool().tolist()
