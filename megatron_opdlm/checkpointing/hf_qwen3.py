"""The weights of a Qwen3 or a relative: Hugging Face's tensors on one side, Megatron's on the other. One table.

Each row of the table names a Megatron parameter, its key in a distributed checkpoint, and its layout
(`hf_layouts`). The table serves both directions. Distributed checkpoints hold whole tensors, so the way back needs no
model:

    load_hf_weights(model, folder, architecture, groups)                  # HF folder -> this rank's shards
    for name, tensor in hf_tensors(architecture, read): ...               # whole Megatron tensors -> HF tensors
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_opdlm.checkpointing.hf_folder import SafetensorsReader
from megatron_opdlm.checkpointing.hf_layouts import (
    ROUTER,
    Columns,
    Experts,
    GateUp,
    Layout,
    QueryKeyValue,
    Shard,
    Whole,
)
from megatron_opdlm.models.pipeline import PipelineModel
from megatron_opdlm.models.qwen3 import Qwen3Architecture

# Parameter of Megatron's local layer -> (its key in a distributed checkpoint, layout). The keys are the names that the
# parameters have in Transformer Engine's layers, where a norm is fused into the linear layer behind it; Megatron maps
# those of its local layers to the same keys.
ATTENTION: dict[str, tuple[str, Layout]] = {
    "input_layernorm.weight": ("self_attention.linear_qkv.layer_norm_weight", Whole("input_layernorm.weight")),
    "self_attention.linear_qkv.weight": ("self_attention.linear_qkv.weight", QueryKeyValue("weight")),
    "self_attention.linear_qkv.bias": ("self_attention.linear_qkv.bias", QueryKeyValue("bias")),
    "self_attention.q_layernorm.weight": ("self_attention.q_layernorm.weight", Whole("self_attn.q_norm.weight")),
    "self_attention.k_layernorm.weight": ("self_attention.k_layernorm.weight", Whole("self_attn.k_norm.weight")),
    "self_attention.linear_proj.weight": ("self_attention.linear_proj.weight", Columns("self_attn.o_proj.weight")),
}
LAYER: dict[str, tuple[str, Layout]] = ATTENTION | {
    "pre_mlp_layernorm.weight": ("mlp.linear_fc1.layer_norm_weight", Whole("post_attention_layernorm.weight")),
    "mlp.linear_fc1.weight": ("mlp.linear_fc1.weight", GateUp()),
    "mlp.linear_fc2.weight": ("mlp.linear_fc2.weight", Columns("mlp.down_proj.weight")),
}
"""Of a dense model."""
MIXTURE_LAYER: dict[str, tuple[str, Layout]] = ATTENTION | {
    "pre_mlp_layernorm.weight": ("pre_mlp_layernorm.weight", Whole("post_attention_layernorm.weight")),
    "mlp.router.weight": ("mlp.router.weight", Whole(ROUTER)),
    "mlp.experts.linear_fc1.weight": ("mlp.experts.experts.linear_fc1.weight", Experts(is_first=True)),
    "mlp.experts.linear_fc2.weight": ("mlp.experts.experts.linear_fc2.weight", Experts(is_first=False)),
}
"""Of a mixture of experts. A rank has the parameters `_EXPERT` for the experts."""
PARAMETERS: dict[str, Layout] = {
    name: layout for rows in (LAYER, MIXTURE_LAYER) for local, (key, layout) in rows.items() for name in (local, key)
}
"""Parameter of a layer of either kind -> its layout."""
_EXPERT = re.compile(
    r"^mlp\.experts\.(local_experts\.(?P<sequential>\d+)\.)?linear_fc(?P<layer>[12])\.weight(?P<grouped>\d+)?$"
)
"""A parameter of one expert, by its number on this rank: of Megatron's local layers, or Transformer Engine's."""
FINAL_NORM = ("decoder.final_layernorm.weight", Whole("model.norm.weight"))
EMBEDDING = ("embedding.word_embeddings.weight", "model.embed_tokens.weight")
OUTPUT = ("output_layer.weight", "lm_head.weight")


@dataclass(frozen=True)
class _Place:
    """What of a model this rank holds."""

    shard: Shard
    """Among the ranks that share a weight matrix."""
    expert_shard: Shard
    """Among those that share a matrix of an expert."""
    experts: Shard
    """Of the experts."""


def layer_table(architecture: Qwen3Architecture) -> dict[str, tuple[str, Layout]]:
    """The rows of one layer."""
    return LAYER if architecture.mixture is None else MIXTURE_LAYER


def load_hf_weights(
    model: PipelineModel, folder: Path, architecture: Qwen3Architecture, groups: ProcessGroupCollection
) -> None:
    """Copies this rank's shard of every tensor, one tensor at a time.

    `architecture` may have more vocabulary rows than the folder (a mask token without a row): they start as the mean
    of the folder's rows. Rows that only pad the vocabulary are zero.

    Raises:
        ValueError: a missing tensor or one of a wrong shape, found before any weight is copied; a number in this
            rank's shards that is not finite.
    """
    weights = SafetensorsReader(folder)
    check_hf_weights(weights, architecture)
    place = _Place(*(Shard(group.rank(), group.size()) for group in (groups.tp, groups.expt_tp, groups.ep)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = _local_tensor(name, parameter.shape, weights, architecture, place)
            if not tensor.isfinite().all():
                raise ValueError(f"{folder}: the weights of {name} hold numbers that are not finite")
            parameter.copy_(tensor)


def check_hf_weights(weights: SafetensorsReader, architecture: Qwen3Architecture) -> None:
    """ValueError for the first tensor that is missing or has a wrong shape."""
    expected = {FINAL_NORM[1].hf: (architecture.hidden_size,)}
    for index in range(architecture.num_hidden_layers):
        for _, layout in layer_table(architecture).values():
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
        for key, layout in layer_table(architecture).values():
            if layout.shapes(architecture):
                for name, tensor in layout.to_hf(read(key, index), architecture).items():
                    yield f"model.layers.{index}.{name}", tensor
    yield FINAL_NORM[1].hf, read(FINAL_NORM[0], None)
    if not architecture.tie_word_embeddings:
        yield OUTPUT[1], read(OUTPUT[0], None)[: architecture.vocab_size]


def read_whole(
    weights: SafetensorsReader, architecture: Qwen3Architecture, key: str, layer: int | None
) -> torch.Tensor:
    """A whole Megatron tensor made of a Hugging Face folder, by its key as `hf_tensors` asks for it."""
    whole = Shard(0, 1)
    for in_megatron, in_hf in (EMBEDDING, OUTPUT):
        if key == in_megatron:
            shape = torch.Size((architecture.vocab_size, architecture.hidden_size))
            return _vocabulary_rows(in_hf, shape, weights, architecture, whole)
    if key == FINAL_NORM[0]:
        return weights.read(FINAL_NORM[1].hf)
    (layout,) = (layout for known, layout in layer_table(architecture).values() if known == key)
    prefix = f"model.layers.{layer}."
    if isinstance(layout, Experts):
        experts = range(architecture.mixture.num_experts)
        return torch.stack([layout.read_expert(weights, prefix, architecture, whole, expert) for expert in experts])
    return layout.read(weights, prefix, architecture, whole)


def _vocabulary_tensors(architecture: Qwen3Architecture) -> list[str]:
    return [EMBEDDING[1]] if architecture.tie_word_embeddings else [EMBEDDING[1], OUTPUT[1]]


def _check_shape(weights: SafetensorsReader, name: str, expected: tuple[int, ...]) -> None:
    if (found := weights.shape(name)) != expected:
        raise ValueError(f"{weights.folder}: tensor {name} has shape {list(found)}, expected {list(expected)}")


def _local_tensor(
    name: str, shape: torch.Size, weights: SafetensorsReader, architecture: Qwen3Architecture, place: _Place
) -> torch.Tensor:
    """This rank's part of the Megatron parameter `name`."""
    if name in (EMBEDDING[0], OUTPUT[0]):
        # The last pipeline stage has a copy of the embedding where the output layer is tied to it.
        is_embedding = name == EMBEDDING[0] or architecture.tie_word_embeddings
        return _vocabulary_rows((EMBEDDING if is_embedding else OUTPUT)[1], shape, weights, architecture, place.shard)
    if name == FINAL_NORM[0]:
        return weights.read(FINAL_NORM[1].hf)
    _, _, index, parameter = name.split(".", 3)  # decoder.layers.<index>.<parameter>
    prefix = f"model.layers.{index}."
    if (found := _EXPERT.search(parameter)) is None:
        return PARAMETERS[parameter].read(weights, prefix, architecture, place.shard)
    experts = range(architecture.mixture.num_experts)[place.experts.of(architecture.mixture.num_experts)]
    layout = Experts(is_first=found["layer"] == "1")
    expert = experts[int(found["sequential"] or found["grouped"])]
    return layout.read_expert(weights, prefix, architecture, place.expert_shard, expert)


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
