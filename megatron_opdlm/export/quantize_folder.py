"""A quantized model as a Hugging Face folder in the form that vLLM, SGLang and TensorRT-LLM read.

    write_quantized_folder(output, model, architecture, "fp8", dtype="bfloat16", write_assets=source.write_assets)
    for name, weight in dequantized_tensors(output): ...       # what the folder means, in float32

A quantized `X.weight` holds codes, with `X.weight_scale` and `X.input_scale` beside it: a weight is its code times its
scale. Where Megatron has one matrix for several of Hugging Face's (queries, keys and values; gate and other half), they
share its scales, which servers ask for: they fuse these matrices again. README.md says who reads what.

nvidia-modelopt's own exporters do not serve: `export_mcore_gpt_to_hf` imports `megatron.core.models.hybrid`, which
Megatron-Core 0.16 lacks, takes a whole `transformers` model class for the names that `checkpointing.hf_qwen3` has, and
writes no INT8 configuration (modelopt/torch/export/unified_export_megatron.py, 0.47.0). `export_hf_checkpoint` wants a
model of `transformers`, which would be quantized and calibrated apart from the one that decodes here. What defines the
format is theirs: scales and codes (modelopt/torch/export/quant_utils.py), configuration (convert_hf_config.py).
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_opdlm.checkpointing.folders import PARTIAL
from megatron_opdlm.checkpointing.hf_folder import SafetensorsReader, write_safetensors
from megatron_opdlm.checkpointing.hf_qwen3 import hf_tensors, layer_table
from megatron_opdlm.export.quantize import FORMATS, Quantization, linear_layers
from megatron_opdlm.models.pipeline import PipelineModel
from megatron_opdlm.models.qwen3 import Qwen3Architecture, read_config_json

if TYPE_CHECKING:
    from modelopt.torch.quantization.nn import QuantModule

CONFIG_FILE = "hf_quant_config.json"
REPORT_FILE = "quantization_report.json"


def write_quantized_folder(
    output: Path,
    model: PipelineModel,
    architecture: Qwen3Architecture,
    quantization: Quantization,
    *,
    dtype: str,
    write_assets: Callable[[Path], None],
    report: dict,
) -> None:
    """Writes `output` as a folder of the quantized model, which one rank holds whole, with `report` in it as JSON.

    `dtype` is the model's, and that of what stays unquantized; `write_assets` fills in config and tokenizer. The
    folder is read back before it gets its name, so an output is whole, and means what the model computes, or absent.
    """
    partial = output.with_name(output.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write_assets(partial)
        write_safetensors(partial, quantized_tensors(model, architecture, quantization))
        _write_configuration(partial, architecture, quantization, dtype)
        (partial / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        _check_read_back(partial, model, architecture)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@torch.no_grad()
def quantized_tensors(
    model: PipelineModel, architecture: Qwen3Architecture, quantization: Quantization
) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face's tensors in the order of the model, each quantized weight followed by its scales."""
    quantized = _quantized_names(architecture)
    fields = [hf_tensors(architecture, _Reader(model, architecture, field)) for field in FORMATS[quantization].scales]
    for (name, weight), *scales in zip(
        hf_tensors(architecture, _Reader(model, architecture, "weight")), *fields, strict=True
    ):
        yield name, weight.cpu()
        if name in quantized:
            for field, (_, rows) in zip(FORMATS[quantization].scales, scales, strict=True):
                # of the same number for every row one is left, `[1]`
                yield name.removesuffix("weight") + field, (rows if rows.ndim > 1 else rows[:1]).cpu().clone()


@torch.no_grad()
def multiplied_tensors(model: PipelineModel, architecture: Qwen3Architecture) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face's tensors as the model multiplies with them: rounded by its quantizers, in its number format."""
    return hf_tensors(architecture, _Reader(model, architecture, "rounded"))


