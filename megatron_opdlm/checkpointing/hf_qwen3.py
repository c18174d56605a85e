"""Dense Qwen3 weights: Hugging Face's tensors on one side, Megatron's on the other. One table, both directions.

Each row of the table names a Megatron parameter, its key in a distributed checkpoint, and a layout that knows which
Hugging Face tensors it is made of and how tensor parallelism cuts it. Distributed checkpoints hold whole tensors, so
the way back needs no model:

    load_hf_weights(model, folder, architecture, groups.tp)               # HF folder -> this rank's shards
    for name, tensor in hf_tensors(architecture, read): ...               # whole Megatron tensors -> HF tensors
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_opdlm.checkpointing.hf_folder import SafetensorsReader
from megatron_opdlm.models.build import Qwen3Model
from megatron_opdlm.models.qwen3 import Qwen3Architecture

Shapes = dict[str, tuple[int, ...]]


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
        width = architecture.head_dim if self.hf.endswith(("q_norm.weight", "k_norm.weight")) else None
        return {self.hf: (width or architecture.hidden_size,)}

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

    names = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")

    def shapes(self, architecture: Qwen3Architecture) -> Shapes:
        heads = (
            architecture.num_attention_heads,
            architecture.num_key_value_heads,
            architecture.num_key_value_heads,
        )
        sizes = [(num * architecture.head_dim, architecture.hidden_size) for num in heads]
        return dict(zip(self.names, sizes, strict=True))

    def read(
        self, weights: SafetensorsReader, prefix: str, architecture: Qwen3Architecture, shard: Shard
    ) -> torch.Tensor:
        groups = architecture.num_key_value_heads // shard.size
        parts = []
        for name, (rows, hidden) in self.shapes(architecture).items():
            parts.append(weights.read(prefix + name, shard.of(rows)).view(groups, -1, hidden))
        return torch.cat(parts, dim=1).flatten(0, 1)

    def to_hf(self, tensor: torch.Tensor, architecture: Qwen3Architecture) -> dict[str, torch.Tensor]:
        dim, groups = architecture.head_dim, architecture.num_key_value_heads
        per_group = [architecture.num_attention_heads // groups * dim, dim, dim]
        parts = tensor.view(groups, sum(per_group), -1).split(per_group, dim=1)
        return {name: part.flatten(0, 1) for name, part in zip(self.names, parts, strict=True)}


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


Layout = Whole | Columns | QueryKeyValue | GateUp

# Parameter of Megatron's local layer -> (its key in a distributed checkpoint, layout). The keys are the names that the
# parameters have in Transformer Engine's layers, where a norm is fused into the linear layer behind it; Megatron maps
# those of its local layers to the same keys.
LAYER: dict[str, tuple[str, Layout]] = {
    "input_layernorm.weight": ("self_attention.linear_qkv.layer_norm_weight", Whole("input_layernorm.weight")),
    "self_attention.linear_qkv.weight": ("self_attention.linear_qkv.weight", QueryKeyValue()),
    "self_attention.q_layernorm.weight": ("self_attention.q_layernorm.weight", Whole("self_attn.q_norm.weight")),
    "self_attention.k_layernorm.weight": ("self_attention.k_layernorm.weight", Whole("self_attn.k_norm.weight")),
    "self_attention.linear_proj.weight": ("self_attention.linear_proj.weight", Columns("self_attn.o_proj.weight")),
    "pre_mlp_layernorm.weight": ("mlp.linear_fc1.layer_norm_weight", Whole("post_attention_layernorm.weight")),
    "mlp.linear_fc1.weight": ("mlp.linear_fc1.weight", GateUp()),
    "mlp.linear_fc2.weight": ("mlp.linear_fc2.weight", Columns("mlp.down_proj.weight")),
}
PARAMETERS: dict[str, Layout] = {name: row[1] for local, row in LAYER.items() for name in (local, row[0])}
"""Parameter of a layer of either kind -> its layout."""
FINAL_NORM = ("decoder.final_layernorm.weight", Whole("model.norm.weight"))
EMBEDDING = ("embedding.word_embeddings.weight", "model.embed_tokens.weight")
OUTPUT = ("output_layer.weight", "lm_head.weight")


def load_hf_weights(model: Qwen3Model, folder: Path, architecture: Qwen3Architecture, group: dist.ProcessGroup) -> None:
    """Copies this rank's shard of every tensor, one tensor at a time.

    `architecture` may have more vocabulary rows than the folder (a mask token without a row): they start as the mean
    of the folder's rows. Rows that only pad the vocabulary are zero.

    Raises:
        ValueError: a missing tensor or one of a wrong shape; found before any weight is copied.
    """
    weights = SafetensorsReader(folder)
    check_hf_weights(weights, architecture)
    shard = Shard(group.rank(), group.size())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_local_tensor(name, parameter.shape, weights, architecture, shard))


def check_hf_weights(weights: SafetensorsReader, architecture: Qwen3Architecture) -> None:
    """ValueError for the first tensor that is missing or has a wrong shape."""
    expected = {FINAL_NORM[1].hf: (architecture.hidden_size,)}
    for index in range(architecture.num_hidden_layers):
        for _, layout in LAYER.values():
            expected |= {f"model.layers.{index}.{name}": shape for name, shape in layout.shapes(architecture).items()}
    for name, shape in expected.items():
        _check_shape(weights, name, shape)
    for name in _vocabulary_tensors(architecture):
        # Only the mask token's row may be missing: the student then adds it.
        is_mask_last = architecture.mask_token_id == architecture.vocab_size - 1
        if not (is_mask_last and weights.shape(name) == (architecture.vocab_size - 1, architecture.hidden_size)):
            _check_shape(weights, name, (architecture.vocab_size, architecture.hidden_size))


def hf_tensors(
    architecture: Qwen3Architecture, read: Callable[[str, int | None], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The Hugging Face tensors in the order of the model, one at a time.

    `read(key, layer)` gives a whole Megatron tensor by its key in a distributed checkpoint; `layer` is None outside the
    layers.
    """
    yield EMBEDDING[1], read(EMBEDDING[0], None)[: architecture.vocab_size]
    for index in range(architecture.num_hidden_layers):
        for key, layout in LAYER.values():
            for name, tensor in layout.to_hf(read(key, index), architecture).items():
                yield f"model.layers.{index}.{name}", tensor
    yield FINAL_NORM[1].hf, read(FINAL_NORM[0], None)
    if not architecture.tie_word_embeddings:
        yield OUTPUT[1], read(OUTPUT[0], None)[: architecture.vocab_size]


