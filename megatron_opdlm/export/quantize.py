"""Post-training quantisation of a Megatron model by nvidia-modelopt (https://github.com/NVIDIA/Model-Optimizer).

    modelopt = require_modelopt()                              # ValueError with what to install
    check_quantization("fp8", config)
    quantize(model, "fp8", lambda: run_over(model, states))    # in place: from here on it multiplies what it exports

The linear layers of attention and MLP get a quantizer for their input and one for their weight, which round to the
numbers that the format can hold and go on in the model's own number format ("fake quantisation"), so this runs on a
CPU. Embedding, output layer, norms and routers stay as they are, as in modelopt's presets. The largest inputs that
calibration meets set the scales of inputs, once for all.

modelopt puts its quantizers into the forward of Megatron's own parallel layers (modelopt/torch/quantization/plugins/
megatron.py, `_MegatronParallelLinear`), and knows classes by identity of their forward. Ours go past it, so they are
made Megatron's again first (`models.linear`); rollout and training then run quantized, since both run these modules.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import torch

from megatron_opdlm.config.schema import Config, ParallelConfig
from megatron_opdlm.models.linear import without_direct_products
from megatron_opdlm.models.pipeline import PipelineModel

if TYPE_CHECKING:
    from modelopt.torch.quantization.nn import QuantModule

Quantization = Literal["fp8", "int8", "nvfp4"]


@dataclass(frozen=True)
class Format:
    """How modelopt calls a quantisation, and what of it lies in a folder."""

    preset: str
    """In `modelopt.torch.quantization`."""
    algorithm: str
    """`quant_algo` in `hf_quant_config.json`."""
    scales: tuple[str, ...]
    """The tensors beside a weight."""
    group_size: int | None = None
    """Weights of a row that share a scale; None for all of them."""
    needs_gpu: bool = False


FORMATS: dict[Quantization, Format] = {
    # E4M3, one scale for each weight matrix and one for its inputs
    "fp8": Format("FP8_DEFAULT_CFG", "FP8", ("weight_scale", "input_scale")),
    # one scale for each row of a weight matrix and one for its inputs
    "int8": Format("INT8_DEFAULT_CFG", "W8A8_SQ_PER_CHANNEL", ("weight_scale", "input_scale")),
    # E2M1, an E4M3 scale for every 16 numbers and one for all of those; modelopt rounds to it on GPUs alone
    # (`_dynamic_block_quantize_impl` in modelopt/torch/quantization/tensor_quant.py)
    "nvfp4": Format(
        "NVFP4_DEFAULT_CFG", "NVFP4", ("weight_scale", "weight_scale_2", "input_scale"), group_size=16, needs_gpu=True
    ),
}


def require_modelopt() -> ModuleType:
    """`modelopt.torch.quantization`. ValueError if nvidia-modelopt is not installed."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of a transformers newer than itself, which is not used here
            return importlib.import_module("modelopt.torch.quantization")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "modelopt":
            raise
        raise ValueError(
            'quantisation needs nvidia-modelopt, which is not installed; try pip install "megatron-opdlm[modelopt]"'
        ) from error


def check_quantization(quantization: Quantization, config: Config) -> None:
    """ValueError if this machine or layout cannot have the quantisation. Touches no weights."""
    if FORMATS[quantization].needs_gpu and not torch.cuda.is_available():
        raise ValueError(f"--format ({quantization}) needs a GPU, and this machine has none; take fp8 or int8")
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
    ):
        if (size := getattr(config.parallel, name)) != getattr(ParallelConfig(), name):
            raise ValueError(f"parallel.{name} ({size}) must be 1 for quantisation: each rank has the whole model")
    role = config.evaluation.role
    layers = getattr(config, role).transformer.get("transformer_impl", "local")
    if layers != "local":
        raise ValueError(f"{role}.transformer.transformer_impl ({layers}) must be local for quantisation")


def quantize(model: PipelineModel, quantization: Quantization, calibrate: Callable[[], None]) -> None:
    """Puts calibrated quantizers into the model, in place. All data-parallel ranks must call it and get the same.

    `calibrate` runs the model over what it is to be good at, each rank over its own part: modelopt takes the largest
    inputs of all ranks.
    """
    modelopt = require_modelopt()
    without_direct_products(model.modules())
    preset = getattr(modelopt, FORMATS[quantization].preset)
    # modelopt prints how many quantizers there are, and warns of checkpoints of quantized models, which nobody writes,
    # and of groups that the MLP as such lacks; its linear layers have theirs.
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings(action="ignore"):
        modelopt.quantize(torch.nn.ModuleList(model.chunks), preset, lambda _: calibrate())
    bare = [name for name, layer in linear_layers(model) if not is_quantized(layer)]
    assert not bare, f"nvidia-modelopt left {bare[0]} as it was"


def linear_layers(model: PipelineModel) -> Iterator[tuple[str, QuantModule]]:
    """The linear layers of attention and MLP with their names in the whole model."""
    for name, module in model.named_modules():
        if name.startswith("decoder.layers.") and name.rpartition(".")[2].startswith("linear_"):
            yield name, module


def is_quantized(layer: torch.nn.Module) -> bool:
    """Whether a linear layer rounds its inputs and its weight, by scales that it has."""
    return all(
        (quantizer := getattr(layer, name, None)) is not None and quantizer.is_enabled and quantizer.amax is not None
        for name in ("input_quantizer", "weight_quantizer")
    )
