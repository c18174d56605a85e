"""Rules that tie settings together, checked once before anything is built. Inside, values are trusted.

    check_config(config, world_size=8)

Each violation is a ValueError that names the setting, its value and the rule.
"""

from __future__ import annotations

import math

from megatron_opdlm.config.check_evaluation import check_evaluation
from megatron_opdlm.config.check_method import check_curricula, check_divergence, check_lora, check_states
from megatron_opdlm.config.overrides import check_overrides, check_recompute
from megatron_opdlm.config.rules import at_least, require, within
from megatron_opdlm.config.schema import (
    Config,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RolloutConfig,
    TrainingConfig,
)
from megatron_opdlm.config.sft_presets import check_objective


def check_config(config: Config, world_size: int | None) -> None:
    """Checks every section. `world_size` is the number of processes; None leaves out the rules that depend on it."""
    _check_models(config)
    check_lora(config.lora)
    _check_parallel(config.parallel)
    check_rollout(config.rollout)
    check_states(config.states)
    check_objective(config.objective, config.rollout, config.curricula)
    check_divergence(config.divergence)
    check_curricula(config.curricula, config.rollout)
    _check_optimizer(config.optimizer)
    _check_training(config.training, config.rollout)
    at_least(0, "checkpoint", save_interval=config.checkpoint.save_interval, keep=config.checkpoint.keep)
    check_evaluation(config.evaluation, config.rollout)
    at_least(
        1,
        "data",
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_response_tokens=config.data.max_response_tokens,
    )
    at_least(0, "logging", trajectory_interval=config.logging.trajectory_interval)
    at_least(1, "logging", num_trajectories=config.logging.num_trajectories)
    _check_precision(config)
    _check_padding(config)
    _check_context_parallel(config)
    _check_pipeline(config)
    if world_size is not None:
        check_layout(config.parallel, world_size)
        _check_batches(config, world_size)


def _check_models(config: Config) -> None:
    for name, model in (("student", config.student), ("teacher", config.teacher)):
        both = model.hf is not None and model.checkpoint is not None
        require(
            not both, f"{name}.hf ({model.hf}) and {name}.checkpoint ({model.checkpoint}) exclude each other: give one"
        )
        check_overrides(name, model.transformer)
    check_recompute(config.training.recompute, config.student.transformer, config.teacher.transformer)
    require(config.student.mask_token, "student.mask_token () must not be empty")


def _check_parallel(parallel: ParallelConfig) -> None:
    size = parallel.tensor_model_parallel_size
    at_least(
        1,
        "parallel",
        tensor_model_parallel_size=size,
        context_parallel_size=parallel.context_parallel_size,
        make_vocab_size_divisible_by=parallel.make_vocab_size_divisible_by,
    )
    require(
        not parallel.sequence_parallel or size > 1,
        f"parallel.sequence_parallel (true) needs parallel.tensor_model_parallel_size ({size}) to be over 1",
    )
    num_stages, num_chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    at_least(1, "parallel", pipeline_model_parallel_size=num_stages)
    at_least(2, "parallel", virtual_pipeline_model_parallel_size=num_chunks)
    require(
        num_chunks is None or num_stages > 1,
        f"parallel.virtual_pipeline_model_parallel_size ({num_chunks}) needs parallel.pipeline_model_parallel_size "
        f"({num_stages}) to be over 1",
    )
    _check_expert_parallel(parallel)
    minutes = parallel.distributed_timeout_minutes
    require(minutes > 0, f"parallel.distributed_timeout_minutes ({minutes}) must be over 0")


