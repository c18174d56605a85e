"""The two kinds of folder, as what their JSON files say.

`transformers`: a Qwen, which plain transformers loads. `sdar`: the same tensors under the names that SDAR has and
servers of block diffusion know. README.md has what each server reads.

    family = family_of(values["model_type"], "sdar")            # ("sdar", "SDARForCausalLM", ...)
    config_values(values, architecture, family, serving)        # config.json
    generation_values(values, serving)                          # generation_config.json
    sglang_values(serving)                                      # for --dllm-algorithm-config
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_opdlm.export.serving import IN_CONFIG, IN_GENERATION_CONFIG, Serving
from megatron_opdlm.models.qwen3 import Qwen3Architecture

FORMATS = ("transformers", "sdar")
SDAR_MASK_TOKEN_ID = 151669
"""What SGLang and LMDeploy take for the mask token of any SDAR: Qwen3's tokenizer has as many tokens."""


@dataclass(frozen=True)
class Family:
    """What a folder calls its model."""

    model_type: str
    architecture: str
    """The class of the model."""
    model_code: str
    """`module.class` with a `generate` of our own, in `remote_code`."""
    config_code: str | None = None
    """The same of the config, where transformers does not know the `model_type`."""

    @property
    def is_sdar(self) -> bool:
        """Whether servers take it for an SDAR."""
        return self.config_code is not None


_CODE = "modeling_block_diffusion"
_PLAIN = {
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", f"{_CODE}.Qwen2BlockDiffusionLM"),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", f"{_CODE}.Qwen3BlockDiffusionLM"),
    "qwen3_moe": Family("qwen3_moe", "Qwen3MoeForCausalLM", f"{_CODE}.Qwen3MoeBlockDiffusionLM"),
}
_SDAR = {
    "qwen3": Family("sdar", "SDARForCausalLM", "modeling_sdar.SDARForCausalLM", "configuration_sdar.SDARConfig"),
    "qwen3_moe": Family(
        "sdar_moe", "SDARMoeForCausalLM", "modeling_sdar.SDARMoeForCausalLM", "configuration_sdar.SDARMoeConfig"
    ),
}
_QWEN_OF = {family.model_type: name for name, family in _SDAR.items()}


def family_of(model_type: str, kind: str | None) -> Family:
    """The family under which a model of `model_type` goes out in the format `kind`; None for the format it has.

    ValueError if the format cannot hold the model.
    """
    if kind is None:
        kind = "sdar" if model_type in _QWEN_OF else "transformers"
    qwen = _QWEN_OF.get(model_type, model_type)
    if kind == "sdar" and qwen not in _SDAR:
        raise ValueError(f"--format sdar has no place for the biases of a {qwen}; it takes {', '.join(_SDAR)}")
    return _SDAR[qwen] if kind == "sdar" else _PLAIN[qwen]


def config_values(
    values: dict[str, Any], architecture: Qwen3Architecture, family: Family, serving: Serving | None, with_code: bool
) -> dict[str, Any]:
    """config.json of the exported folder, made of that of the plain one. An SDAR's embeddings are untied."""
    changed = {key: value for key, value in values.items() if key != "auto_map"}
    changed |= {"architectures": [family.architecture], "model_type": family.model_type}
    # what transformers 5 wrote without these, transformers 4 takes for a base of 10000, and for 128 experts
    changed.setdefault("rope_theta", architecture.rope_theta)
    if architecture.mixture is not None:
        changed.setdefault("num_experts", architecture.mixture.num_experts)
    if serving is not None:
        changed |= {"mask_token_id": serving.mask_token_id}
        changed |= {key: getattr(serving.rollout, name) for name, key in IN_CONFIG.items()}
    if with_code:
        configs = {"AutoConfig": family.config_code} if family.is_sdar else {}
        changed["auto_map"] = configs | {"AutoModelForCausalLM": family.model_code}
    return _as_published(changed, architecture) if family.is_sdar else changed


def _as_published(values: dict[str, Any], architecture: Qwen3Architecture) -> dict[str, Any]:
    """The spellings that servers look for, which are those of transformers 4."""
    changed = {key: value for key, value in values.items() if key not in ("dtype", "rope_parameters", "rope_scaling")}
    changed |= {
        "torch_dtype": values["dtype"],
        "rope_theta": architecture.rope_theta,
        "head_dim": architecture.head_dim,
        "attention_bias": False,
        "tie_word_embeddings": False,
    }
    if architecture.mixture is not None:
        changed.pop("num_local_experts", None)
        changed |= {"num_experts": architecture.mixture.num_experts, "decoder_sparse_step": 1, "mlp_only_layers": []}
    return changed


def generation_values(values: dict[str, Any], serving: Serving) -> dict[str, Any]:
    """generation_config.json: the tokens that end a response, and how to decode.

    What transformers made of a model's config it marks so, and then leaves out keys that it does not know.
    """
    ends = list(serving.end_token_ids)
    decoding = {key: getattr(serving.rollout, name) for name, key in IN_GENERATION_CONFIG.items()}
    kept = {key: value for key, value in values.items() if key != "_from_model_config"}
    return kept | {"eos_token_id": ends if len(ends) > 1 else ends[0]} | decoding


def sglang_values(serving: Serving) -> dict[str, Any]:
    """Settings of SGLang's `LowConfidence`, which commits what is above the threshold, one token at least."""
    rollout = serving.rollout
    threshold = rollout.dynamic_threshold if rollout.remasking_strategy == "low_confidence_dynamic" else 1.0
    return {"block_size": rollout.block_size, "threshold": threshold}


def is_served_alike(serving: Serving) -> bool:
    """Whether `LowConfidence` with these settings commits what the student's own strategy does, at temperature 0."""
    rollout = serving.rollout
    is_one_at_least = rollout.denoising_steps_per_block == rollout.block_size
    return is_one_at_least and rollout.remasking_strategy in ("low_confidence_dynamic", "low_confidence_static")
