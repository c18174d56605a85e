"""Parts of a plan that need no measuring: what a schedule holds, what an option adds, what a cache may take."""

from __future__ import annotations

import doctest
from dataclasses import replace

import pytest

from megatron_opdlm.config import limits
from megatron_opdlm.config.schema import (
    Config,
    DataConfig,
    DivergenceConfig,
    ParallelConfig,
    PrecisionConfig,
    RolloutConfig,
    StatesConfig,
    TeacherConfig,
    TrainingConfig,
)
from megatron_opdlm.planning.activations import TokenShape, in_flight
from megatron_opdlm.planning.layout import Layout
from megatron_opdlm.planning.memory import GIB, Models, plan_memory
from megatron_opdlm.planning.published import published
from megatron_opdlm.planning.workload import Workload, rows_per_response

MODELS = Models(published("qwen3-8b"), published("qwen3-8b"))
CONFIG = Config(data=DataConfig(max_prompt_tokens=96), rollout=RolloutConfig(max_new_tokens=1000))


def plan(config: Config, num_ranks: int = 8, stage: int = 0):
    return plan_memory(MODELS, config, Layout.of(config.parallel, num_ranks), Workload.of(config), stage)


def test_one_forward_one_backward_holds_as_many_micro_batches_as_stages_are_left():
    layout = Layout.of(ParallelConfig(pipeline_model_parallel_size=4), 4)
    assert [in_flight(layout, stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(layout, 0, 2) == 2 and in_flight(replace(layout, pipeline=1), 0, 8) == 1


@pytest.mark.parametrize("num_micro_batches", [4, 8])
def test_the_interleaved_schedule_holds_what_megatron_warms_up_with(num_micro_batches):
    from unittest import mock

    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    import megatron_opdlm.parallel  # noqa: F401

    parallel = ParallelConfig(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=2)
    layout, schedules = Layout.of(parallel, 4), "megatron.core.pipeline_parallel.schedules.parallel_state."
    for stage in range(4):
        with (
            mock.patch(schedules + "get_pipeline_model_parallel_world_size", return_value=4),
            mock.patch(schedules + "get_pipeline_model_parallel_rank", return_value=stage),
            mock.patch(schedules + "get_virtual_pipeline_model_parallel_world_size", return_value=2),
        ):
            counts = get_pp_rank_microbatches(num_micro_batches, 2, 4)
        warm_up = counts[2]
        assert in_flight(layout, stage, num_micro_batches) == min(warm_up + 1, 2 * num_micro_batches)


def test_lasting_bytes_of_the_8b_on_eight_ranks_worked_out_by_hand():
    parts, count = plan(CONFIG).parts, 8_190_735_360
    assert parts["weights"] == pytest.approx(2 * count, rel=1e-6)
    assert parts["gradients"] == pytest.approx(4 * count, rel=1e-6)
    assert parts["optimizer"] == pytest.approx(12 * count / 8, rel=1e-6)
    assert parts["teacher"] == 2 * count


def test_an_offloaded_teacher_leaves_its_output_layer_and_comes_back_for_its_forward():
    offloaded, stays = plan(replace(CONFIG, teacher=TeacherConfig(offload=True))), plan(CONFIG)
    assert offloaded.parts["teacher"] == 2 * 151936 * 4096
    assert stays.phases["teacher"] == offloaded.phases["teacher"]
    saved = stays.phases["student"] - offloaded.phases["student"]
    assert saved == stays.parts["teacher"] - offloaded.parts["teacher"]


def test_chunks_of_logits_take_what_their_buffers_count():
    narrow, wide, jsd = (
        plan(replace(CONFIG, divergence=divergence)).parts["logits"]
        for divergence in (DivergenceConfig(), DivergenceConfig(chunk_size=256), DivergenceConfig(kind="jsd"))
    )
    assert wide - narrow == 3 * 128 * 151936 * 4
    assert jsd - narrow == 128 * 151936 * 4


def test_full_recompute_keeps_the_input_of_every_layer_alone():
    full = TokenShape.of(MODELS.student, Layout.of(ParallelConfig(), 1), "transformer_engine", 2)
    assert full.layer_bytes("full") == 4096 * 2
    assert full.layer_bytes("none") > 10 * full.layer_bytes("full")
    parallel = ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True)
    shared = TokenShape.of(MODELS.student, Layout.of(parallel, 4), "transformer_engine", 2)
    assert shared.layer_bytes("full") == 4096 * 2 / 4
    assert shared.layer_bytes("none") == pytest.approx(full.layer_bytes("none") / 4, rel=1e-3)


def test_activations_on_transformer_engines_layers_are_the_tensors_that_its_modules_save():
    stream, heads, keys, mlp = 2 * 4096, 2 * 32 * 128, 2 * 8 * 128, 2 * 12288  # bytes of a token
    norm_and_linear = 2 * stream + 4  # input, normalised input, 1 / rms
    attention = heads + 2 * keys  # one tensor, of which the values are a view
    attention += 2 * (heads + keys) + 4 * (32 + 8)  # before and after QK-norm and RoPE; 1 / rms of every head
    attention += 2 * heads + 4 * 32  # outputs, the same as the next linear layer's input, log-sum-exps
    layer = 2 * norm_and_linear + attention + 3 * mlp
    behind = 2 * stream + 4 + stream  # the final norm's, and its result
    rows = 1152  # 96 + 1000, to a multiple of 64
    angles = 4 * 128 * 2 * rows  # cosines and sines for queries and for keys, the same for both streams
    assert plan(CONFIG).parts["activations"] == 36 * (2 * rows * layer + angles) + 2 * rows * behind


def test_a_rank_with_whole_experts_gets_its_part_of_the_copies_and_one_with_shards_those_of_all():
    sizes = {"tensor_model_parallel_size": 4, "sequence_parallel": True, "expert_model_parallel_size": 4}
    of_shards, whole = (
        TokenShape.of(published("qwen3-30b-a3b"), Layout.of(ParallelConfig(**sizes, **more), 16), "local", 2)
        for more in ({}, {"expert_tensor_parallel_size": 1})
    )
    assert (of_shards.copies, of_shards.ffn) == (8, 768 / 4)
    assert (whole.copies, whole.ffn) == (8 / 4, 768)
    assert of_shards.sent == whole.sent == 8 / 4


def test_a_mixtures_experts_pass_several_copies_of_every_token_around():
    layout = Layout.of(ParallelConfig(expert_model_parallel_size=8), 8)
    shape = TokenShape.of(published("qwen3-30b-a3b"), layout, "transformer_engine", 2)
    # twice what is sent and came, their sorted copy, and the outputs, as they are and sorted
    assert shape.forward_work_bytes() == 2 * (2 * 2048 + 8 * 2048 * 5)
    assert shape.backward_work_bytes() == 2 * (2 * 2048 + 8 * 2048 * 4)


def test_the_backward_pass_of_a_sharded_matrix_gathers_its_input_under_sequence_parallelism():
    parallel = ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True)
    shape = TokenShape.of(MODELS.student, Layout.of(parallel, 4), "transformer_engine", 2)
    assert shape.backward_work_bytes() == 2 * (2 * 1024 + 2 * 3072 + 2 * 4096)
    alone = TokenShape.of(MODELS.student, Layout.of(ParallelConfig(), 1), "transformer_engine", 2)
    assert alone.backward_work_bytes() == 2 * (2 * 4096 + 3 * 12288)


