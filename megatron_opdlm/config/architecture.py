"""The shape of a Qwen3 or a relative of it, read from a Hugging Face `config.json`.

    architecture = read_architecture(Path("Qwen3-0.6B"))
    architecture.num_hidden_layers, architecture.head_dim

Field names are Hugging Face's. Five families share these tensors, by `model_type`:

- `qwen3`: norms on queries and keys, no bias;
- `qwen3_moe`: a Qwen3 with a mixture of experts in place of every MLP;
- `qwen2` (Qwen2.5 too): biases on the query, key and value projections, no norms, often no `head_dim`;
- `sdar` (SDAR, and TraDo made from it): a Qwen3 that denoises blocks already. Its config has Qwen3's keys, with untied
  embeddings. Some name a `mask_token_id` (SDAR-1.7B-Chat's in github.com/hxhcreate/DARE), some do not
  (huggingface.co/JetLM/SDAR-4B-Chat); the tokenizer has it as `<|MASK|>`, id 151669;
- `sdar_moe`: the same of a `qwen3_moe`.

Everything this project cannot reproduce exactly (RoPE scaling, other biases, sliding windows, other activations) is
refused here, with the key that says so.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

DTYPES = ("bfloat16", "float16", "float32")
"""Number formats that a folder may have."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The experts that stand in place of every MLP, and how a token finds its own."""

    num_experts: int
    num_experts_per_tok: int
    """A token goes to as many, those that its router gives the highest probabilities."""
    moe_intermediate_size: int
    """Of one expert; `intermediate_size` then has no tensor."""
    norm_topk_prob: bool
    """The probabilities of a token's experts are scaled to a sum of one before they weigh the outputs."""


@dataclass(frozen=True, kw_only=True)
class Qwen3Architecture:
    """What decides the tensors of a model and how they are used."""

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
    qkv_bias: bool = False
    """Biases on the query, key and value projections."""
    qk_norm: bool = True
    """An RMSNorm over each head's query and key."""
    is_block_diffusion: bool = False
    """The family denoises blocks already, so it is no autoregressive teacher."""
    mixture: Mixture | None = None
    """None in a dense model."""

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
_FAMILIES = {
    "qwen3": {},
    "qwen3_moe": {},
    "qwen2": {"qkv_bias": True, "qk_norm": False},
    "sdar": {"is_block_diffusion": True},
    "sdar_moe": {"is_block_diffusion": True},
}
"""`model_type` -> what of the architecture its config does not spell out."""
_ONLY = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}
"""Keys that have one supported value, which is also their default. A `qwen2` has no `attention_bias`."""
_ONLY_OF_MIXTURES = {"decoder_sparse_step": 1, "mlp_only_layers": []}
"""The same in a `qwen3_moe` or `sdar_moe`: every layer has experts."""


def read_config_json(folder: Path) -> dict:
    """The parsed `config.json`. ValueError names the file and what is wrong with it."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a Hugging Face folder: it has no config.json")
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return values


def read_architecture(folder: Path) -> Qwen3Architecture:
    """Reads and checks `folder/config.json`. ValueError names the file, the key, its value and the rule."""
    path = Path(folder) / "config.json"
    values = read_config_json(folder)
    family = values.get("model_type")
    if family not in _FAMILIES:
        raise ValueError(f"{path}: model_type is {family!r}; it must be one of {', '.join(_FAMILIES)}")
    if values.get("quantization_config"):
        raise ValueError(f"{path}: quantization_config is set; name the folder that these quantized weights came from")
    is_mixture = family in ("qwen3_moe", "sdar_moe")
    for key, expected in (_ONLY | (_ONLY_OF_MIXTURES if is_mixture else {})).items():
        if (found := values.get(key, expected)) != expected:
            raise ValueError(f"{path}: {key} is {found!r}; only {expected!r} is supported")
    for key, kind in _REQUIRED.items():
        _check_positive(path, values, key, kind)
    architecture = Qwen3Architecture(
        **{key: kind(values[key]) for key, kind in _REQUIRED.items()},
        head_dim=_head_dim(path, values),
        rope_theta=_rope_theta(path, values),
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        dtype=_dtype(path, values),
        mask_token_id=values.get("mask_token_id"),
        mixture=_mixture(path, values) if is_mixture else None,
        **_FAMILIES[family],
    )
    _check_heads(path, architecture)
    return architecture


def _check_positive(path: Path, values: dict, key: str, kind: type) -> None:
    if key not in values:
        raise ValueError(f"{path}: {key} is missing")
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < math.inf:
        raise ValueError(f"{path}: {key} must be a positive {kind.__name__}, not {value!r}")


def _head_dim(path: Path, values: dict) -> int:
    if values.get("head_dim") is None:
        return values["hidden_size"] // values["num_attention_heads"]
    _check_positive(path, values, "head_dim", int)
    return values["head_dim"]


def _mixture(path: Path, values: dict) -> Mixture:
    """`router_aux_loss_coef` is left alone: a student learns its routing from the divergence as all the rest."""
    # transformers 5 writes the first name, what is published has the second
    num_experts = "num_local_experts" if "num_local_experts" in values else "num_experts"
    for key in (num_experts, "num_experts_per_tok", "moe_intermediate_size"):
        _check_positive(path, values, key, int)
    mixture = Mixture(
        num_experts=values[num_experts],
        num_experts_per_tok=values["num_experts_per_tok"],
        moe_intermediate_size=values["moe_intermediate_size"],
        norm_topk_prob=bool(values.get("norm_topk_prob", False)),
    )
    chosen = mixture.num_experts_per_tok
    if not 2 <= chosen <= mixture.num_experts:
        raise ValueError(
            f"{path}: num_experts_per_tok ({chosen}) must lie between 2 and {num_experts} ({mixture.num_experts})"
        )
    return mixture


def _rope_theta(path: Path, values: dict) -> float:
    """transformers 5 keeps it in `rope_parameters`, older ones at the top level."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: rope_parameters must be an object, not {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{path}: rope_type is {kind!r}; only 'default' (no RoPE scaling) is supported")
    theta = rope.get("rope_theta", values.get("rope_theta"))
    if theta is None:
        raise ValueError(f"{path}: rope_theta is missing")
    _check_positive(path, {"rope_theta": theta}, "rope_theta", float)
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