def dequantized_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that a folder stands for, in float32: codes times scales, and all others as they are.

    ValueError for a folder whose weights have four bits, or that lacks files.
    """
    weights = SafetensorsReader(folder)
    for name in sorted(weights.names):
        if name.endswith("_scale_2"):
            raise ValueError(f"{folder} has weights of four bits, which are not read back here")
        if not name.endswith("_scale"):
            yield name, _dequantized(weights, name)


def _dequantized(weights: SafetensorsReader, name: str) -> torch.Tensor:
    scale = f"{name}_scale"
    return weights.read(name).float() * (weights.read(scale).float() if scale in weights.names else 1.0)


class _Reader:
    """`read(key, layer)` of `hf_tensors`: one field of a model's parameters, whole, by their keys in a checkpoint.

    Of parameters that are not quantized it gives themselves, whatever the field.
    """

    def __init__(self, model: PipelineModel, architecture: Qwen3Architecture, field: str) -> None:
        self.parameters, self.layers = dict(model.named_parameters()), dict(linear_layers(model))
        self.names = {key: name for name, (key, _) in layer_table(architecture).items()}
        self.num_experts = architecture.mixture.num_experts if architecture.mixture else 0
        self.of = FIELDS[field]

    def __call__(self, key: str, layer: int | None) -> torch.Tensor:
        if layer is None:
            return self.parameters[key].detach()
        name = f"decoder.layers.{layer}.{self.names[key]}"
        if ".mlp.experts." not in name:
            return self._field(name)
        before, _, after = name.partition(".experts.")
        return torch.stack(
            [self._field(f"{before}.experts.local_experts.{expert}.{after}") for expert in range(self.num_experts)]
        )

    def _field(self, name: str) -> torch.Tensor:
        linear = self.layers.get(name.removesuffix(".weight"))
        return self.parameters[name].detach() if linear is None else self.of(linear)


def _rounded(linear: QuantModule) -> torch.Tensor:
    return linear.weight_quantizer(linear.weight.detach())


def _codes(linear: QuantModule) -> torch.Tensor:
    """What a server reads: `[rows, columns]`, or two codes in a byte.

    Of the rounded weight, which divided by its scale is a code but for rounding of that division. Codes of the weight
    itself could differ from what the model multiplies with, where it lies halfway between two of them.
    """
    from modelopt.torch.export import quant_utils

    group_size = quant_utils.get_weight_block_size(linear)
    return quant_utils.to_quantized_weight(
        linear.weight.detach() if group_size else _rounded(linear).float(),
        quant_utils.get_weight_scaling_factor(linear),
        quant_utils.get_quantization_format(linear),
        quant_utils.get_weight_scaling_factor_2(linear),
        group_size,
    )


def _weight_scale(linear: QuantModule) -> torch.Tensor:
    """`[rows]` of one scale, `[rows, 1]` of a scale per row, which is what readers of channel-wise scales take."""
    from modelopt.torch.export import quant_utils

    scale = quant_utils.get_weight_scaling_factor(linear)
    return _by_row(linear, scale) if scale.numel() == 1 else scale.reshape(len(linear.weight), -1)


def _weight_scale_2(linear: QuantModule) -> torch.Tensor:
    from modelopt.torch.export import quant_utils

    return _by_row(linear, quant_utils.get_weight_scaling_factor_2(linear))


def _input_scale(linear: QuantModule) -> torch.Tensor:
    from modelopt.torch.export import quant_utils

    return _by_row(linear, quant_utils.get_activation_scaling_factor(linear))


def _by_row(linear: QuantModule, scale: torch.Tensor) -> torch.Tensor:
    """The number repeated `[rows]`, so that it is split with the rows of the weight."""
    return scale.float().reshape(()).expand(len(linear.weight))


FIELDS: dict[str, Callable[[QuantModule], torch.Tensor]] = {
    "weight": _codes,
    "weight_scale": _weight_scale,
    "weight_scale_2": _weight_scale_2,
    "input_scale": _input_scale,
    "rounded": _rounded,
}
"""What is to be had of a quantized layer, with the rows of its weight first."""


def _quantized_names(architecture: Qwen3Architecture) -> set[str]:
    return {
        f"model.layers.{index}.{name}"
        for index in range(architecture.num_hidden_layers)
        for key, layout in layer_table(architecture).values()
        if ".linear_" in key
        for name, shape in layout.shapes(architecture).items()
        if len(shape) == 2
    }


def _write_configuration(folder: Path, architecture: Qwen3Architecture, quantization: Quantization, dtype: str) -> None:
    form = FORMATS[quantization]
    kept = ["lm_head"]
    if architecture.mixture is not None:
        kept += [f"model.layers.{index}.mlp.gate" for index in range(architecture.num_hidden_layers)]
    details = {"quant_algo": form.algorithm, "kv_cache_quant_algo": None, "exclude_modules": kept}
    if form.group_size is not None:
        details["group_size"] = form.group_size
    producer = {"name": "modelopt", "version": importlib.metadata.version("nvidia-modelopt")}
    modelopts = {"producer": producer, "quantization": details}
    (folder / CONFIG_FILE).write_text(json.dumps(modelopts, indent=2) + "\n", encoding="utf-8")
    values = read_config_json(folder)
    values.pop("torch_dtype", None)
    values["dtype"] = dtype
    values["quantization_config"] = _compressed_tensors(kept) if quantization == "int8" else _modelopts(modelopts)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _modelopts(configuration: dict) -> dict:
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format

    return convert_hf_quant_config_format(configuration)


def _compressed_tensors(kept: list[str]) -> dict:
    """INT8 in the keys of compressed-tensors: `QUANT_ALGOS` of vLLM's modelopt.py has no INT8."""
    number = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
    group = {
        "targets": ["Linear"],
        "weights": number | {"strategy": "channel"},
        "input_activations": number | {"strategy": "tensor"},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": kept,
    }


def _check_read_back(folder: Path, model: PipelineModel, architecture: Qwen3Architecture) -> None:
    """The folder stands for the weights that the model multiplies with, to the rounding of its number format."""
    weights = SafetensorsReader(folder)
    if any(name.endswith("_scale_2") for name in weights.names):
        return
    unread = {name for name in weights.names if not name.endswith("_scale")}
    for name, weight in multiplied_tensors(model, architecture):
        tolerance = 2 * torch.finfo(weight.dtype).eps
        is_same = torch.allclose(_dequantized(weights, name), weight.float().cpu(), rtol=tolerance, atol=0)
        assert is_same, f"{name} reads back differently"
        unread.remove(name)
    assert not unread, f"the model has no {min(unread)}"
