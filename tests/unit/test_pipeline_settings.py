"""How a layout of pipeline stages becomes Megatron's configuration."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_opdlm.config.schema import ParallelConfig
from megatron_opdlm.models.qwen3 import Qwen3Architecture

ARCHITECTURE = Qwen3Architecture(
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=8,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    vocab_size=32,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    dtype="float32",
)


def settings(num_stages: int, num_chunks: int | None = None, num_layers: int = 8):
    from megatron_opdlm.models.build import transformer_config

    architecture = dataclasses.replace(ARCHITECTURE, num_hidden_layers=num_layers)
    parallel = ParallelConfig(pipeline_model_parallel_size=num_stages, virtual_pipeline_model_parallel_size=num_chunks)
    return transformer_config(architecture, parallel=parallel, dtype="float32", overrides={})


def test_only_stages_of_one_chunk_exchange_shapes_and_only_stages_of_several_overlap_their_messages():
    assert [settings(*case).variable_seq_lengths for case in ((1,), (2,), (2, 2))] == [False, True, False]
    assert [settings(*case).batch_p2p_comm for case in ((1,), (2,), (2, 2))] == [True, True, False]
    assert [settings(*case).overlap_p2p_comm for case in ((1,), (2,), (2, 2))] == [False, False, True]


@pytest.mark.parametrize("case", [(3, None, 8), (2, 2, 6)])
def test_layers_that_do_not_spread_evenly_are_refused(case):
    num_stages, num_chunks, num_layers = case
    expected = rf"\({num_stages * (num_chunks or 1)}\) must divide num_hidden_layers \({num_layers}\)"
    with pytest.raises(ValueError, match=expected):
        settings(*case)