def _vocabulary_tensors(architecture: Qwen3Architecture) -> list[str]:
    return [EMBEDDING[1]] if architecture.tie_word_embeddings else [EMBEDDING[1], OUTPUT[1]]


def _check_shape(weights: SafetensorsReader, name: str, expected: tuple[int, ...]) -> None:
    if (found := weights.shape(name)) != expected:
        raise ValueError(f"{weights.folder}: tensor {name} has shape {list(found)}, expected {list(expected)}")


def _local_tensor(
    name: str, shape: torch.Size, weights: SafetensorsReader, architecture: Qwen3Architecture, shard: Shard
) -> torch.Tensor:
    """This rank's part of the Megatron parameter `name`."""
    for megatron, hf in (EMBEDDING, OUTPUT):
        if name == megatron:
            return _vocabulary_rows(hf, shape, weights, architecture, shard)
    if name == FINAL_NORM[0]:
        return weights.read(FINAL_NORM[1].hf)
    _, _, index, parameter = name.split(".", 3)  # decoder.layers.<index>.<parameter>
    return PARAMETERS[parameter].read(weights, f"model.layers.{index}.", architecture, shard)


def _vocabulary_rows(
    hf: str, shape: torch.Size, weights: SafetensorsReader, architecture: Qwen3Architecture, shard: Shard
) -> torch.Tensor:
    first, in_folder = shard.rank * shape[0], weights.shape(hf)[0]
    rows = weights.read(hf, slice(min(first, in_folder), min(first + shape[0], in_folder)))
    padded = torch.zeros(shape, dtype=rows.dtype)
    padded[: len(rows)] = rows
    added = range(max(in_folder, first), min(architecture.vocab_size, first + shape[0]))
    if len(added) > 0:
        padded[added.start - first : added.stop - first] = weights.read(hf).float().mean(0).to(rows.dtype)
    return padded
