"""Rounds of forwards, for ranks that share the experts of a mixture.

Under expert parallelism the ranks that share the experts decode different prompts, and yet no forward of one is done
without all the others: its tokens travel to the experts wherever they are. So a forward is a round that all of these
ranks take part in. A rank with nothing left to decode takes part with one token of its own, whose output nobody reads,
until all ranks are in that state.

    begin_round(model)                       # before each forward
    keep_company(model, block_size)          # behind the last one

Where no experts are shared both do nothing.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_opdlm.models.pipeline import PipelineModel
from megatron_opdlm.parallel.device import device
from megatron_opdlm.rollout.forward import cached_forward
from megatron_opdlm.rollout.kv_cache import KeyValueCache, QueryTokens, attached


def begin_round(model: PipelineModel) -> None:
    """Waits for all ranks that share experts with this one, which call it too or are in `keep_company`."""
    _is_anyone_decoding(model, is_decoding=True)


def keep_company(model: PipelineModel, block_size: int) -> None:
    """Takes part in the rounds of the ranks that still decode; returns once none does.

    All ranks that share experts must call it when they have decoded their prompts, with the tensor- and
    pipeline-parallel ranks beside them. Runs under the caller's no_grad.
    """
    while _is_anyone_decoding(model, is_decoding=False):
        cache, zero = KeyValueCache(1, block_size, block_size), torch.zeros(1, dtype=torch.long, device=device())
        with attached(model, cache):
            for _ in cached_forward(model, cache, QueryTokens(ids_T=zero, rows_T=zero, positions_T=zero)):
                pass


def _is_anyone_decoding(model: PipelineModel, is_decoding: bool) -> bool:
    """Whether any rank is; adds up over the ranks that share experts, which must all call it."""
    if model.expert_group is None:
        return False
    number = torch.tensor(int(is_decoding), device=device())
    dist.all_reduce(number, group=model.expert_group)
    return bool(number)
