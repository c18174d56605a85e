"""Small runs of the whole system in a world that exists already, under one layout after another.

    with layout(parallel) as groups:                       # Megatron's groups for as long as the block lasts
        model = load_student(config, groups)

Float32 throughout, so that layouts can be compared to rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megatron_opdlm.config.schema import (
    AttentionConfig,
    Config,
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
    from megatron_opdlm.parallel.initialize import initialize, parallel_state

    groups = initialize(parallel, seed=0)
    try:
        yield groups
    finally:
        parallel_state.destroy_model_parallel()


def remove_parallel_groups() -> None:
    """Forgets Megatron's groups that something which failed left behind."""
    from megatron_opdlm.parallel.initialize import parallel_state

    parallel_state.destroy_model_parallel()


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
    """Logits `[B, T, V]` of hidden states, gathered over the tensor-parallel group; padding rows included."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    hidden_BTH = model.whole_sequence(hidden_TBH).transpose(0, 1)
    return gather_from_tensor_model_parallel_region(model.vocab_parallel_logits(hidden_BTH))