def _check_expert_parallel(parallel: ParallelConfig) -> None:
    """What expert parallelism needs of the other sizes; what it needs of the models is in `models.build`."""
    size, experts = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    expert_size, num_chunks = parallel.expert_tensor_parallel_size, parallel.virtual_pipeline_model_parallel_size
    at_least(1, "parallel", expert_model_parallel_size=experts, expert_tensor_parallel_size=expert_size)
    require(
        expert_size is None or size % expert_size == 0,
        f"parallel.expert_tensor_parallel_size ({expert_size}) must divide parallel.tensor_model_parallel_size "
        f"({size})",
    )
    require(
        experts == 1 or size == 1 or parallel.sequence_parallel,
        f"parallel.expert_model_parallel_size ({experts}) beside parallel.tensor_model_parallel_size ({size}) needs "
        "parallel.sequence_parallel (false) to be true",
    )
    require(
        experts == 1 or num_chunks is None,
        f"parallel.virtual_pipeline_model_parallel_size ({num_chunks}) must be null under "
        f"parallel.expert_model_parallel_size ({experts}): ranks that decode different prompts would run different "
        "chunks of layers at a time, while their experts wait for each other",
    )


def check_rollout(rollout: RolloutConfig) -> None:
    at_least(
        1,
        "rollout",
        block_size=rollout.block_size,
        denoising_steps_per_block=rollout.denoising_steps_per_block,
        max_new_tokens=rollout.max_new_tokens,
        num_responses_per_prompt=rollout.num_responses_per_prompt,
        batch_size=rollout.batch_size,
        pipeline_micro_groups=rollout.pipeline_micro_groups,
    )
    at_least(1, "rollout.max_new_tokens_by_domain", **rollout.max_new_tokens_by_domain)
    require(
        rollout.denoising_steps_per_block <= rollout.block_size,
        f"rollout.denoising_steps_per_block ({rollout.denoising_steps_per_block}) must not exceed "
        f"rollout.block_size ({rollout.block_size})",
    )
    require(
        rollout.max_tokens_in_flight >= 2 * rollout.block_size,
        f"rollout.max_tokens_in_flight ({rollout.max_tokens_in_flight}) must be at least two blocks of "
        f"rollout.block_size ({rollout.block_size})",
    )
    require(
        rollout.cache_gib is None or rollout.cache_gib > 0, f"rollout.cache_gib ({rollout.cache_gib}) must be over 0"
    )
    _check_sampling(rollout)


def _check_sampling(rollout: RolloutConfig) -> None:
    within(0, 1, "rollout", dynamic_threshold=rollout.dynamic_threshold)
    at_least(0, "rollout", entropy_bound=rollout.entropy_bound, temperature=rollout.temperature, top_k=rollout.top_k)
    require(0 < rollout.top_p <= 1, f"rollout.top_p ({rollout.top_p}) must be over 0 and at most 1")
    for token_id in rollout.stop_token_ids:
        at_least(0, "rollout", stop_token_ids=token_id)


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    at_least(
        0,
        "optimizer",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        lr_warmup_steps=optimizer.lr_warmup_steps,
        weight_decay=optimizer.weight_decay,
        clip_grad=optimizer.clip_grad,
    )
    at_least(1, "optimizer", lr_decay_steps=optimizer.lr_decay_steps)
    require(
        optimizer.lr >= optimizer.min_lr,
        f"optimizer.lr ({optimizer.lr}) must not be below optimizer.min_lr ({optimizer.min_lr})",
    )
    for name, beta in (("adam_beta1", optimizer.adam_beta1), ("adam_beta2", optimizer.adam_beta2)):
        require(0 <= beta < 1, f"optimizer.{name} ({beta}) must be at least 0 and below 1")
    within(0, 1, "optimizer", cpu_offload_fraction=optimizer.cpu_offload_fraction)
    require(optimizer.adam_eps > 0, f"optimizer.adam_eps ({optimizer.adam_eps}) must be over 0")


