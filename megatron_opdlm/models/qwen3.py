"""The shape of a Qwen3, read from a Hugging Face `config.json`.

    architecture = read_architecture(Path("Qwen3-0.6B"))
    architecture.num_hidden_layers, architecture.head_dim

Field names are Hugging Face's. Everything this project cannot reproduce exactly (RoPE scaling, attention bias, sliding
windows, other activations) is refused here, with the key that says so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Qwen3Architecture:
    """What decides the tensors of a dense Qwen3 and how they are used."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    """Rows of the embedding; the tokenizer may use fewer."""
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str
    """Number format of the tensors in the folder."""
    mask_token_id: int | None = None
    """Set in the config of a block-diffusion student."""

    def with_mask_token(self, mask_token_id: int) -> Qwen3Architecture:
        """The student's architecture: the vocabulary grows only if the mask token has no row yet."""
        return replace(self, mask_token_id=mask_token_id, vocab_size=max(self.vocab_size, mask_token_id + 1))

    def padded_vocab_size(self, divisible_by: int, tensor_model_parallel_size: int) -> int:
        """Embedding rows over all tensor-parallel ranks, each with the same number of them."""
        multiple = divisible_by * tensor_model_parallel_size
        return -(-self.vocab_size // multiple) * multiple


_REQUIRED = {
    "hidden_size": int,
    "intermediate_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "vocab_size": int,
    "rms_norm_eps": float,
    "max_position_embeddings": int,
}
_ONLY = {"model_type": "qwen3", "hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}


def read_config_json(folder: Path) -> dict:
    """The parsed `config.json`. ValueError names the file and what is wrong with it."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a Hugging Face folder: it has no config.json")
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return values


def read_architecture(folder: Path) -> Qwen3Architecture:
    """Reads and checks `folder/config.json`. ValueError names the file, the key, its value and the rule."""
    path = Path(folder) / "config.json"
    values = read_config_json(folder)
    for key, expected in _ONLY.items():
        found = values.get(key, expected if key != "model_type" else None)
        if found != expected:
            raise ValueError(f"{path}: {key} is {found!r}; only {expected!r} is supported")
    for key, kind in _REQUIRED.items():
        if key not in values:
            raise ValueError(f"{path}: {key} is missing")
        if isinstance(values[key], bool) or not isinstance(values[key], (int, kind)) or values[key] <= 0:
            raise ValueError(f"{path}: {key} must be a positive {kind.__name__}, not {values[key]!r}")
    architecture = Qwen3Architecture(
        **{key: kind(values[key]) for key, kind in _REQUIRED.items()},
        head_dim=int(values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]),
        rope_theta=_rope_theta(path, values),
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        dtype=_dtype(path, values),
        mask_token_id=values.get("mask_token_id"),
    )
    _check_heads(path, architecture)
    return architecture


def _rope_theta(path: Path, values: dict) -> float:
    """transformers 5 keeps it in `rope_parameters`, older ones at the top level."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{path}: rope_type is {kind!r}; only 'default' (no RoPE scaling) is supported")
    theta = rope.get("rope_theta", values.get("rope_theta"))
    if theta is None:
        raise ValueError(f"{path}: rope_theta is missing")
    return float(theta)


def _dtype(path: Path, values: dict) -> str:
    name = values.get("dtype") or values.get("torch_dtype") or "float32"
    if name not in DTYPES:
        raise ValueError(f"{path}: dtype is {name!r}; it must be one of {', '.join(DTYPES)}")
    return name


def _check_heads(path: Path, architecture: Qwen3Architecture) -> None:
    heads, groups = architecture.num_attention_heads, architecture.num_key_value_heads
    if heads % groups:
        raise ValueError(f"{path}: num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({groups})")
    if architecture.head_dim % 2:
        raise ValueError(f"{path}: head_dim ({architecture.head_dim}) must be even for RoPE")
    mask = architecture.mask_token_id
    if mask is not None and not (isinstance(mask, int) and 0 <= mask < architecture.vocab_size):
        raise ValueError(f"{path}: mask_token_id ({mask!r}) must be an id below vocab_size ({architecture.vocab_size})")
