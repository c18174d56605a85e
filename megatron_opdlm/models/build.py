"""Student and teacher as one Megatron GPTModel class, which stops at the hidden states.

    teacher = build_model(architecture, CausalCoreAttention, parallel=..., dtype=..., ...)
    hidden = teacher(ids, position_ids, None)                  # [S, B, H], sharded along S under sequence parallelism
    logits = teacher.vocab_parallel_logits(hidden_NH)          # [N, V / tensor-parallel size]

Logits exist only where somebody needs them (trained or masked positions), so the model's forward leaves them out.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig

from megatron_opdlm.config.check_architecture import check_architecture
from megatron_opdlm.config.schema import ParallelConfig, Recompute
from megatron_opdlm.models.fp8 import fp8_settings, is_module_state
from megatron_opdlm.models.layer_specs import LAYERS, default_layers, has_transformer_engine, qwen3_block_spec
from megatron_opdlm.models.lora import has_adapters, is_adapter
from megatron_opdlm.models.pipeline import PipelineModel
from megatron_opdlm.models.qwen3 import DTYPES, Mixture, Qwen3Architecture
from megatron_opdlm.parallel.context_link import ContextLink
from megatron_opdlm.parallel.device import device
from megatron_opdlm.parallel.stage_link import StageLink

RECOMPUTE_SETTINGS: dict[Recompute, dict] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
"""`training.recompute` -> fields of Megatron's TransformerConfig."""


class Qwen3Model(GPTModel):
    """A Megatron GPTModel of Qwen3's shape whose forward ends at the final norm.

    Its state in a checkpoint is its weights alone, the same whichever layers it is made of; with adapters beside them
    (`models.lora`) it is the adapters.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_post_hook(_forgive_missing_module_state)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The weights as Megatron's sharded tensors. All ranks must call it."""
        state = super().sharded_state_dict(*args, **kwargs)
        adapters_alone = has_adapters(self)
        return {
            key: value
            for key, value in state.items()
            if not is_module_state(key) and (is_adapter(key) or not adapters_alone)
        }

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Hidden states `[S, B, H]` of `input_ids [B, S]` at absolute positions `position_ids [S]`.

        The positions are None where a key-value cache is attached, which knows them.

        Under sequence parallelism the result is this rank's part along S. All tensor-parallel ranks must call it.
        """
        embedded = self.embedding(input_ids=input_ids, position_ids=None) if self.pre_process else None
        angles = None if position_ids is None else self.rotary_angles(position_ids)[:, None, None]
        return self.decoder(hidden_states=embedded, attention_mask=attention_mask, rotary_pos_emb=angles)

    def rotary_angles(self, position_ids_S: torch.Tensor) -> torch.Tensor:
        """Angles `[S, D]`. Positions are explicit because rollout places a block anywhere in a sequence."""
        inverse = self.rotary_pos_emb.inv_freq.to(position_ids_S.device)
        angles = torch.outer(position_ids_S.to(inverse.dtype), inverse)
        return torch.cat((angles, angles), dim=-1)

    def whole_sequence(self, hidden_SBH: torch.Tensor) -> torch.Tensor:
        """The hidden states of all positions on every rank; gathers over the tensor-parallel group if they are sharded.

        The gradient that comes back must be the full one on every rank, as `distillation.loss` makes it.
        """
        if not self.config.sequence_parallel:
            return hidden_SBH
        return gather_from_sequence_parallel_region(hidden_SBH, tensor_parallel_output_grad=False)

    @property
    def output_weight(self) -> torch.Tensor:
        """This rank's rows `[V / tensor-parallel size, H]` of the output layer, which may be the embedding."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def vocab_parallel_logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """Logits `[N, V / tensor-parallel size]` over this rank's rows of the vocabulary."""
        return hidden_NH @ self.output_weight.t()


def _forgive_missing_module_state(model: torch.nn.Module, incompatible: Any) -> None:
    """Lets a state dict do without what checkpoints leave out."""
    adapters_alone = has_adapters(model)
    incompatible.missing_keys[:] = [
        key for key in incompatible.missing_keys if not is_module_state(key) and (is_adapter(key) or not adapters_alone)
    ]


def build_model(
    architecture: Qwen3Architecture,
    core_attention: Callable,
    *,
    parallel: ParallelConfig,
    dtype: str,
    padded_vocab_size: int,
    overrides: dict,
    fp8_recipe: str = "off",
    fp8_attention: bool = False,
    recompute: Recompute = "none",
) -> PipelineModel:
    """This rank's part of a model, with uninitialised weights, on its device. All ranks must call it.

    `padded_vocab_size` is the same for student and teacher, so that their vocabulary shards line up. FP8 must be one
    that `fp8.check_fp8` lets pass.
    """
    config = transformer_config(
        architecture,
        parallel=parallel,
        dtype=dtype,
        overrides=fp8_settings(fp8_recipe, fp8_attention) | RECOMPUTE_SETTINGS[recompute] | overrides,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    link = StageLink(groups.pp, device())
    num_chunks = parallel.virtual_pipeline_model_parallel_size
    chunks = [
        Qwen3Model(
            config,
            qwen3_block_spec(config, core_attention, vp_stage=place if num_chunks else None),
            vocab_size=padded_vocab_size,
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=link.is_first_stage and place == 0,
            post_process=link.is_last_stage and place == (num_chunks or 1) - 1,
            parallel_output=True,
            share_embeddings_and_output_weights=architecture.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=architecture.rope_theta,
            vp_stage=place if num_chunks else None,
        )
        for place in range(num_chunks or 1)
    ]
    shares_experts = architecture.mixture is not None and parallel.expert_model_parallel_size > 1
    expert_group = groups.tp_ep if shares_experts else None
    return PipelineModel(chunks, link, ContextLink(groups.cp), groups.tp, groups.mp, expert_group)


def transformer_config(
    architecture: Qwen3Architecture, *, parallel: ParallelConfig, dtype: str, overrides: dict
) -> TransformerConfig:
    """Megatron's configuration of the architecture. ValueError names what does not fit."""
    check_architecture(architecture, parallel)
    # Megatron-Core 0.16's routers call it
    if architecture.mixture is not None and torch.cuda.is_available() and not has_transformer_engine():
        raise ValueError('a mixture of experts needs Transformer Engine; try pip install "megatron-opdlm[te]"')
    layers = choose_layers(overrides)
    settings = _architecture_settings(architecture) | _runtime_settings(parallel, DTYPES[dtype], layers)
    settings |= _pipeline_settings(parallel, DTYPES[dtype])
    if architecture.mixture is not None:
        settings |= _mixture_settings(architecture.mixture, parallel, layers)
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    if unknown := sorted(set(overrides) - known):
        raise ValueError(f"transformer.{unknown[0]} is not a field of Megatron's TransformerConfig")
    with warnings.catch_warnings(action="ignore"):  # of its own defaults for CUDA graphs
        return TransformerConfig(**(settings | overrides))


