"""Fields of Megatron's TransformerConfig that `student.transformer` and `teacher.transformer` must leave alone.

Each is decided by a setting of its own, or is something that the attention of this project does not have, so that an
override would be ignored or would contradict the setting.

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
}
"""Field -> why it is not to be overridden."""


def check_overrides(model: str, overrides: dict) -> None:
    """ValueError names the first field of `{model}.transformer` that must not be there, its value and why."""
    for field, value in overrides.items():
        reason = "stages have equally many layers" if "pipeline" in field else OWNED.get(field)
        if reason:
            raise ValueError(f"{model}.transformer.{field} ({value}) must be left out: {reason}")
