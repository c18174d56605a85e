"""Checkpoints of a LoRA run, which hold adapters alone, and how they become whole weights again.

Which model they belong to is in the `config.yaml` beside them (`student.hf` or `student.checkpoint`, and `lora`).

    read = merged_reader(folder, architecture)            # None if the checkpoint holds a whole model
    read("decoder.layers.mlp.linear_fc2.weight", 3)       # layer 3's, adapter added in float32

A merged weight is `W + (alpha / rank) B A` in float32, with W in the number format that the run had it in.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from megatron_opdlm.checkpointing.distributed import read_tensor
from megatron_opdlm.checkpointing.hf_folder import SafetensorsReader
from megatron_opdlm.checkpointing.hf_qwen3 import check_hf_weights, read_whole
from megatron_opdlm.checkpointing.pretrained import open_pretrained, read_lora_run
from megatron_opdlm.config.schema import Config
from megatron_opdlm.models.qwen3 import DTYPES, Qwen3Architecture

Reader = Callable[[str, int | None], torch.Tensor]
"""A whole Megatron tensor by its key, without the part `decoder.layers.` in a layer, and the layer."""


def checkpoint_reader(folder: Path) -> Reader:
    """Reads the tensors that the checkpoint `folder` holds."""
    return lambda key, layer: read_tensor(folder, key if layer is None else f"decoder.layers.{key}", layer)


def merged_reader(folder: Path, architecture: Qwen3Architecture) -> tuple[Reader, torch.dtype] | None:
    """Reads the whole weights of a LoRA run's checkpoint, and the number format that the run had them in.

    None if the checkpoint holds no adapters. ValueError if the model that they belong to is not where it was.
    """
    config = read_lora_run(folder)
    if config is None:
        return None
    base, adapters = _base_reader(folder, config, architecture), checkpoint_reader(folder)
    adapted = {f"{parent}.{name}.weight" for name in config.lora.target_modules for parent in ("self_attention", "mlp")}
    scale, dtype = config.lora.alpha / config.lora.rank, DTYPES[config.precision.dtype]

    def read(key: str, layer: int | None) -> torch.Tensor:
        weight = base(key, layer).to(dtype)
        if key not in adapted:
            return weight
        module = key.removesuffix("weight")
        a, b = (adapters(module + name, layer).float() for name in ("lora_a", "lora_b"))
        return weight.float() + scale * (b @ a)

    return read, dtype


def _base_reader(folder: Path, config: Config, architecture: Qwen3Architecture) -> Reader:
    name = "student.hf" if config.student.hf is not None else "student.checkpoint"
    setting = f"{name} in {folder / 'config.yaml'}, to whose weights these adapters belong,"
    pretrained = open_pretrained(config.student.hf or config.student.checkpoint, setting)
    if pretrained.is_megatron:
        return checkpoint_reader(pretrained.folder)
    weights = SafetensorsReader(pretrained.folder)
    check_hf_weights(weights, architecture)
    return lambda key, layer: read_whole(weights, architecture, key, layer)
