"""Rules that tie settings together: each violation names the setting, its value and the rule."""

from __future__ import annotations

import pytest

from megatron_opdlm.config.check import check_config
from megatron_opdlm.config.load import load_config
from megatron_opdlm.config.schema import (
    Config,
    ParallelConfig,
    PrecisionConfig,
    TrainingConfig,
)
from tests.unit.test_config import message_of


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("rollout.denoising_steps_per_block=5", "(5) must not exceed rollout.block_size (4)"),
        ("rollout.denoising_steps_per_block=0", "(0) must be at least 1"),
        ("rollout.block_size=0", "rollout.block_size (0) must be at least 1"),
        ("rollout.max_new_tokens=0", "rollout.max_new_tokens (0) must be at least 1"),
        ("rollout.max_new_tokens_by_domain.math=0", "rollout.max_new_tokens_by_domain.math (0) must be at least 1"),
        ("rollout.temperature=-0.1", "rollout.temperature (-0.1) must be at least 0"),
        ("rollout.temperature=.nan", "rollout.temperature (nan) must be at least 0"),
        ("rollout.top_p=0", "rollout.top_p (0.0) must be over 0 and at most 1"),
        ("rollout.top_k=-1", "rollout.top_k (-1) must be at least 0"),
        ("rollout.entropy_bound=-0.1", "rollout.entropy_bound (-0.1) must be at least 0"),
        ("rollout.entropy_bound=.nan", "rollout.entropy_bound (nan) must be at least 0"),
        ("rollout.dynamic_threshold=1.5", "rollout.dynamic_threshold (1.5) must lie between 0 and 1"),
        ("divergence.chunk_size=0", "divergence.chunk_size (0) must be at least 1"),
        ("logging.trajectory_interval=-1", "logging.trajectory_interval (-1) must be at least 0"),
        ("logging.num_trajectories=0", "logging.num_trajectories (0) must be at least 1"),
        ("divergence.top_k=-1", "divergence.top_k (-1) must be at least 0"),
        ("divergence.kind=kl", "divergence.kind (kl) must be one of forward_kl, reverse_kl, mixture, jsd"),
        ("divergence.reverse_weight=1.1", "divergence.reverse_weight (1.1) must lie between 0 and 1"),
        ("divergence.jsd_alpha=1", "divergence.jsd_alpha (1.0) must be over 0 and below 1"),
        ("divergence.jsd_alpha=.nan", "divergence.jsd_alpha (nan) must be over 0 and below 1"),
        (
            "divergence.kind=jsd divergence.top_k=16",
            "divergence.top_k_tail (none) must be renormalize or bucket under divergence.kind (jsd)",
        ),
        ("divergence.teacher_temperature=0", "divergence.teacher_temperature (0.0) must be over 0"),
        ("divergence.teacher_top_k=-1", "divergence.teacher_top_k (-1) must be at least 0"),
        ("divergence.teacher_top_p=0", "divergence.teacher_top_p (0.0) must be over 0 and at most 1"),
        ("divergence.teacher_min_p=2", "divergence.teacher_min_p (2.0) must lie between 0 and 1"),
        (
            "divergence.kind=reverse_kl divergence.teacher_top_p=0.9",
            "divergence.teacher_top_p (0.9) must be 1 under divergence.kind (reverse_kl): KL(student || teacher) is",
        ),
        (
            "divergence.kind=mixture divergence.teacher_top_k=5",
            "divergence.teacher_top_k (5) must be 0 under divergence.kind (mixture)",
        ),
        ("training.loss_reduction=mean", "training.loss_reduction (mean) must be one of sequence, token"),
        ("curricula.length_start=0", "curricula.length_start (0) must be at least 1"),
        ("curricula.threshold_hold_steps=-1", "curricula.threshold_hold_steps (-1) must be at least 0"),
        ("curricula.threshold_start=1.5", "curricula.threshold_start (1.5) must lie between 0 and 1"),
        (
            "curricula.threshold_start=1 rollout.remasking_strategy=sequential",
            "curricula.threshold_start (1.0) needs rollout.remasking_strategy (sequential) to be "
            "low_confidence_dynamic, which alone has a threshold",
        ),
        ("lora.rank=-1", "lora.rank (-1) must be at least 0"),
        ("lora.alpha=0", "lora.alpha (0.0) must be over 0"),
        ("lora.target_modules=[]", "lora.target_modules () must not be empty"),
        ("lora.target_modules=linear_qkv,linear_qkv", "lora.target_modules (linear_qkv, linear_qkv) must not have one"),
        ("lora.target_modules=linear_q", "must be a list, each item one of linear_qkv, linear_proj, linear_fc1"),
        ("evaluation.sweep.thresholds=0.5,1.5", "evaluation.sweep.thresholds (1.5) must lie between 0 and 1"),
        ("evaluation.sweep.thresholds=0.5,1,0.5", "evaluation.sweep.thresholds ([0.5, 1.0, 0.5]) must have 0.5 only"),
        ("evaluation.sweep.block_sizes=4,0", "evaluation.sweep.block_sizes (0) must be at least 1"),
        ("evaluation.sweep.block_sizes=4.5", "evaluation.sweep.block_sizes (4.5) must be a list, each item an integer"),
        (
            "evaluation.sweep.block_sizes=4,8192",
            "rollout.max_tokens_in_flight (8192) must be at least two blocks of evaluation.sweep.block_sizes (8192)",
        ),
        ("states.shrink=0", "states.shrink (0) must be at least 1"),
        ("states.shrink=2", "states.shrink (2) needs states.selection (one_per_block) to be all_steps"),
        ("optimizer.min_lr=1", "optimizer.lr (1e-05) must not be below optimizer.min_lr (1.0)"),
        ("optimizer.min_lr=-1", "optimizer.min_lr (-1.0) must be at least 0"),
        ("optimizer.adam_beta2=1", "optimizer.adam_beta2 (1.0) must be at least 0 and below 1"),
        ("training.num_prompts_per_step=12", "(12) must be a multiple of training.global_batch_size (8)"),
        ("training.pad_to_multiple=6", "training.pad_to_multiple (6) must be a multiple of rollout.block_size (4)"),
        ("parallel.sequence_parallel=true", "needs parallel.tensor_model_parallel_size (1) to be over 1"),
        ("parallel.pipeline_model_parallel_size=0", "parallel.pipeline_model_parallel_size (0) must be at least 1"),
        (
            "parallel.pipeline_model_parallel_size=2 parallel.virtual_pipeline_model_parallel_size=1",
            "parallel.virtual_pipeline_model_parallel_size (1) must be at least 2",
        ),
        (
            "parallel.virtual_pipeline_model_parallel_size=2",
            "(2) needs parallel.pipeline_model_parallel_size (1) to be over 1",
        ),
        ("parallel.expert_model_parallel_size=0", "parallel.expert_model_parallel_size (0) must be at least 1"),
        (
            "parallel.expert_tensor_parallel_size=2",
            "parallel.expert_tensor_parallel_size (2) must divide parallel.tensor_model_parallel_size (1)",
        ),
        (
            "parallel.expert_model_parallel_size=2 parallel.tensor_model_parallel_size=2",
            "beside parallel.tensor_model_parallel_size (2) needs parallel.sequence_parallel (false) to be true",
        ),
        (
            "parallel.expert_model_parallel_size=2 parallel.pipeline_model_parallel_size=2 "
            "parallel.virtual_pipeline_model_parallel_size=2",
            "virtual_pipeline_model_parallel_size (2) must be null under parallel.expert_model_parallel_size (2)",
        ),
        ("rollout.pipeline_micro_groups=0", "rollout.pipeline_micro_groups (0) must be at least 1"),
        ("rollout.pipeline_micro_groups=2", "(2) needs parallel.pipeline_model_parallel_size (1) to be over 1"),
        (
            'teacher.transformer={"num_layers_in_first_pipeline_stage":3}',
            "teacher.transformer.num_layers_in_first_pipeline_stage (3) must be left out",
        ),
        ("parallel.distributed_timeout_minutes=0", "parallel.distributed_timeout_minutes (0.0) must be over 0"),
        ("checkpoint.keep=-1", "checkpoint.keep (-1) must be at least 0"),
        ("evaluation.max_tasks=0", "evaluation.max_tasks (0) must be at least 1"),
        ("evaluation.code_processes=0", "evaluation.code_processes (0) must be at least 1"),
        ("data.max_prompt_tokens=0", "data.max_prompt_tokens (0) must be at least 1"),
        ("student.hf=a student.checkpoint=b", "student.hf (a) and student.checkpoint (b) exclude each other: give one"),
        ("student.mask_token=", "student.mask_token () must not be empty"),
        ("precision.teacher_fp8=delayed", "precision.teacher_fp8 (delayed) must be off, tensorwise or blockwise"),
        (
            "precision.fp8=delayed precision.dtype=float32",
            "precision.fp8 (delayed) needs precision.dtype (float32) to be bfloat16",
        ),
        (
            "precision.teacher_fp8=tensorwise precision.dtype=float32",
            "precision.teacher_fp8 (tensorwise) needs precision.dtype (float32) to be bfloat16",
        ),
        (
            "precision.fp8=tensorwise training.pad_to_multiple=24",
            "(24) must be a multiple of 16 under precision.fp8 (tensorwise)",
        ),
        (
            "precision.teacher_fp8=blockwise training.pad_to_multiple=24",
            "(24) must be a multiple of 16 under precision.teacher_fp8 (blockwise)",
        ),
        ("attention.fp8=true", "attention.fp8 (true) needs precision.fp8 (off) to be delayed or tensorwise"),
        (
            "attention.fp8=true precision.fp8=delayed attention.backend=aten",
            "attention.fp8 (true) needs attention.backend (aten) to be te or auto",
        ),
        (
            'student.transformer={"fp8":"hybrid"}',
            "student.transformer.fp8 (hybrid) needs a recipe, which precision.fp8",
        ),
        (
            'student.transformer={"fp8_dot_product_attention":true} precision.fp8=delayed',
            "student.transformer.fp8_dot_product_attention (True) must be left out: attention.fp8 chooses",
        ),
        (
            'student.transformer={"attention_dropout":0.1}',
            "student.transformer.attention_dropout (0.1) must be left out: training and rollout are the same function",
        ),
        (
            'teacher.transformer={"context_parallel_size":2}',
            "teacher.transformer.context_parallel_size (2) must be left out: parallel.* decides the layout",
        ),
        (
            'student.transformer={"window_size":[128,0]}',
            "student.transformer.window_size ([128, 0]) must be left out: attention is a plain softmax",
        ),
        (
            'student.transformer={"tp_comm_overlap":true}',
            "student.transformer.tp_comm_overlap (True) must be left out: Transformer Engine's user buffers take one",
        ),
        (
            'student.transformer={"no_sync_func":"f"}',
            "student.transformer.no_sync_func (f) must be left out: parallel.overlap_grad_reduce",
        ),
        ("training.recompute=half", "training.recompute (half) must be one of none, selective, full"),
        (
            'training.recompute=full student.transformer={"recompute_modules":["mlp"]}',
            "student.transformer.recompute_modules (['mlp']) must be left out under training.recompute (full)",
        ),
        (
            'teacher.transformer={"recompute_granularity":"full"}',
            "teacher.transformer.recompute_granularity (full) must be left out: the teacher has no backward pass",
        ),
        ("optimizer.cpu_offload_fraction=1.5", "optimizer.cpu_offload_fraction (1.5) must lie between 0 and 1"),
        (
            "optimizer.cpu_offload_fraction=0.5 precision.dtype=float32",
            "optimizer.cpu_offload_fraction (0.5) needs precision.dtype (float32) to be bfloat16",
        ),
        (
            "precision.fp8=blockwise attention.fp8=true",
            "attention.fp8 (true) needs precision.fp8 (blockwise) to be delayed",
        ),
        (
            'teacher.transformer={"fp8_recipe":"delayed"} precision.teacher_fp8=tensorwise',
            "teacher.transformer.fp8_recipe (delayed) must be left out: precision.fp8 and precision.teacher_fp8 choose",
        ),
    ],
)
def test_rules_between_settings_are_checked_when_loading(flags, expected):
    assert expected in message_of([f"--{flag}" for flag in flags.split(" ")])


