"""What a forward of the student keeps for its backward pass, tensor by tensor.

    shape = TokenShape.of(architecture, layout, "transformer_engine", itemsize=2)
    shape.layer_bytes()                                         # per token of a stream, one layer, on one rank

Each term is a tensor that autograd holds, named in the code. Local layers were listed with PyTorch's
`saved_tensors_hooks`, and the tests measure them. Those of Transformer Engine are what its modules hand to
`save_for_backward` (transformer_engine/pytorch/module: layernorm_linear, linear, grouped_linear; ops/basic/rmsnorm),
with Megatron's around them (core/fusions/fused_bias_swiglu.py, core/transformer/moe): not yet measured, for want of a
GPU. FP8 would keep the inputs of linear layers in half of the bytes; that is left out, so that FP8 never makes a plan
too small.

Tokens are those of both streams: a row of T tokens has 2T. H hidden size, q and kv the width of this rank's query and
of its key heads, F its part of the MLP, e bytes of a number.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_opdlm.config.architecture import Qwen3Architecture
from megatron_opdlm.config.schema import Recompute
from megatron_opdlm.planning.layout import Layout


@dataclass(frozen=True, kw_only=True)
class TokenShape:
    """Widths of one token's activations in one layer of this rank, in elements."""

    hidden: int
    hidden_part: float
    """Of the residual stream: 1/TP of it under sequence parallelism."""
    query: int
    key: int
    heads: int
    ffn: int
    copies: float
    """Of a token, in the MLPs of this rank, where all experts get equally many. 1 in a dense model."""
    sent: float
    """Of these, what a rank hands to the all-to-all, before those that share an expert gather them."""
    num_experts: int
    """0 in a dense model."""
    has_qk_norm: bool
    is_fused: bool
    """Transformer Engine's layers."""
    itemsize: int

    @classmethod
    def of(cls, architecture: Qwen3Architecture, layout: Layout, layers: str, itemsize: int) -> TokenShape:
        mixture, size = architecture.mixture, layout.tensor
        ffn, sent = architecture.intermediate_size // size, 1.0
        if mixture is not None:
            ffn = mixture.moe_intermediate_size // layout.expert_tensor
            sent = mixture.num_experts_per_tok / (size if layout.sequence_parallel else 1)
        return cls(
            hidden=architecture.hidden_size,
            hidden_part=architecture.hidden_size / (size if layout.sequence_parallel else 1),
            query=architecture.num_attention_heads * architecture.head_dim // size,
            key=architecture.num_key_value_heads * architecture.head_dim // size,
            heads=architecture.num_attention_heads // size,
            ffn=ffn,
            copies=sent if mixture is None else sent * layout.expert_tensor,
            sent=sent,
            num_experts=0 if mixture is None else mixture.num_experts,
            has_qk_norm=architecture.qk_norm,
            is_fused=layers == "transformer_engine",
            itemsize=itemsize,
        )

    def layer_bytes(self, recompute: Recompute = "none") -> float:
        """Kept by one layer for one token of one stream."""
        if recompute == "full":
            return self.hidden_part * self.itemsize
        kept = 2 * self._norm_bytes() + self._attention_bytes() + self._mlp_bytes()
        if recompute == "selective":  # the output of attention and its log-sum-exp come from a second product
            kept -= self.query * self.itemsize + 4 * self.heads
        return kept

    def final_norm_bytes(self) -> float:
        """Kept behind the last layer: of the final norm, and its output in float32 or as it is for the loss."""
        return self._norm_bytes()

    def _norm_bytes(self) -> float:
        """The residual stream, the norm's result (the input of the linear layer), 1 / rms. Local layers compute in
        float32 and keep the normalised stream too."""
        per_element = 2 * self.itemsize if self.is_fused else 4 + 2 * self.itemsize
        return per_element * self.hidden_part + 4

    def _attention_bytes(self) -> float:
        mixed = self.query + 2 * self.key  # one tensor, kept alive by the values
        turned, outputs = self.query + self.key, 2 * self.query  # after RoPE; of attention, and the same in [S, B, H]
        kept = self.itemsize * (mixed + turned + outputs) + 4 * self.heads
        if not self.has_qk_norm:
            return kept
        statistics = 4 * (self.heads + self.heads * self.key / self.query)
        if self.is_fused:
            return kept + self.itemsize * (self.query + self.key) + statistics
        wide_key = 4 * self.key if self.itemsize < 4 else 0  # in float32 that is the mixed tensor itself
        return kept + 4 * self.query + wide_key + self.itemsize * (self.query + self.key) + statistics

    def _mlp_bytes(self) -> float:
        """Both inputs of SwiGLU and the input of the second matrix; unfused also the sigmoid's part and a copy."""
        if not self.num_experts:
            return self.itemsize * self.ffn * (3 if self.is_fused else 5)
        # the copies that experts get, with their places and weights; the router's logits and choices
        copies = self.itemsize * (self.hidden + self.ffn * (3 if self.is_fused else 6)) + 28
        return self.copies * copies + 13 * self.num_experts * self.hidden_part / self.hidden

    def backward_work_bytes(self) -> float:
        """Alive at one time in the backward pass of a layer, for a token, at most in its MLP: the gradients of SwiGLU,
        or those of the first matrix with its input, which sequence parallelism gathers once more."""
        if not self.is_fused:
            return self.itemsize * (2 * self.hidden_part + 4 * self.copies * self.ffn)
        if self.num_experts:
            # or, in a forward that is run again, the experts' outputs as they are and sorted, beside what was sent
            moved = 2 * (self.copies + self.sent) * self.hidden
            work = max(moved, self.copies * (2 * self.ffn + max(self.ffn, self.hidden)))
        else:
            gathered = self.hidden if self.hidden_part < self.hidden else 0
            work = max(3 * self.ffn, 2 * self.ffn + self.hidden + gathered)
        return self.itemsize * (2 * self.hidden_part + work)

    def forward_work_bytes(self) -> float:
        """Alive at one time in a forward without gradients, for a token: the stream twice, and the widest layer."""
        heads, ffn = 2 * (self.query + 2 * self.key), 3 * self.copies * self.ffn
        if not self.num_experts:
            widest = self.hidden + ffn
        elif self.is_fused:  # Megatron's MoELayer holds what was sent and what came until the outputs are sorted
            widest = self.hidden * (2 * self.sent + self.copies) + max(ffn, 2 * self.copies * self.hidden)
        else:
            widest = self.hidden * (1 + self.copies) + ffn
        return self.itemsize * (2 * self.hidden_part + max(heads, widest))


def in_flight(layout: Layout, stage: int, num_micro_batches: int) -> int:
    """Chunk forwards whose activations a stage holds at one time.

    One forward, one backward: as many micro-batches as there are stages from this one on. Interleaved: Megatron's
    warm-up (`get_pp_rank_microbatches` in core/pipeline_parallel/schedules.py) and the one that follows.
    """
    if layout.pipeline == 1:
        return 1
    if layout.chunks == 1:
        return min(layout.pipeline - stage, num_micro_batches)
    warm_up = 2 * (layout.pipeline - stage - 1) + (layout.chunks - 1) * layout.pipeline
    return min(warm_up + 1, num_micro_batches * layout.chunks)
