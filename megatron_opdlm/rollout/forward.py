"""The student's forward over a flat list of tokens with a key-value cache."""

from __future__ import annotations

from collections.abc import Generator

import torch

from megatron_opdlm.models.fp8 import without_fp8
from megatron_opdlm.models.pipeline import PipelineModel
from megatron_opdlm.rollout.kv_cache import KeyValueCache, PlacedTokens


def cached_forward(
    model: PipelineModel, cache: KeyValueCache, placed: PlacedTokens
) -> Generator[None, None, torch.Tensor | None]:
    """Hidden states `[T, H]` of the tokens on the last pipeline stage, None on the others.

    Their keys and values go into the cache, which must be attached. Under sequence parallelism the list is filled up to
    a multiple of the tensor-parallel size. All ranks of the tensor- and pipeline-parallel groups must call it with the
    same tokens. Yields between the chunks of a stage (`rollout.turns`).
    """
    num_tokens = len(placed.ids_T)
    shards = model.config.tensor_model_parallel_size if model.config.sequence_parallel else 1
    padding = -num_tokens % shards
    ids, positions = (torch.nn.functional.pad(x, (0, padding)) for x in (placed.ids_T, placed.positions_T))
    for chunk in model.chunks:
        if chunk is not model.chunks[0]:
            yield
        cache.begin_forward(placed)
        with without_fp8(chunk):
            hidden = model.run(chunk, ids[None], positions, None)
    return model.whole_sequence(hidden)[:num_tokens, 0] if model.is_last_stage else None
