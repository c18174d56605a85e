"""Published shapes by name, for planning without the models' folders.

    published("qwen3-8b").num_hidden_layers                     # 36

The values are those of the `config.json` of each model on huggingface.co (github.com/NVIDIA-NeMo/Megatron-Bridge has
the same in models/qwen/qwen_provider.py); `tests/unit/test_published_shapes.py` holds them against `transformers`.
"""

from __future__ import annotations

from megatron_opdlm.config.architecture import Mixture, Qwen3Architecture


def _qwen3(
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    *,
    tied: bool = False,
    num_groups: int = 8,
    mixture: Mixture | None = None,
) -> Qwen3Architecture:
    return Qwen3Architecture(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_groups,
        head_dim=128,
        vocab_size=151936,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=40960,
        tie_word_embeddings=tied,
        dtype="bfloat16",
        mixture=mixture,
    )


def _experts(moe_intermediate_size: int) -> Mixture:
    return Mixture(
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=moe_intermediate_size, norm_topk_prob=True
    )


PUBLISHED: dict[str, Qwen3Architecture] = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64),
    "qwen3-30b-a3b": _qwen3(2048, 6144, 48, 32, num_groups=4, mixture=_experts(768)),
    "qwen3-235b-a22b": _qwen3(4096, 12288, 94, 64, num_groups=4, mixture=_experts(1536)),
}
"""Name in lower case, as the last part of the model's name on huggingface.co -> its shape."""


def published(name: str, setting: str = "--model") -> Qwen3Architecture:
    """The shape of that name, in any case and with or without its organisation. ValueError names the setting that has
    it, and lists the known ones."""
    found = PUBLISHED.get(name.rstrip("/").rpartition("/")[2].lower())
    if found is None:
        known = ", ".join(PUBLISHED)
        raise ValueError(f"{setting} ({name}) must be one of {known}, or name a folder with a config.json")
    return found
