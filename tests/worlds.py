"""Small runs of the whole system in a world that exists already, under one layout after another.

    with layout(parallel) as groups:                       # Megatron's groups for as long as the block lasts
        model = load_student(config, groups)

Float32 throughout, so that layouts can be compared to rounding.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import torch.distributed as dist

from megatron_opdlm.config.schema import (
    AttentionConfig,
    Config,
    LoggingConfig,
    ParallelConfig,
    PrecisionConfig,
    RolloutConfig,
    StudentConfig,
    TeacherConfig,
)

LAYOUTS = {
    "tensor parallel 1": ParallelConfig(),
    "tensor parallel 2": ParallelConfig(tensor_model_parallel_size=2),
    "sequence parallel 2": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
}
"""Name -> layout. The first one serves a world of one process, and data parallelism in larger ones."""

_TWO_STAGES = {"pipeline_model_parallel_size": 2}
_TWO_CHUNKS = _TWO_STAGES | {"virtual_pipeline_model_parallel_size": 2}
_SEQUENCE_PARALLEL = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PIPELINE_LAYOUTS = {
    "2 stages": ParallelConfig(**_TWO_STAGES),
    "2 stages of 2 chunks": ParallelConfig(**_TWO_CHUNKS),
}
"""The same with pipeline stages; the names say how many processes at least."""

_SHARED_EXPERTS = {"expert_model_parallel_size": 2}
EXPERT_LAYOUTS = {
    "experts over 2": ParallelConfig(**_SHARED_EXPERTS),
    "experts over 4": ParallelConfig(expert_model_parallel_size=4),
    "sequence parallel 2, whole experts": ParallelConfig(**_SEQUENCE_PARALLEL, expert_tensor_parallel_size=1),
    "sequence parallel 2, experts over 2": ParallelConfig(**_SEQUENCE_PARALLEL, **_SHARED_EXPERTS),
    "sequence parallel 2, whole experts over 2": ParallelConfig(
        **_SEQUENCE_PARALLEL, **_SHARED_EXPERTS, expert_tensor_parallel_size=1
    ),
    "2 stages, experts over 2": ParallelConfig(**_TWO_STAGES, **_SHARED_EXPERTS),
}
"""Layouts of mixtures of experts. A whole expert is not cut by tensor parallelism."""

_CONTEXT_PARALLEL = {"context_parallel_size": 2}
CONTEXT_LAYOUTS = {
    "context parallel 2": ParallelConfig(**_CONTEXT_PARALLEL),
    "context parallel 4": ParallelConfig(context_parallel_size=4),
    "context parallel 2, sequence parallel 2": ParallelConfig(**_CONTEXT_PARALLEL, **_SEQUENCE_PARALLEL),
    "context parallel 2, 2 stages of 2 chunks": ParallelConfig(**_CONTEXT_PARALLEL, **_TWO_CHUNKS),
}
"""Ranks that share sequences."""


def model_ranks(parallel: ParallelConfig) -> int:
    """Ranks that one copy of the model takes, experts aside: they lie on the same ones."""
    tensor_size, num_stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    return tensor_size * num_stages * parallel.context_parallel_size


def tiny_config(
    folder: Path,
    *,
    teacher: Path | None = None,
    parallel: ParallelConfig | None = None,
    backend: str = "dense",
    rollout: RolloutConfig | None = None,
    transformer: dict | None = None,
    **sections,
) -> Config:
    """Student and teacher from Hugging Face folders, by default both from the same one, in float32."""
    return Config(
        student=StudentConfig(hf=str(folder), transformer=transformer or {}),
        teacher=TeacherConfig(hf=str(teacher or folder)),
        parallel=parallel or ParallelConfig(),
        precision=PrecisionConfig(dtype="float32"),
        attention=AttentionConfig(backend=backend),
        rollout=rollout or RolloutConfig(),
        **sections,
    )


@contextlib.contextmanager
def layout(parallel: ParallelConfig) -> Iterator:
    """Megatron's groups over the default process group. All ranks must enter it."""
    from megatron_opdlm.parallel.initialize import initialize

    free_past_trainers()
    groups = initialize(parallel, seed=0)
    try:
        yield groups
        dist.barrier()  # nobody leaves a group that another rank still waits in
    finally:
        remove_parallel_groups()


