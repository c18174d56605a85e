"""Which module stands where in a Qwen3 layer of Megatron: its local layers, our RMSNorm, a core attention of choice."""

from __future__ import annotations

from collections.abc import Callable

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_opdlm.models.rms_norm import RMSNorm


def qwen3_block_spec(
    config: TransformerConfig, core_attention: Callable, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of this rank's pipeline stage. `core_attention` is called with Megatron's keyword arguments."""
    layer = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    attention = layer.submodules.self_attention.submodules
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention.q_layernorm = attention.k_layernorm = RMSNorm
    attention.core_attention = core_attention
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=vp_stage), layer_norm=RMSNorm
    )