def test_the_cache_takes_what_all_sequences_need_within_its_share_of_what_is_free():
    whole = plan(CONFIG)
    by_token = 2 * 36 * 8 * 128 * 2
    assert whole.cache_bytes_per_token == by_token
    assert whole.cache_wanted == by_token * 1280 * 16  # 1,096 tokens are 5 pages; 128 prompts over 8 ranks
    plenty = whole.cache_bytes(1000 * GIB)
    assert plenty == whole.cache_wanted
    free = 1 * GIB
    tight = whole.phases["rollout"] - whole.parts["least cache"] + free
    assert whole.cache_bytes(tight) == pytest.approx(0.8 * free)


def test_fp8_copies_are_those_of_the_linear_layers():
    config = replace(CONFIG, precision=PrecisionConfig(fp8="delayed", teacher_fp8="tensorwise"))
    linear = 36 * (4096 * (32 + 16 + 32) * 128 + 3 * 4096 * 12288)
    assert plan(config).parts["fp8 copies"] == 3 * linear


def test_only_the_last_stage_has_the_loss():
    parallel = ParallelConfig(pipeline_model_parallel_size=2)
    config = replace(CONFIG, parallel=parallel, training=TrainingConfig(global_batch_size=8))
    first, last = plan(config, stage=0), plan(config, stage=1)
    assert first.parts["logits"] == first.parts["targets"] == 0 < last.parts["logits"]


@pytest.mark.parametrize(
    "states", [StatesConfig(), *(StatesConfig(selection="all_steps", shrink=k) for k in (1, 2, 3))]
)
def test_rows_of_a_response_are_the_methods(states):
    from megatron_opdlm.diffusion.state_selections import rows_per_trajectory

    assert rows_per_response(replace(CONFIG, states=states)) == rows_per_trajectory(states, 4)


def test_lengths_have_the_mean_asked_for_and_stay_within_the_limit():
    workload = Workload.of(CONFIG, response_tokens=400)
    lengths = workload.sample_lengths(4000, seed=0)
    assert max(lengths) <= 1000 and sum(lengths) / len(lengths) == pytest.approx(400, rel=0.05)
    assert all(length % 4 == 0 for length in lengths) and lengths == workload.sample_lengths(4000, seed=0)


@pytest.mark.parametrize("wrong", [{"response_tokens": 1001}, {"tokens_per_step": 5}, {"tokens_per_step": 0.5}])
def test_a_workload_that_no_rollout_can_have_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).replace("_", "-")):
        Workload.of(CONFIG, **wrong)


def test_as_many_positions_are_drawn_together_as_the_vocabulary_leaves_room_for():
    assert doctest.testmod(limits).failed == 0
    small, large = (limits.drawn_together(num_rows) * num_rows for num_rows in (1000, 152_064))
    assert small <= 2**22 < large == 256 * 152_064