def _check_training(training: TrainingConfig, rollout: RolloutConfig) -> None:
    at_least(
        1,
        "training",
        max_steps=training.max_steps,
        num_prompts_per_step=training.num_prompts_per_step,
        global_batch_size=training.global_batch_size,
        micro_batch_size=training.micro_batch_size,
        pad_to_multiple=training.pad_to_multiple,
        max_skipped_steps=training.max_skipped_steps,
    )
    at_least(0, "training", grace_seconds=training.grace_seconds)
    num_responses = rollout.num_responses_per_prompt
    product = f" x rollout.num_responses_per_prompt ({num_responses})" if num_responses > 1 else ""
    require(
        training.num_prompts_per_step * num_responses % training.global_batch_size == 0,
        f"training.num_prompts_per_step ({training.num_prompts_per_step}){product} must be a multiple of "
        f"training.global_batch_size ({training.global_batch_size})",
    )


def _check_precision(config: Config) -> None:
    """What number formats need of the other settings; what FP8 needs of the machine is in `models.fp8`."""
    require(
        config.precision.teacher_fp8 != "delayed",
        "precision.teacher_fp8 (delayed) must be off, tensorwise or blockwise: Transformer Engine updates delayed "
        "scales only after a forward with gradients, and the teacher has none",
    )
    fraction, dtype = config.optimizer.cpu_offload_fraction, config.precision.dtype
    require(
        fraction == 0 or dtype == "bfloat16",
        f"optimizer.cpu_offload_fraction ({fraction}) needs precision.dtype ({dtype}) to be bfloat16: Megatron could "
        "not resume the offloaded state of float32 parameters",
    )
    _check_fp8("fp8", config.precision, "student", config.student.transformer)
    _check_fp8("teacher_fp8", config.precision, "teacher", config.teacher.transformer)
    attention = config.attention
    if attention.fp8:
        recipe = config.precision.fp8
        require(
            recipe in ("delayed", "tensorwise"),
            f"attention.fp8 (true) needs precision.fp8 ({recipe}) to be delayed or tensorwise: it shares the recipe",
        )
        require(
            attention.backend in ("auto", "te"),
            f"attention.fp8 (true) needs attention.backend ({attention.backend}) to be te or auto",
        )


def _check_fp8(name: str, precision: PrecisionConfig, model: str, overrides: dict) -> None:
    recipe = getattr(precision, name)
    require(
        recipe == "off" or precision.dtype == "bfloat16",
        f"precision.{name} ({recipe}) needs precision.dtype ({precision.dtype}) to be bfloat16",
    )
    require(
        recipe != "off" or "fp8" not in overrides,
        f"{model}.transformer.fp8 ({overrides.get('fp8')}) needs a recipe, which precision.{name} ({recipe}) chooses",
    )


def _check_padding(config: Config) -> None:
    """Rows are whole blocks; under sequence parallelism each rank holds an equal part of the row."""
    padding, block = config.training.pad_to_multiple, config.rollout.block_size
    require(
        padding % block == 0,
        f"training.pad_to_multiple ({padding}) must be a multiple of rollout.block_size ({block})",
    )
    size = config.parallel.tensor_model_parallel_size
    require(
        not config.parallel.sequence_parallel or padding % size == 0,
        f"training.pad_to_multiple ({padding}) must be a multiple of parallel.tensor_model_parallel_size ({size}) "
        "under parallel.sequence_parallel",
    )
    for name, recipe in (("fp8", config.precision.fp8), ("teacher_fp8", config.precision.teacher_fp8)):
        multiple = _fp8_row_multiple(recipe, config.parallel)
        require(
            padding % multiple == 0,
            f"training.pad_to_multiple ({padding}) must be a multiple of {multiple} under precision.{name} ({recipe})",
        )


def _fp8_row_multiple(recipe: str, parallel: ParallelConfig) -> int:
    """What the length of a row must be a multiple of.

    The FP8 matrix product of the weight gradient runs along the tokens and takes multiples of 16 of them
    (transformer_engine/common/gemm/cublaslt_gemm.cu). Under sequence parallelism each rank quantizes its own part of
    the row, and Transformer Engine before 2.14 gathers blockwise parts only in whole blocks of 128.
    """
    if recipe == "off":
        return 1
    if not parallel.sequence_parallel:
        return 16 * parallel.context_parallel_size
    multiple = 128 if recipe == "blockwise" else 16
    return multiple * parallel.tensor_model_parallel_size * parallel.context_parallel_size


