"""Megatron's data parallelism, distributed optimizer and learning-rate schedule around the student.

    student = make_trainable(model, config.optimizer, config.parallel, num_optimizer_steps)
    wait_for_weights(student)                              # before anything reads them
    zero_gradients(student)
    get_forward_backward_func()(model=student.wrapped, ...)
    norm = optimizer_step(student)                         # with `overlap_param_gather` its weights are under way now

Each data-parallel rank updates its part of the weights and sends it to the others. Megatron would wait for them in
hooks before each module's forward; but the output layer's weight is read without such a forward, and ranks decode
different numbers of steps. So the hooks are off: the transfer starts behind the optimizer's step, goes on while the
teacher runs, and `wait_for_weights` ends it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_opdlm.config.schema import OptimizerConfig as Settings
from megatron_opdlm.config.schema import ParallelConfig
from megatron_opdlm.models.layer_specs import has_transformer_engine
from megatron_opdlm.models.pipeline import PipelineModel
from megatron_opdlm.parallel.device import device


@dataclass(frozen=True)
class TrainableStudent:
    """The student as Megatron trains it."""

    model: PipelineModel
    """The model itself: what decodes."""
    wrapped: list[DistributedDataParallel]
    """Its chunks as Megatron's schedules run them."""
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


def make_trainable(
    model: PipelineModel, settings: Settings, parallel: ParallelConfig, num_optimizer_steps: int
) -> TrainableStudent:
    """Wraps the student. All ranks must call it.

    ValueError where no fused Adam is installed on a GPU machine, or where there is no GPU to offload from.

    `num_optimizer_steps` of the whole run is the cosine's length unless `optimizer.lr_decay_steps` gives another.
    """
    if megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        raise ValueError(
            "training on GPUs needs the fused Adam of Transformer Engine or apex, whose state Megatron's checkpoints "
            'resume exactly; install one, e.g. pip install "megatron-opdlm[te]"'
        )
    config, is_bf16 = model.config, model.config.bf16
    wrapped = _data_parallel(model, parallel)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            adam_eps=settings.adam_eps,
            weight_decay=settings.weight_decay,
            clip_grad=settings.clip_grad,
            use_distributed_optimizer=True,
            bf16=is_bf16,
            params_dtype=config.params_dtype,
            **_offload_settings(settings.cpu_offload_fraction),
        ),
        wrapped,
    )
    return TrainableStudent(model, wrapped, optimizer, _cosine(optimizer, settings, num_optimizer_steps))


def _offload_settings(fraction: float) -> dict:
    """Fields of Megatron's OptimizerConfig that give some parameters to PyTorch's AdamW on the CPU."""
    if fraction == 0:
        return {}
    if device().type == "cpu":
        raise ValueError(
            f"optimizer.cpu_offload_fraction ({fraction}) must be 0 without a GPU: all memory is the host's already"
        )
    if not has_transformer_engine():
        raise ValueError(
            f"optimizer.cpu_offload_fraction ({fraction}) needs Transformer Engine, which cannot be imported; try "
            'pip install "megatron-opdlm[te]"'
        )
    return {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": fraction,
        "use_precision_aware_optimizer": True,  # whose way of handing gradients over the hybrid optimizer needs
        "overlap_cpu_optimizer_d2h_h2d": True,
    }


def _data_parallel(model: PipelineModel, parallel: ParallelConfig) -> list[DistributedDataParallel]:
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=model.config.bf16,
        check_for_nan_in_grad=False,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    wrapped = [
        # The backward pass of later chunks has those of earlier ones to hide behind: one bucket serves them.
        DistributedDataParallel(model.config, settings, chunk, disable_bucketing=place > 0)
        for place, chunk in enumerate(model.chunks)
    ]
    for chunk in wrapped:
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            _count_padding_as_content(buffer)
    if parallel.overlap_grad_reduce:
        # Only the last micro-batch completes a gradient. The interleaved schedule takes a list, the others do not.
        pauses = [chunk.no_sync for chunk in wrapped]
        model.config.no_sync_func = pauses if len(pauses) > 1 else pauses[0]
    if parallel.overlap_param_gather:
        for chunk in wrapped:
            chunk.disable_forward_pre_hook(param_sync=False)
    return wrapped


def _count_padding_as_content(buffer: _ParamAndGradBuffer) -> None:
    """Lets checkpoints hold the optimizer's state of a buffer with several buckets.

    To save it, Megatron-Core (0.16.1, 0.19.0) puts the buckets together without the padding between them, and looks for
    each parameter where it is with the padding (`get_parameter_state_dp_zero`, `sharded_param_state_fully_reshardable`
    in core/optimizer/distrib_optimizer.py): what follows a padded bucket would be saved from the wrong place.
    """
    for bucket in buffer.buckets:
        bucket.numel_unpadded = bucket.grad_data.numel()
    buffer.numel_unpadded = buffer.numel


def _cosine(optimizer: MegatronOptimizer, settings: Settings, num_optimizer_steps: int) -> OptimizerParamScheduler:
    decay_steps = settings.lr_decay_steps or num_optimizer_steps
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        # Megatron asks for a warm-up shorter than the decay, also in a run of very few steps.
        lr_warmup_steps=min(settings.lr_warmup_steps, decay_steps - 1),
        lr_decay_steps=decay_steps,
        lr_decay_style="cosine",
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=decay_steps,
        wd_incr_style="constant",
        # A resumed run takes its place in the schedule from the checkpoint, and the schedule itself from the recipe.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def optimizer_step(student: TrainableStudent) -> float:
    """Clips, updates, moves the schedule on by one; the gradient norm before clipping. All ranks must call it.

    With `overlap_param_gather` the weights may be read after `wait_for_weights` only.
    """
    # The schedule counts the step about to be taken, so the first one has the warm-up's first rate and not zero.
    student.scheduler.step(1)
    _, grad_norm, _ = student.optimizer.step()
    for chunk in student.wrapped:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync()
    return float(grad_norm)


def gradient_size(student: TrainableStudent) -> torch.Tensor:
    """The 2-norm of what this rank's gradient buffers hold, float32 [], not finite if an entry is not.

    Of a parameter that other ranks update it is this rank's own contribution, so that the norm is no one's gradient
    norm; but if it is finite on all ranks, the gradient is too. Reads the buffers once and makes no copy.
    """
    buffers = [buffer for chunk in student.wrapped for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    sizes = [torch.linalg.vector_norm(buffer.grad_data, dtype=torch.float32) for buffer in buffers]
    return torch.linalg.vector_norm(torch.stack(sizes))


def wait_for_weights(student: TrainableStudent) -> None:
    """Returns when the weights are those of the latest step on every rank. All ranks must call it.

    A second call does nothing.
    """
    for chunk in student.wrapped:
        for buckets in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            if buckets.param_gather_handle is not None:
                buckets.finish_param_sync(skip_next_bucket_dispatch=True)


def zero_gradients(student: TrainableStudent) -> None:
    """Clears Megatron's gradient buffers."""
    for chunk in student.wrapped:
        chunk.zero_grad_buffer()
    student.optimizer.zero_grad()


def learning_rate(student: TrainableStudent) -> float:
    """The rate of the latest step."""
    return student.optimizer.param_groups[0]["lr"]


def parameter_count(model: PipelineModel) -> int:
    """Elements of this rank's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
