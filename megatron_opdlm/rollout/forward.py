"""The student's forward over a flat list of tokens with a key-value cache."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

import torch

from megatron_opdlm.models.fp8 import without_fp8
from megatron_opdlm.models.pipeline import PipelineModel
from megatron_opdlm.models.rotary import Rotation
from megatron_opdlm.rollout.kv_cache import KeyValueCache, PlacedTokens


def cached_forward(
    model: PipelineModel, cache: KeyValueCache, placed: PlacedTokens
) -> Generator[None, None, torch.Tensor | None]:
    """Hidden states `[N, H]` of the tokens that are read on the last pipeline stage, None on the others.

    Their keys and values go into the cache, which must be attached. Under sequence parallelism the list is filled up to
    a multiple of the tensor-parallel size, and all of it goes through the whole last layer; elsewhere only the tokens
    that are read do. All ranks of the tensor- and pipeline-parallel groups must call it with the same tokens. Yields
    between the chunks of a stage (`rollout.turns`).
    """
    num_tokens = len(placed.ids_T)
    shards = model.config.tensor_model_parallel_size if model.config.sequence_parallel else 1
    ids = torch.nn.functional.pad(placed.ids_T, (0, -num_tokens % shards))
    selected_late = placed.read_N if shards > 1 else None
    rotation = Rotation.by(model.chunks[0].rotary_angles(placed.positions_T), model.config.params_dtype)
    for chunk in model.chunks:
        if chunk is not model.chunks[0]:
            yield
        cache.begin_forward(placed if selected_late is None else replace(placed, read_N=None), rotation)
        with without_fp8(chunk):
            hidden = model.run(chunk, ids[None], None, None)
    if not model.is_last_stage:
        return None
    hidden_TH = model.whole_sequence(hidden)[:num_tokens, 0]
    return hidden_TH if selected_late is None else hidden_TH[selected_late]
