"""Megatron's layer, which takes a shorter way while its model decodes.

With a key-value cache attached, a layer reads a flat list of tokens, no gradient follows, and the cache knows positions
and whom each token sees. Then much of what Megatron's way prepares for is not there, and beside the small products of a
decoding step it would take as long as they do:

- queries and keys are normalised and turned together, one behind the other as they leave the product;
- the last layer owes the cache the keys and values of every token, and nobody but the output layer its outputs: behind
  its attention it goes on with the tokens whose outputs are read;
- SwiGLU happens where its input is.

    layer.module = DecodingLayer                # in a layer's spec
    layer.cache = cache                         # by `rollout.kv_cache.attached`

The modules in it, and so its weights, adapters and communication, are those of training.

Legend: `T` tokens, `N` heads, `G` key-value heads, `J` the heads of a group: those that share a key, and the key, `D`
head dimension.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_opdlm.models.rms_norm import RMSNorm, normalised


class KeyValueCache(Protocol):
    """What a layer needs of a cache while its model decodes."""

    last_layer: int | None
    """The number of the layer whose outputs are the model's."""

    def attend(
        self, layer_number: int, heads_TGJD: torch.Tensor, value_TGD: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Applies RoPE, stores the keys and values, attends to everything visible.

        Returns `[T, N, D]`, or in the model's last layer the rows of tokens whose outputs are read.
        """
        ...

    def outputs_read(self, rows_T: torch.Tensor) -> torch.Tensor:
        """Of a tensor with a row for each token, the rows of tokens whose outputs are read."""
        ...


class DecodingLayer(TransformerLayer):
    """Is Megatron's as long as no cache is attached."""

    cache: KeyValueCache | None = None

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`[S, B, H]`, of which Megatron's block passes on the first; decoding `[T, 1, H]`, or the rows that are read.

        All ranks of the tensor-parallel group must call it, and those that share experts.
        """
        if self.cache is None:
            return super().forward(hidden_states, *args, **kwargs)
        attended = self._attended(self.input_layernorm(hidden_states))
        if self.layer_number == self.cache.last_layer:
            hidden_states = self.cache.outputs_read(hidden_states)
        hidden_states = hidden_states + _whole(attended)
        return hidden_states.add_(_whole(self._mlp(self.pre_mlp_layernorm(hidden_states)))), None

    def _attended(self, hidden_T1H: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        attention = self.self_attention
        heads_TGJD, value_TGD = self._heads(hidden_T1H)
        attended_TND = self.cache.attend(self.layer_number, heads_TGJD, value_TGD, attention.core_attention.scale)
        return attention.linear_proj(attended_TND.flatten(1)[:, None])

    def _heads(self, hidden_T1H: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys before RoPE, and values."""
        attention, num_groups = self.self_attention, self.self_attention.num_query_groups_per_partition
        if not isinstance(attention.q_layernorm, RMSNorm):
            query, key, value = (x[:, 0] for x in attention.get_query_key_value_tensors(hidden_T1H))
            return torch.cat([query.unflatten(1, (num_groups, -1)), key[:, :, None]], dim=2), value
        mixed, _ = attention.linear_qkv(hidden_T1H)
        mixed_TGXD = mixed[:, 0].unflatten(1, (num_groups, -1, attention.hidden_size_per_attention_head))
        heads_TGJD, value_TGD = mixed_TGXD[:, :, :-1], mixed_TGXD[:, :, -1]
        query_norm, key_norm = attention.q_layernorm, attention.k_layernorm
        weight_JD = torch.cat([query_norm.weight.expand(heads_TGJD.shape[2] - 1, -1), key_norm.weight[None]])
        return normalised(heads_TGJD, query_norm.eps).mul_(weight_JD), value_TGD

    def _mlp(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        config = self.config
        is_more = config.add_bias_linear or config.glu_linear_offset or config.activation_func_clamp_value is not None
        is_fused = config.bias_activation_fusion or config.use_te_activation_func
        if type(self.mlp) is not MLP or is_more or is_fused:
            return self.mlp(hidden)
        gate, up = self.mlp.linear_fc1(hidden)[0].chunk(2, dim=-1)
        return self.mlp.linear_fc2(F.silu(gate, inplace=True).mul_(up))


def _whole(out_with_bias: tuple[torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
    out, bias = out_with_bias
    return out if bias is None else out + bias
