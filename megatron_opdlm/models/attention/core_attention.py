"""The core attention modules that Megatron's SelfAttention calls: one for the student, one for the teacher.

Both take Megatron's `[S, B, heads, D]` queries, keys and values after QK-norm and RoPE and return `[S, B, heads * D]`.
Where ranks share sequences, `S` is this rank's part of the positions; in between, it attends to all positions of its
part of the heads (`parallel.context_link`). The student's input is two streams stacked in the batch dimension, the
teacher's is rows. A model that decodes attends to a key-value cache instead (`models.decoding_layer`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from megatron_opdlm.models.attention.backend import AttentionBackend, Streams
from megatron_opdlm.parallel.context_link import ContextLink


class CoreAttention(MegatronModule):
    """What both share: the constructor that Megatron's specs call, the softmax scale, the link of shared sequences."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.context = ContextLink(None if pg_collection is None else pg_collection.cp)
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5


class BlockDiffusionCoreAttention(CoreAttention):
    """Block-diffusion attention over a clean and a noisy stream.

    The batch holds the clean rows, then the noisy ones, and `attention_mask` carries their lengths as an integer tensor
    `[B]`: a tensor argument survives activation recompute and interleaved pipeline micro-batches, which a field set on
    the module would not.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        backend: AttentionBackend,
        block_size: int,
        **kwargs: object,
    ) -> None:
        super().__init__(config, layer_number, **kwargs)
        self.backend = backend.for_layer(config, layer_number)
        self.block_size = block_size

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        /,
        **_: object,
    ) -> torch.Tensor:
        """`[S, 2B, heads, D]` with lengths `[B]` as the mask."""
        query, key, value = self.context.whole_sequences(query, key, value)
        # [S, 2B, heads, D] -> three tensors [B, S, heads, D] for each stream
        clean, noisy = zip(*(x.transpose(0, 1).chunk(2) for x in (query, key, value)), strict=True)
        outs = self.backend.attend(
            Streams(*clean, *noisy), lengths=attention_mask, block_size=self.block_size, scale=self.scale
        )
        # Contiguous, since the linear layer behind would copy it otherwise.
        return self.context.own_positions(torch.cat([out.transpose(0, 1) for out in outs], dim=1)).flatten(2)


class CausalCoreAttention(CoreAttention):
    """The teacher's plain causal attention. Rows are padded on the right, so no mask is needed.

    With a mask, bool `[2S, 2S]`, the batch holds clean rows, then filled ones (`diffusion.attention_pattern`), which
    attend each other as one sequence of 2S tokens.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        /,
        **_: object,
    ) -> torch.Tensor:
        """`[S, B, heads, D]` -> `[S, B, heads * D]`."""
        if attention_mask is not None:
            return self._attend_under(attention_mask, query, key, value)
        query, key, value = (x.permute(1, 2, 0, 3) for x in self.context.whole_sequences(query, key, value))
        attended = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        return self.context.own_positions(attended.permute(2, 0, 1, 3)).flatten(2)

    def _attend_under(
        self, mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        assert self.context.size == 1, "a rank has all positions of both streams"
        num_sharing = query.shape[2] // key.shape[2]
        # [S, 2B, heads, D] -> [B, heads, 2S, D]; PyTorch's fused kernels take no mask beside grouped keys
        query, key, value = (
            torch.cat(x.chunk(2, dim=1)).permute(1, 2, 0, 3)
            for x in (query, key.repeat_interleave(num_sharing, 2), value.repeat_interleave(num_sharing, 2))
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale)
        return torch.cat(attended.permute(2, 0, 1, 3).chunk(2), dim=1).flatten(2)