def test_a_divergence_takes_what_it_is_defined_for():
    for kind in ("forward_kl", "reverse_kl", "mixture", "jsd"):
        for tail in ("renormalize", "bucket"):
            flags = ["--divergence.top_k=16", f"--divergence.top_k_tail={tail}", "--divergence.teacher_temperature=0.5"]
            assert load_config([f"--divergence.kind={kind}", *flags]).divergence.top_k_tail == tail
    for kind in ("forward_kl", "jsd"):
        filters = ["--divergence.teacher_top_k=5", "--divergence.teacher_top_p=0.9", "--divergence.teacher_min_p=0.1"]
        assert load_config([f"--divergence.kind={kind}", *filters]).divergence.teacher_top_k == 5


def test_rows_split_evenly_over_sequence_parallel_ranks():
    parallel = ParallelConfig(tensor_model_parallel_size=3, sequence_parallel=True)
    with pytest.raises(ValueError, match=r"pad_to_multiple \(64\) must be a multiple of parallel.tensor_model"):
        check_config(Config(parallel=parallel), None)
    check_config(Config(parallel=parallel, training=TrainingConfig(pad_to_multiple=24)), None)


@pytest.mark.parametrize(("recipe_name", "multiple"), [("tensorwise", 32), ("delayed", 32), ("blockwise", 256)])
def test_each_sequence_parallel_rank_gets_a_part_that_fp8_can_take(recipe_name, multiple):
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
    precision = PrecisionConfig(fp8=recipe_name)

    def config(padding: int) -> Config:
        return Config(parallel=parallel, precision=precision, training=TrainingConfig(pad_to_multiple=padding))

    check_config(config(multiple), None)
    with pytest.raises(ValueError, match=rf"must be a multiple of {multiple} under precision.fp8 \({recipe_name}\)"):
        check_config(config(multiple // 2), None)


def test_processes_must_divide_into_tensor_and_data_parallel_groups():
    flags = ["--parallel.tensor_model_parallel_size=2"]
    load_config(flags, world_size=16)
    assert "(2) must divide the number of processes (3)" in message_of(flags, world_size=3)
    expected = "training.global_batch_size (8) must be a multiple of training.micro_batch_size (1) x data-parallel size"
    assert message_of(flags, world_size=6) == f"{expected} (3) = 3"


def test_experts_take_their_share_of_the_processes():
    flags = ["--parallel.expert_model_parallel_size=4"]
    expected = "parallel.expert_model_parallel_size (4) must divide the number of processes (6)"
    assert expected in message_of(flags, world_size=6)
    load_config(flags, world_size=8)


def test_pipeline_stages_take_their_share_of_the_processes_and_chunks_whole_rounds_of_micro_batches():
    flags = ["--parallel.tensor_model_parallel_size=2", "--parallel.pipeline_model_parallel_size=4"]
    load_config(flags, world_size=16)
    assert "pipeline_model_parallel_size (8) must divide the number of processes (4)" in message_of(flags, world_size=4)
    flags.append("--parallel.virtual_pipeline_model_parallel_size=2")
    load_config(flags, world_size=16)
    expected = "(8) / 4 = 2 micro-batches must be a multiple of parallel.pipeline_model_parallel_size (4)"
    assert expected in message_of([*flags, "--training.micro_batch_size=2"], world_size=16)
