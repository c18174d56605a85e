"""How one Megatron parameter is made of Hugging Face's tensors, and cut by tensor and expert parallelism.

A layout knows the names and shapes of the tensors it is made of (none, in an architecture without that parameter), how
this rank reads its part of them, and how the whole parameter falls apart into them again.

    GateUp().read(weights, "model.layers.0.", architecture, Shard(rank=1, size=2))
    GateUp().to_hf(fused, architecture)["mlp.up_proj.weight"]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from megatron_opdlm.checkpointing.hf_folder import SafetensorsReader
from megatron_opdlm.models.qwen3 import Qwen3Architecture

Shapes = dict[str, tuple[int, ...]]
ROUTER = "mlp.gate.weight"


@dataclass(frozen=True)
class Shard:
    """Part `rank` of `size` equal parts of an axis."""

    rank: int
    size: int

    def of(self, length: int) -> slice:
        """The part's slice of an axis of this length."""
        part = length // self.size
        return slice(self.rank * part, (self.rank + 1) * part)


@dataclass(frozen=True)
class Whole:
    """The same tensor on every rank."""

    hf: str

    def shapes(self, architecture: Qwen3Architecture) -> Shapes:
        if self.hf == ROUTER:
            return {self.hf: (architecture.mixture.num_experts, architecture.hidden_size)}
        if not self.hf.endswith(("q_norm.weight", "k_norm.weight")):
            return {self.hf: (architecture.hidden_size,)}
        return {self.hf: (architecture.head_dim,)} if architecture.qk_norm else {}

    def read(
        self, weights: SafetensorsReader, prefix: str, architecture: Qwen3Architecture, shard: Shard
    ) -> torch.Tensor:
        return weights.read(prefix + self.hf)

    def to_hf(self, tensor: torch.Tensor, architecture: Qwen3Architecture) -> dict[str, torch.Tensor]:
        return {self.hf: tensor}


@dataclass(frozen=True)
class Columns:
    """Cut along the input axis: the second linear layer of a pair."""

    hf: str

    def shapes(self, architecture: Qwen3Architecture) -> Shapes:
        inputs = {
            "self_attn.o_proj.weight": architecture.num_attention_heads * architecture.head_dim,
            "mlp.down_proj.weight": architecture.intermediate_size,
        }
        return {self.hf: (architecture.hidden_size, inputs[self.hf])}

    def read(
        self, weights: SafetensorsReader, prefix: str, architecture: Qwen3Architecture, shard: Shard
    ) -> torch.Tensor:
        _, inputs = self.shapes(architecture)[self.hf]
        return weights.read(prefix + self.hf, columns=shard.of(inputs))

    def to_hf(self, tensor: torch.Tensor, architecture: Qwen3Architecture) -> dict[str, torch.Tensor]:
        return {self.hf: tensor}


@dataclass(frozen=True)
class QueryKeyValue:
    """Megatron's fused projection: for each query group its query heads, its key head, its value head."""

    kind: Literal["weight", "bias"]

    def shapes(self, architecture: Qwen3Architecture) -> Shapes:
        if self.kind == "bias" and not architecture.qkv_bias:
            return {}
        query, groups = architecture.num_attention_heads, architecture.num_key_value_heads
        inputs = (architecture.hidden_size,) if self.kind == "weight" else ()
        return {
            f"self_attn.{part}_proj.{self.kind}": (num_heads * architecture.head_dim, *inputs)
            for part, num_heads in (("q", query), ("k", groups), ("v", groups))
        }

    def read(
        self, weights: SafetensorsReader, prefix: str, architecture: Qwen3Architecture, shard: Shard
    ) -> torch.Tensor:
        groups = architecture.num_key_value_heads // shard.size
        parts = []
        for name, (rows, *inputs) in self.shapes(architecture).items():
            parts.append(weights.read(prefix + name, shard.of(rows)).view(groups, -1, *inputs))
        return torch.cat(parts, dim=1).flatten(0, 1)

    def to_hf(self, tensor: torch.Tensor, architecture: Qwen3Architecture) -> dict[str, torch.Tensor]:
        dim, groups = architecture.head_dim, architecture.num_key_value_heads
        per_group = [architecture.num_attention_heads // groups * dim, dim, dim]
        parts = tensor.view(groups, sum(per_group), *tensor.shape[1:]).split(per_group, dim=1)
        return {name: part.flatten(0, 1) for name, part in zip(self.shapes(architecture), parts, strict=True)}


@dataclass(frozen=True)
class GateUp:
    """Megatron's fused first layer of a gated MLP: the gate's rows, then the other half's; each is cut by itself."""

    names = ("mlp.gate_proj.weight", "mlp.up_proj.weight")

    def shapes(self, architecture: Qwen3Architecture) -> Shapes:
        return dict.fromkeys(self.names, (architecture.intermediate_size, architecture.hidden_size))

    def read(
        self, weights: SafetensorsReader, prefix: str, architecture: Qwen3Architecture, shard: Shard
    ) -> torch.Tensor:
        rows = shard.of(architecture.intermediate_size)
        return torch.cat([weights.read(prefix + name, rows) for name in self.names])

    def to_hf(self, tensor: torch.Tensor, architecture: Qwen3Architecture) -> dict[str, torch.Tensor]:
        return dict(zip(self.names, tensor.chunk(2), strict=True))


@dataclass(frozen=True)
class Experts:
    """One of the two linear layers of all experts, whole experts one behind the other.

    The first is `GateUp` for each expert, the second `Columns`. A checkpoint has all experts in one tensor
    `[experts, rows, columns]`; a rank has a parameter for each of its own.
    """

    is_first: bool

    def shapes(self, architecture: Qwen3Architecture) -> Shapes:
        mixture, hidden = architecture.mixture, architecture.hidden_size
        width = mixture.moe_intermediate_size
        parts = {"gate": (width, hidden), "up": (width, hidden)} if self.is_first else {"down": (hidden, width)}
        return {
            f"mlp.experts.{expert}.{part}_proj.weight": shape
            for expert in range(mixture.num_experts)
            for part, shape in parts.items()
        }

    def read_expert(
        self, weights: SafetensorsReader, prefix: str, architecture: Qwen3Architecture, shard: Shard, expert: int
    ) -> torch.Tensor:
        """This rank's part of one expert; `shard` is the rank's among those that share the expert's matrices."""
        part, name = shard.of(architecture.mixture.moe_intermediate_size), f"{prefix}mlp.experts.{expert}."
        if not self.is_first:
            return weights.read(f"{name}down_proj.weight", columns=part)
        return torch.cat([weights.read(f"{name}{half}_proj.weight", part) for half in ("gate", "up")])

    def to_hf(self, tensor: torch.Tensor, architecture: Qwen3Architecture) -> dict[str, torch.Tensor]:
        pieces = tensor.chunk(2, dim=1) if self.is_first else (tensor,)
        by_expert = [piece[expert] for expert in range(len(tensor)) for piece in pieces]
        return dict(zip(self.shapes(architecture), by_expert, strict=True))


Layout = Whole | Columns | QueryKeyValue | GateUp | Experts