def _check_context_parallel(config: Config) -> None:
    """Each rank has equally many blocks of a row, and each of its sequence-parallel ranks equally many positions."""
    size, padding, block = (
        config.parallel.context_parallel_size,
        config.training.pad_to_multiple,
        config.rollout.block_size,
    )
    require(
        padding % (size * block) == 0,
        f"training.pad_to_multiple ({padding}) must be a multiple of parallel.context_parallel_size ({size}) x "
        f"rollout.block_size ({block}) = {size * block}",
    )
    num_shards = size * config.parallel.tensor_model_parallel_size
    require(
        not config.parallel.sequence_parallel or padding % num_shards == 0,
        f"training.pad_to_multiple ({padding}) must be a multiple of parallel.context_parallel_size ({size}) x "
        f"parallel.tensor_model_parallel_size ({num_shards // size}) = {num_shards} under parallel.sequence_parallel",
    )
    require(
        size == 1 or config.rollout.logit_shift == "none",
        f"rollout.logit_shift ({config.rollout.logit_shift}) must be none under parallel.context_parallel_size "
        f"({size}): the output before a rank's first position is with another rank",
    )
    require(
        size == 1 or config.teacher.fill == "terminal",
        f"teacher.fill ({config.teacher.fill}) must be terminal under parallel.context_parallel_size ({size}): the "
        "output before a rank's first position is with another rank",
    )


def _check_pipeline(config: Config) -> None:
    num_groups, num_stages = config.rollout.pipeline_micro_groups, config.parallel.pipeline_model_parallel_size
    require(
        num_groups is None or num_stages > 1,
        f"rollout.pipeline_micro_groups ({num_groups}) needs parallel.pipeline_model_parallel_size ({num_stages}) to "
        "be over 1",
    )


def check_layout(parallel: ParallelConfig, world_size: int) -> None:
    """Checks that the layout fits this many processes."""
    sizes = {
        "parallel.tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "parallel.context_parallel_size": parallel.context_parallel_size,
        "parallel.pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
    }
    _check_processes(sizes, world_size)
    expert_size = parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size
    of_experts = {
        "parallel.expert_model_parallel_size": parallel.expert_model_parallel_size,
        "parallel.expert_tensor_parallel_size": expert_size,
        "parallel.pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
    }
    _check_processes(of_experts, world_size)


def _check_processes(sizes: dict[str, int], world_size: int) -> None:
    named, product = [name for name, size in sizes.items() if size > 1], math.prod(sizes.values())
    require(
        world_size % product == 0,
        f"{' x '.join(named)} ({product}) must divide the number of processes ({world_size})",
    )


def _check_batches(config: Config, world_size: int) -> None:
    training = config.training
    parallel, num_stages = config.parallel, config.parallel.pipeline_model_parallel_size
    data_parallel_size = world_size // (
        parallel.tensor_model_parallel_size * parallel.context_parallel_size * num_stages
    )
    rows = training.micro_batch_size * data_parallel_size
    require(
        training.global_batch_size % rows == 0,
        f"training.global_batch_size ({training.global_batch_size}) must be a multiple of training.micro_batch_size "
        f"({training.micro_batch_size}) x data-parallel size ({data_parallel_size}) = {rows}",
    )
    num_micro_batches = training.global_batch_size // rows
    require(
        config.parallel.virtual_pipeline_model_parallel_size is None or num_micro_batches % num_stages == 0,
        f"training.global_batch_size ({training.global_batch_size}) / {rows} = {num_micro_batches} micro-batches must "
        f"be a multiple of parallel.pipeline_model_parallel_size ({num_stages}) under "
        "parallel.virtual_pipeline_model_parallel_size",
    )
