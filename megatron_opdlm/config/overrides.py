"""Fields of Megatron's TransformerConfig that `student.transformer` and `teacher.transformer` must leave alone.

Each is decided by a setting of its own, or is something that this project does not have, so that an override would be
ignored or would contradict the setting.

    check_overrides("student", {"recompute_granularity": "full"})          # fine
    check_overrides("student", {"attention_dropout": 0.1})                 # ValueError
"""

from __future__ import annotations

_LAYOUT = "parallel.* decides the layout"
_SOFTMAX = "attention is a plain softmax over the block-diffusion pattern"
OWNED = {
    **dict.fromkeys(
        (
            "tensor_model_parallel_size",
            "sequence_parallel",
            "context_parallel_size",
            "expert_model_parallel_size",
            "expert_tensor_parallel_size",
        ),
        _LAYOUT,
    ),
    **dict.fromkeys(
        ("attention_dropout", "hidden_dropout"), "training and rollout are the same function, without dropout"
    ),
    **dict.fromkeys(("window_size", "softmax_type", "qk_clip", "attention_output_gate"), _SOFTMAX),
    **dict.fromkeys(("fp8_dot_product_attention", "fp8_multi_head_attention"), "attention.fp8 chooses"),
    "fp8_recipe": "precision.fp8 and precision.teacher_fp8 choose",
    "fp8_param": "weights stay in precision.dtype",
    "deterministic_mode": "training.deterministic chooses",
    **dict.fromkeys(
        ("no_sync_func", "grad_sync_func", "param_sync_func"),
        "parallel.overlap_grad_reduce and parallel.overlap_param_gather choose",
    ),
    # transformer_engine/pytorch/csrc/extensions/comm_gemm_overlap.cpp
    "tp_comm_overlap": "Transformer Engine's user buffers take one shape, and rows and decoding steps differ",
}
"""Field -> why it is not to be overridden."""

RECOMPUTE = (
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
    "distribute_saved_activations",
)
"""What Megatron computes anew in a backward pass. The student's may be given under `training.recompute` none."""


def check_overrides(model: str, overrides: dict) -> None:
    """ValueError names the first field of `{model}.transformer` that must not be there, its value and why."""
    for field, value in overrides.items():
        if not isinstance(field, str):
            raise ValueError(f"{model}.transformer has the key {field!r}, which must be the name of a field")
        reason = "stages have equally many layers" if "pipeline" in field else OWNED.get(field)
        if reason:
            raise ValueError(f"{model}.transformer.{field} ({value}) must be left out: {reason}")


def check_recompute(recompute: str, student: dict, teacher: dict) -> None:
    """ValueError if overrides of the student contradict `training.recompute`, or those of the teacher speak of it."""
    for field in RECOMPUTE:
        if field in teacher:
            raise ValueError(
                f"teacher.transformer.{field} ({teacher[field]}) must be left out: the teacher has no backward pass"
            )
        if field in student and recompute != "none":
            raise ValueError(
                f"student.transformer.{field} ({student[field]}) must be left out under training.recompute "
                f"({recompute}), which chooses; none leaves the choice to student.transformer"
            )