def choose_layers(overrides: dict) -> str:
    """`transformer_impl`: the one in `overrides`, or `default_layers`. ValueError if it cannot be had here."""
    layers = overrides.get("transformer_impl", default_layers())
    if layers not in LAYERS or (layers == "transformer_engine" and not has_transformer_engine()):
        raise ValueError(
            f"transformer.transformer_impl ({layers}) must be local, or transformer_engine where that is installed"
        )
    return layers


def _architecture_settings(architecture: Qwen3Architecture) -> dict:
    return {
        "num_layers": architecture.num_hidden_layers,
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size": architecture.intermediate_size,
        "num_attention_heads": architecture.num_attention_heads,
        "num_query_groups": architecture.num_key_value_heads,
        "kv_channels": architecture.head_dim,
        "layernorm_epsilon": architecture.rms_norm_eps,
        "normalization": "RMSNorm",
        "qk_layernorm": architecture.qk_norm,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "add_qkv_bias": architecture.qkv_bias,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "deterministic_mode": torch.are_deterministic_algorithms_enabled(),
    }


def _mixture_settings(mixture: Mixture, parallel: ParallelConfig, layers: str) -> dict:
    """The routing of `transformers`: no token is dropped, no loss of its own balances the experts."""
    return {
        "num_moe_experts": mixture.num_experts,
        "moe_router_topk": mixture.num_experts_per_tok,
        "moe_ffn_hidden_size": mixture.moe_intermediate_size,
        # A softmax over the chosen experts alone is the one over all, scaled to a sum of one over the chosen.
        "moe_router_pre_softmax": not mixture.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_expert_capacity_factor": None,
        "moe_grouped_gemm": layers == "transformer_engine",
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
    }


def _runtime_settings(parallel: ParallelConfig, dtype: torch.dtype, layers: str) -> dict:
    """Fusions that need apex stay off; weights are loaded, never initialised."""
    return {
        "transformer_impl": layers,
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "context_parallel_size": parallel.context_parallel_size,
        "params_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "use_cpu_initialization": not torch.cuda.is_available(),
        # Megatron marks tensor-parallel weights (gradient norms count them once) while it initialises them.
        "init_method": _leave_uninitialised,
        "output_layer_init_method": _leave_uninitialised,
        "embedding_init_method": _leave_uninitialised,
        "gradient_accumulation_fusion": False,
        "bias_dropout_fusion": False,
        # SwiGLU compiled into one kernel, which keeps its input alone for the backward pass.
        "bias_activation_fusion": layers == "transformer_engine",
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        # Losses come as sums with their number of rows; Megatron divides once, by the global batch's total, so the
        # gradient does not depend on how rows are split into micro-batches and ranks.
        "calculate_per_token_loss": True,
        "finalize_model_grads_func": finalize_model_grads,
    }


def _pipeline_settings(parallel: ParallelConfig, dtype: torch.dtype) -> dict:
    """How many stages and chunks there are, and how Megatron's schedules exchange activations."""
    is_interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    return {
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "pipeline_dtype": dtype,
        # Micro-batches differ in length, so their shapes go ahead of them. The interleaved schedule leaves sends open
        # while it goes on, and waiting for a shape in between could block it: there `TrainStep` pads all alike.
        "variable_seq_lengths": parallel.pipeline_model_parallel_size > 1 and not is_interleaved,
        # Of mixtures of experts alone; but Megatron refuses its default beside variable lengths for dense models too.
        "moe_token_dispatcher_type": "alltoall",
        # Batched, the interleaved schedule mixes up what two stages send each other forward and backward.
        "batch_p2p_comm": not is_interleaved,
        "overlap_p2p_comm": is_interleaved,
    }


def _leave_uninitialised(weight: torch.Tensor) -> torch.Tensor:
    return weight
