"""The student's forward over a flat list of tokens with a key-value cache."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from megatron_opdlm.models.build import Qwen3Model
from megatron_opdlm.models.fp8 import without_fp8
from megatron_opdlm.rollout.kv_cache import KeyValueCache, QueryTokens


def cached_forward(model: Qwen3Model, cache: KeyValueCache, tokens: QueryTokens) -> torch.Tensor:
    """Hidden states `[T, H]` of the tokens; their keys and values go into the cache, which must be attached.

    Under sequence parallelism the list is filled up to a multiple of the tensor-parallel size. All ranks of the
    tensor-parallel group must call it with the same tokens.
    """
    num_tokens = len(tokens.ids_T)
    shards = model.config.tensor_model_parallel_size if model.config.sequence_parallel else 1
    padding = -num_tokens % shards
    ids, positions = (torch.nn.functional.pad(x, (0, padding)) for x in (tokens.ids_T, tokens.positions_T))
    cache.begin_forward(tokens)
    with without_fp8(model):
        hidden = model.whole_sequence(model(ids[None], positions, None))
    return hidden[:num_tokens, 0]


def whole_logits(model: Qwen3Model, hidden_NH: torch.Tensor, vocab_size: int, mask_token_id: int) -> torch.Tensor:
    """Float32 logits `[N, vocab_size]`, gathered over the tensor-parallel group; the mask token's are minus infinity.

    All ranks of the group must call it with the same N.
    """
    logits = gather_from_tensor_model_parallel_region(model.vocab_parallel_logits(hidden_NH))
    logits = logits[:, :vocab_size].float()
    logits[:, mask_token_id] = float("-inf")
    return logits
