"""Megatron's data parallelism, distributed optimizer and learning-rate schedule around the student."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_opdlm.config.schema import OptimizerConfig as Settings
from megatron_opdlm.models.pipeline import PipelineModel


@dataclass(frozen=True)
class TrainableStudent:
    """The student as Megatron trains it."""

    model: PipelineModel
    """The model itself: what decodes."""
    wrapped: list[DistributedDataParallel]
    """Its chunks as Megatron's schedules run them."""
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


def make_trainable(model: PipelineModel, settings: Settings, num_optimizer_steps: int) -> TrainableStudent:
    """Wraps the student. All ranks must call it. ValueError where no fused Adam is installed on a GPU machine.

    `num_optimizer_steps` of the whole run is the cosine's length unless `optimizer.lr_decay_steps` gives another.
    """
    if megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        raise ValueError(
            "training on GPUs needs the fused Adam of Transformer Engine or apex, whose state Megatron's checkpoints "
            'resume exactly; install one, e.g. pip install "megatron-opdlm[te]"'
        )
    config, is_bf16 = model.config, model.config.bf16
    settings_of_ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True, grad_reduce_in_fp32=is_bf16, check_for_nan_in_grad=False
    )
    wrapped = [DistributedDataParallel(config, settings_of_ddp, chunk) for chunk in model.chunks]
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
        ),
        wrapped,
    )
    return TrainableStudent(model, wrapped, optimizer, _cosine(optimizer, settings, num_optimizer_steps))


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
    """Clips, updates, moves the schedule on by one; the gradient norm before clipping. All ranks must call it."""
    # The schedule counts the step about to be taken, so the first one has the warm-up's first rate and not zero.
    student.scheduler.step(1)
    _, grad_norm, _ = student.optimizer.step()
    return float(grad_norm)


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
