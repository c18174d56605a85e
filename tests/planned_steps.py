"""What a training step of a tiny model really takes, beside what `planning` says of it.

    line = measure_step(config, groups)
    line["planned"]["optimizer"], line["measured"]["optimizer"]

Memory is counted by PyTorch's profiler, which sees every allocation of a tensor. The first step makes the optimizer's
state, the next ones are measured. Gloo's threads let go of what a collective has sent only after they have woken who
waits for it, and kept from doing so they add up to two fifths to the peak of a step that needs no more. So the thread
that waits gives way to them, and of the peaks the lowest counts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from megatron_opdlm.config.schema import Config, CurriculaConfig, DataConfig, ParallelConfig, TrainingConfig
from megatron_opdlm.planning.layout import Layout
from megatron_opdlm.planning.memory import Models, lasting_parts, plan_memory
from megatron_opdlm.planning.workload import Workload
from tests.worlds import tiny_config

PROMPT, RESPONSE = 32, 224
NUM_MEASURED = 3


def planned_config(folder: Path, parallel: ParallelConfig, *, dtype: str = "float32", rows: int = 2, **training):
    """A run of tiny models whose rows have 256 tokens; `rows` of them make a micro-batch."""
    config = tiny_config(
        folder,
        parallel=parallel,
        backend="aten",
        data=DataConfig(max_prompt_tokens=PROMPT),
        curricula=CurriculaConfig(),
        training=TrainingConfig(num_prompts_per_step=4, global_batch_size=4, micro_batch_size=rows, **training),
    )
    return replace(
        config,
        precision=replace(config.precision, dtype=dtype),
        rollout=replace(config.rollout, max_new_tokens=RESPONSE),
    )


def measure_step(config: Config, groups) -> dict[str, dict[str, float]]:
    """Bytes of each part, planned and measured, on this rank. All ranks must call it, within `worlds.layout`."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from tests.worlds import load_student, load_teacher

    student_model, special = load_student(config, groups)
    teacher = load_teacher(config, groups)
    trainable, train_step = _train_step(config, groups, student_model, special, teacher)
    batch = _micro_batches(config, groups, special.mask_token_id)
    train_step(batch)
    measured = _lasting_bytes(trainable, teacher)
    with _giving_way():
        measured["peak"] = min(_peak_of_step(train_step, batch) for _ in range(NUM_MEASURED))
    stage = parallel_state.get_pipeline_model_parallel_rank()
    return {"planned": planned_bytes(config, dist.get_world_size(), stage), "measured": measured}


def planned_bytes(config: Config, num_ranks: int, stage: int) -> dict[str, float]:
    """What lasts, part by part, and as `peak` what the student's phase adds to it."""
    from megatron_opdlm.config.architecture import read_architecture

    architecture = read_architecture(Path(config.student.hf))
    models = Models(architecture, read_architecture(Path(config.teacher.hf)), layers="local")
    layout = Layout.of(config.parallel, num_ranks)
    plan = plan_memory(models, config, layout, Workload.of(config, prompt_tokens=PROMPT), stage)
    lasting = lasting_parts(models, config, layout, stage)
    return lasting | {"peak": max(plan.phases["student"], plan.phases["teacher"]) - sum(lasting.values())}


@contextmanager
def _giving_way() -> Iterator[None]:
    """This thread does not interrupt the one that wakes it."""
    before = os.sched_getscheduler(0)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        os.sched_setscheduler(0, before, os.sched_param(0))


def _peak_of_step(train_step, batch) -> int:
    """The most bytes that were allocated within the step and alive at one time.

    What an earlier step has left, as the dispatcher of a mixture does, is let go of within this one and not counted.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train_step(batch)
    alive: dict[int, int] = {}
    total = peak = 0
    for change in sorted(_allocations(profiler), key=lambda event: event.start_time_ns):
        block = change.extra_fields
        if block.alloc_size > 0:
            alive[block.ptr] = block.alloc_size
            total += block.alloc_size
        else:
            total -= alive.pop(block.ptr, 0)
        peak = max(peak, total)
    return peak


def _allocations(profiler):
    """Every time that memory of a tensor was taken or given back."""
    waiting = list(profiler.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation:
            yield event


def _lasting_bytes(trainable, teacher) -> dict[str, float]:
    buffers = [buffer for chunk in trainable.wrapped for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    return {
        "weights": sum(buffer.param_data.nbytes for buffer in buffers),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": sum(
            _state_bytes(one) for one in getattr(trainable.optimizer, "chained_optimizers", [trainable.optimizer])
        ),
        "teacher": sum(parameter.nbytes for parameter in teacher.parameters()),
    }


def _state_bytes(optimizer) -> int:
    """Moments, and main parameters that are not views of the weights."""
    moments = [tensor for state in optimizer.optimizer.state.values() for tensor in state.values()]
    mains = [part for group in optimizer.shard_fp32_from_float16_groups for part in group]
    return sum(tensor.nbytes for tensor in moments + mains if torch.is_tensor(tensor))


def _train_step(config, groups, student_model, special, teacher):
    from megatron_opdlm.objectives.objective import Parts
    from megatron_opdlm.objectives.table import OBJECTIVES
    from megatron_opdlm.observability.timers import PhaseTimers
    from megatron_opdlm.parallel.vocabulary_shard import VocabularyShard
    from megatron_opdlm.training.expert_load import ExpertLoad
    from megatron_opdlm.training.optimizer import make_trainable
    from megatron_opdlm.training.skipped_steps import SkippedSteps
    from megatron_opdlm.training.train_step import TrainStep

    trainable = make_trainable(student_model, config.optimizer, config.parallel, 10)
    num_rows = student_model.chunks[0].vocab_size // groups.tp.size()
    shard = VocabularyShard(
        first=groups.tp.rank() * num_rows,
        num_rows=num_rows,
        vocab_size=special.vocab_size,
        mask_token_id=special.mask_token_id,
        group=groups.tp,
    )
    parts = Parts(
        config=config, student=student_model, teacher=teacher, engine=None, shard=shard, special=special, groups=groups
    )
    skipped = SkippedSteps(Path(config.logging.directory), 10, lambda: 0)
    objective = OBJECTIVES[config.objective.name](parts)
    step = TrainStep(trainable, objective, PhaseTimers(lambda: None), ExpertLoad(student_model, groups), skipped)
    return trainable, step


def _micro_batches(config: Config, groups, mask_token_id: int):
    """This rank's micro-batches of a global batch of random rows, each as long as rows may be."""
    from megatron_opdlm.diffusion.states import select_states
    from megatron_opdlm.diffusion.trajectory import Trajectory

    generator, num_rows = torch.Generator().manual_seed(0), config.training.global_batch_size // groups.dp.size()
    order_MK = torch.rand((PROMPT + RESPONSE) // 4, 4, generator=generator).argsort(dim=1)
    trajectories = [
        Trajectory(
            prompt_id=row,
            sample_index=0,
            prompt_length=PROMPT,
            block_size=4,
            terminal_ids_T=torch.randint(20, (PROMPT + RESPONSE,), generator=generator),
            step_map_R=1 + order_MK.flatten()[PROMPT:],
            log_probs_R=torch.zeros(RESPONSE),
            response_length=RESPONSE,
            stop_reason="length",
            domain="",
        )
        for row in range(num_rows)
    ]
    states = select_states(
        trajectories, block_size=4, mask_token_id=mask_token_id, end_token_ids=(), pad_token_id=0, seed=0, step=0
    )
    return [
        states.rows(slice(begin, begin + config.training.micro_batch_size))
        for begin in range(0, num_rows, config.training.micro_batch_size)
    ]
