"""Which module stands where in a layer of Megatron, with a core attention of choice.

Two kinds of layers, chosen by `config.transformer_impl`. Megatron's local ones, with our RMSNorm, run anywhere. Those
of Transformer Engine fuse the norms before attention and MLP into the linear layer behind them, and have FP8. The
parameters of both hold the same numbers, some under other names (`checkpointing.hf_qwen3` knows them all).

    config = TransformerConfig(transformer_impl=default_layers(), ...)
    block = qwen3_block_spec(config, CausalCoreAttention)
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_opdlm.models.decoding_layer import DecodingLayer
from megatron_opdlm.models.linear import ColumnLinear, RowLinear
from megatron_opdlm.models.rms_norm import RMSNorm


def has_transformer_engine() -> bool:
    """Whether Megatron found Transformer Engine when it was imported; never without a GPU (`parallel.cpu`)."""
    return gpt_layer_specs.HAVE_TE


def default_layers() -> str:
    """Transformer Engine's layers where it is installed, Megatron's local ones otherwise."""
    return "transformer_engine" if has_transformer_engine() else "local"


def qwen3_block_spec(
    config: TransformerConfig, core_attention: Callable, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of this rank's pipeline stage. `core_attention` is called with Megatron's keyword arguments."""
    layer, norm = LAYERS[config.transformer_impl](config.qk_layernorm, config.num_moe_experts)
    layer.submodules.self_attention.submodules.core_attention = core_attention
    layer.module = DecodingLayer
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=vp_stage), layer_norm=norm
    )


def _local_layer(qk_layernorm: bool, num_experts: int | None) -> tuple[ModuleSpec, type]:
    layer = gpt_layer_specs.get_gpt_layer_local_spec(
        num_experts=num_experts, qk_layernorm=qk_layernorm, normalization="RMSNorm"
    )
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    if num_experts is not None:
        # No linear layer follows the norm before a router, so with Transformer Engine too it stands by itself, and the
        # checkpoints of both have it under its own name.
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    attention = layer.submodules.self_attention.submodules
    attention.linear_qkv, attention.linear_proj = ColumnLinear, RowLinear
    if num_experts is None:
        mlp = layer.submodules.mlp  # a spec in Megatron-Core 0.16, a partial function in 0.19
        submodules = mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules
        submodules.linear_fc1, submodules.linear_fc2 = ColumnLinear, RowLinear
    if qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer, RMSNorm


def _transformer_engine_layer(qk_layernorm: bool, num_experts: int | None) -> tuple[ModuleSpec, type]:
    """All experts of a rank in one grouped product."""
    layer = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
        num_experts=num_experts, moe_grouped_gemm=num_experts is not None, qk_layernorm=qk_layernorm
    )
    return layer, gpt_layer_specs.TENorm


LAYERS: dict[str, Callable[[bool, int | None], tuple[ModuleSpec, type]]] = {
    "local": _local_layer,
    "transformer_engine": _transformer_engine_layer,
}
"""`transformer_impl` -> a function that makes the layer, and the norm behind the last one.

It takes `qk_layernorm` and the number of experts, which is None in a dense model.
"""
