"""Which layouts of ranks that share sequences are refused, and in which words."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_opdlm.config.check import check_config
from megatron_opdlm.config.schema import (
    Config,
    ParallelConfig,
    PrecisionConfig,
    RolloutConfig,
    TeacherConfig,
    TrainingConfig,
)
from tests.unit.test_pipeline_settings import ARCHITECTURE


def refusal(parallel: dict, training: dict | None = None, rollout: dict | None = None, world_size: int = 4) -> str:
    training = TrainingConfig(**({"pad_to_multiple": 64} | (training or {})))
    with pytest.raises(ValueError) as caught:
        check_config(
            Config(parallel=ParallelConfig(**parallel), training=training, rollout=RolloutConfig(**(rollout or {}))),
            world_size,
        )
    return str(caught.value)


def test_sizes_that_do_not_fit_are_refused_in_a_sentence():
    two = {"context_parallel_size": 2}
    assert refusal({"context_parallel_size": 0}) == "parallel.context_parallel_size (0) must be at least 1"
    assert refusal(two, world_size=3) == "parallel.context_parallel_size (2) must divide the number of processes (3)"
    assert refusal(two | {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2}, world_size=24) == (
        "parallel.tensor_model_parallel_size x parallel.context_parallel_size x parallel.pipeline_model_parallel_size "
        "(16) must divide the number of processes (24)"
    )
    assert refusal(two, {"pad_to_multiple": 12}) == (
        "training.pad_to_multiple (12) must be a multiple of parallel.context_parallel_size (2) x rollout.block_size "
        "(4) = 8"
    )
    sequence_parallel = {"tensor_model_parallel_size": 8, "sequence_parallel": True}
    assert refusal(two | sequence_parallel, {"pad_to_multiple": 24}) == (
        "training.pad_to_multiple (24) must be a multiple of parallel.context_parallel_size (2) x "
        "parallel.tensor_model_parallel_size (8) = 16 under parallel.sequence_parallel"
    )
    assert refusal(two, rollout={"logit_shift": "next_token"}) == (
        "rollout.logit_shift (next_token) must be none under parallel.context_parallel_size (2): the output before a "
        "rank's first position is with another rank"
    )


def test_ranks_that_share_sequences_have_the_same_rows_so_data_parallelism_is_what_they_leave():
    parallel = {"context_parallel_size": 4, "tensor_model_parallel_size": 2}
    check_config(Config(parallel=ParallelConfig(**parallel), training=TrainingConfig(global_batch_size=8)), 64)
    assert refusal(parallel, {"global_batch_size": 8, "num_prompts_per_step": 8}, world_size=128).startswith(
        "training.global_batch_size (8) must be a multiple of training.micro_batch_size (1) x data-parallel size (16)"
    )


def test_fp8_rows_are_multiples_on_every_part():
    config = Config(
        parallel=ParallelConfig(context_parallel_size=4),
        precision=PrecisionConfig(fp8="tensorwise"),
        training=TrainingConfig(pad_to_multiple=32),
    )
    expected = r"training.pad_to_multiple \(32\) must be a multiple of 64 under precision.fp8 \(tensorwise\)"
    with pytest.raises(ValueError, match=expected):
        check_config(config, None)


def test_heads_that_cannot_be_shared_out_are_refused():
    from megatron_opdlm.models.build import transformer_config

    architecture = dataclasses.replace(ARCHITECTURE, num_attention_heads=8, num_key_value_heads=4)
    expected = (
        r"parallel.context_parallel_size \(4\) must divide num_key_value_heads \(4\) / "
        r"parallel.tensor_model_parallel_size \(2\) = 2"
    )
    parallel = ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=4)
    with pytest.raises(ValueError, match=expected):
        transformer_config(architecture, parallel=parallel, dtype="float32", overrides={})


def test_the_argmax_fill_is_refused_where_ranks_share_sequences():
    config = Config(parallel=ParallelConfig(context_parallel_size=2), teacher=TeacherConfig(fill="argmax"))
    with pytest.raises(ValueError, match=r"teacher.fill \(argmax\) must be terminal under parallel.context_parallel_s"):
        check_config(config, 4)
