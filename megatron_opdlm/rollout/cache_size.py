"""How many pages the key-value cache of a rollout has.

It has what all slots need for the longest sequences that they may become, unless that is more than
`rollout.cache_gib`, or than the memory that is free; then sequences share what there is, and wait for each other where
it is too little.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist

from megatron_opdlm.models.pipeline import PipelineModel

SHARE_OF_FREE_MEMORY = 0.8
"""The rest is for the activations and the logits of a forward."""
_GIB = 2**30


@dataclass(frozen=True)
class CacheSize:
    """The same on all ranks that hold one model together."""

    num_pages: int
    """Of each decoder."""
    pages_of_longest: int
    """That the longest sequence takes."""
    gib: float
    """Memory of all decoders' pages on this rank."""


def cache_size(
    model: PipelineModel, *, page_size: int, longest: int, num_slots: int, num_decoders: int, cache_gib: float | None
) -> CacheSize:
    """The pages of `num_decoders` decoders with `num_slots` slots each, for sequences of up to `longest` tokens.

    Communicates over the tensor- and pipeline-parallel ranks, who must all call it. ValueError if not even one of the
    longest sequences of each decoder finds room.
    """
    pages_of_longest, size = -(-longest // page_size), _page_bytes(model, page_size)
    where = next(model.parameters()).device
    limit = SHARE_OF_FREE_MEMORY * _free_bytes(where) if cache_gib is None else cache_gib * _GIB
    # One page belongs to nobody. Ranks differ in their free memory, and stages in their layers.
    fitting = torch.tensor((int(limit / size) - 1) // num_decoders, device=where)
    dist.all_reduce(fitting, dist.ReduceOp.MIN, group=model.replica_group)
    num_pages = min(num_slots * pages_of_longest, int(fitting))
    if num_pages < pages_of_longest:
        least = (num_decoders * pages_of_longest + 1) * size / _GIB
        raise ValueError(
            f"rollout.cache_gib ({limit / _GIB:.3g}{' free' if cache_gib is None else ''}) must be at least "
            f"{least:.3g}, for {num_decoders} sequence(s) of {longest} tokens"
        )
    return CacheSize(num_pages, pages_of_longest, num_decoders * num_pages * size / _GIB)


def _page_bytes(model: PipelineModel, page_size: int) -> int:
    """Keys and values of all layers of this rank."""
    config = model.config
    num_groups = max(1, config.num_query_groups // config.tensor_model_parallel_size)
    num_layers = sum(len(chunk.decoder.layers) for chunk in model.chunks)
    return 2 * page_size * num_layers * num_groups * config.kv_channels * config.params_dtype.itemsize


def _free_bytes(device: torch.device) -> int:
    """Memory that this process may take: of its GPU, also what PyTorch holds and does not use; or its share of the
    host's."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
