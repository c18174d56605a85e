"""The student's forward over a flat list of tokens with a key-value cache, and the shard of the logits it gives."""

from __future__ import annotations

from collections.abc import Generator

import torch

from megatron_opdlm.data.special_tokens import SpecialTokens
from megatron_opdlm.models.fp8 import without_fp8
from megatron_opdlm.models.pipeline import PipelineModel
from megatron_opdlm.parallel.vocabulary_shard import VocabularyShard
from megatron_opdlm.rollout.kv_cache import KeyValueCache, QueryTokens


def cached_forward(
    model: PipelineModel, cache: KeyValueCache, tokens: QueryTokens
) -> Generator[None, None, torch.Tensor | None]:
    """Hidden states `[T, H]` of the tokens on the last pipeline stage, None on the others.

    Their keys and values go into the cache, which must be attached. Under sequence parallelism the list is filled up to
    a multiple of the tensor-parallel size. All ranks of the tensor- and pipeline-parallel groups must call it with the
    same tokens. Yields between the chunks of a stage (`rollout.turns`).
    """
    num_tokens = len(tokens.ids_T)
    shards = model.config.tensor_model_parallel_size if model.config.sequence_parallel else 1
    padding = -num_tokens % shards
    ids, positions = (torch.nn.functional.pad(x, (0, padding)) for x in (tokens.ids_T, tokens.positions_T))
    for chunk in model.chunks:
        if chunk is not model.chunks[0]:
            yield
        cache.begin_forward(tokens)
        with without_fp8(chunk):
            hidden = model.run(chunk, ids[None], positions, None)
    return model.whole_sequence(hidden)[:num_tokens, 0] if model.is_last_stage else None


def vocabulary_shard(model: PipelineModel, special: SpecialTokens) -> VocabularyShard:
    """Which rows of the vocabulary the logits of this rank of the last pipeline stage are."""
    num_rows, group = len(model.output_weight), model.chunks[-1].pg_collection.tp
    return VocabularyShard(group.rank() * num_rows, num_rows, special.vocab_size, special.mask_token_id, group)