def free_past_trainers() -> None:
    """Ends what trainers of layouts before left: groups live as long as one that knows them, and a trainer is a cycle.

    A mixture's dispatcher keeps the graph of its last forward, which keeps hooks, which keep the trainer, and all that
    through C++, where no collection sees it.
    """
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    for thing in gc.get_objects():
        if type(thing) is MoEAlltoAllTokenDispatcher:
            thing.probs = None
    for _ in range(2):  # the first frees tensors, which free the rest
        gc.collect()


def quiet_logging(directory: Path) -> LoggingConfig:
    """Metrics and nothing else: no charts, no bar, and no rollouts kept, which take as long as rolling them out."""
    return LoggingConfig(directory=str(directory), tensorboard=False, progress_bar=False, trajectory_interval=0)


def no_report() -> AbstractContextManager:
    """Runs of the trainer write no report: drawing it takes longer than training a tiny model."""
    from megatron_opdlm.training import trainer

    return mock.patch.object(trainer, "write_report")


def run_trainer(config: Config) -> tuple[list[dict[str, float]], dict[tuple[int, int, int], str]]:
    """Trains to the end: the metrics of each step, and this rank's trajectories by step, prompt and sample, as JSON.

    A run that has a checkpoint goes on from it, so the metrics are those of the steps it still takes. All ranks must
    call it, within `layout`.
    """
    from megatron_opdlm.training.trainer import Trainer

    trainer = Trainer(config)
    steps, trajectories = [], {}
    one_step, generate = trainer._one_step, trainer.engine.generate

    def noting_generate(tasks, step, *threshold):
        made = generate(tasks, step, *threshold)
        trajectories.update({(step, t.prompt_id, t.sample_index): t.to_json() for t in made})
        return made

    trainer.engine.generate = noting_generate
    trainer._one_step = lambda: steps.append(one_step()) or steps[-1]
    with no_report():
        trainer.run()
    return steps, trajectories


def remove_parallel_groups() -> None:
    """Ends Megatron's groups, also those that something which failed left behind.

    Megatron only forgets them; of a gloo group that lives on, a thread wakes up a hundred times a second.
    """
    from megatron_opdlm.parallel.initialize import parallel_state

    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def load_student(config: Config, groups):
    """The student with the weights of its folder, and its special tokens."""
    from megatron_opdlm.checkpointing.student_and_teacher import build_student, open_student, padded_vocab_size

    source = open_student(config.student, config.rollout.stop_token_ids)
    return build_student(source, config, groups, padded_vocab_size(config, source.architecture)), source.special


def load_teacher(config: Config, groups):
    """The teacher with the weights of its folder."""
    from megatron_opdlm.checkpointing.student_and_teacher import (
        build_teacher,
        open_student,
        open_teacher,
        padded_vocab_size,
    )

    source = open_teacher(config.teacher, open_student(config.student))
    return build_teacher(source, config, groups, padded_vocab_size(config, source.architecture))


def gathered_logits(model, hidden_TBH):
    """Logits `[B, T, V]` of hidden states, which the last pipeline stage has; padding rows included.

    All ranks must call it, and all get them.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    logits = [None]
    if hidden_TBH is not None:
        hidden_BTH = model.whole_sequence(hidden_TBH).transpose(0, 1)
        logits = [gather_from_tensor_model_parallel_region(model.vocab_parallel_logits(hidden_BTH))]
    stages = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast_object_list(logits, group=stages, group_src=stages.size() - 1)
    return logits[0]
