"""Block-diffusion attention on Transformer Engine's fused cuDNN attention, in bfloat16 and in FP8.

Each layer holds a stock `transformer_engine.pytorch.DotProductAttention`, causal, with twice the query heads: the rows
of `decomposition`. It runs as Transformer Engine wants it, under the recipe of the surrounding autocast, with its own
quantizers, amax history, recompute bookkeeping and checkpoint state; only the result of its kernel is completed by the
window (`transformer_engine_splice`, `transformer_engine_nodes`). So FP8 block-diffusion attention has the number
formats, and the rounding, of causal FP8 attention. cuDNN takes any number of rows here, so none are added.

Example:

    >>> backend = TransformerEngineAttention(AttentionCase(device_type="cuda", ...)).for_layer(config, layer_number=1)
    >>> outs = backend.attend(streams, lengths=lengths_B, block_size=4, scale=config.kv_channels**-0.5)

Sources: `get_attention_backend` and `nvte_get_fused_attn_backend` of Transformer Engine 2.9 to 2.20 (what its fused
attention serves); https://docs.nvidia.com/deeplearning/transformer-engine/user-guide/api/pytorch.html. Checked against
the sources of these versions and a fake with their structure; not yet run on a GPU.
"""

from __future__ import annotations

import importlib.metadata
import math
import os

import torch
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from packaging.version import Version

from megatron_opdlm.models.attention.backend import AttentionBackend, AttentionCase, Pair, Streams
from megatron_opdlm.models.attention.decomposition import block_diffusion_attention, whole_blocks
from megatron_opdlm.models.attention.requirements import as_version
from megatron_opdlm.models.attention.transformer_engine_nodes import spliced_attention
from megatron_opdlm.models.attention.transformer_engine_splice import FusedAttentionSplice

FIRST_VERSION, LAST_VERSION = (2, 9), (2, 20)
"""Versions of Transformer Engine whose sources the splice is checked against."""

DPA_RECIPES = {"": None, "DelayedScaling": "delayed", "Float8CurrentScaling": "tensorwise"}
"""NVTE_DPA_FP8_RECIPE, by which Transformer Engine gives attention another recipe -> `precision.fp8` with its name."""


class TransformerEngineAttention(AttentionBackend):
    """The backend of a model; what attends are its layers."""

    @classmethod
    def refusal(cls, case: AttentionCase) -> str | None:
        """See `AttentionBackend.refusal`."""
        if case.device_type != "cuda":
            return f"device ({case.device_type}) must be cuda; attention.backend aten runs anywhere"
        if reason := _package_refusal():
            return reason
        if case.compute_capability < (8, 0):
            return f"compute capability ({as_version(case.compute_capability)}) must be 8.0 or higher"
        if case.kernel != "auto":
            return f"attention.kernel ({case.kernel}) must be auto: it has one kernel"
        if case.dtype is not torch.bfloat16:
            return f"precision.dtype ({str(case.dtype).removeprefix('torch.')}) must be bfloat16"
        return _fp8_refusal(case) if case.fp8 else _head_dim_refusal(case)

    def __init__(self, case: AttentionCase) -> None:
        """Imports Transformer Engine.

        Raises:
            ValueError: its cuDNN cannot serve the case.
        """
        from transformer_engine.pytorch import DotProductAttention
        from transformer_engine.pytorch.utils import get_cudnn_version

        if reason := cudnn_refusal(case, get_cudnn_version()):
            raise ValueError(f"attention.backend te: {reason}")
        self.case = case
        self.module_class = DotProductAttention
        self.splice = FusedAttentionSplice()

    def for_layer(self, config: TransformerConfig, layer_number: int) -> TransformerEngineLayerAttention:
        """A module with Transformer Engine's state of this layer.

        Raises:
            ValueError: settings of the model that rule its fused attention out.
        """
        if reason := config_refusal(config, self.case):
            raise ValueError(f"attention.backend te: {reason}")
        scale = config.kv_channels**-0.5 if config.softmax_scale is None else config.softmax_scale
        attention = self.module_class(
            num_attention_heads=2 * config.num_attention_heads // config.context_parallel_size,
            kv_channels=config.kv_channels,
            num_gqa_groups=config.num_query_groups // config.context_parallel_size,
            attention_dropout=0.0,
            qkv_format="sbhd",
            attn_mask_type="causal",
            sequence_parallel=config.sequence_parallel,
            tp_size=config.tensor_model_parallel_size,
            tp_group=parallel_state.get_tensor_model_parallel_group(check_initialized=False),
            layer_number=layer_number,
            softmax_scale=scale,
        )
        return TransformerEngineLayerAttention(attention, self.splice, scale)

    def attend(self, streams: Streams, *, lengths: torch.Tensor, block_size: int, scale: float) -> Pair:
        """Layers attend; see `for_layer`."""
        raise AssertionError("the backend of a layer attends: for_layer builds it")


class TransformerEngineLayerAttention(torch.nn.Module, AttentionBackend):
    """The backend of one layer."""

    refusal = TransformerEngineAttention.refusal

    def __init__(self, attention: torch.nn.Module, splice: FusedAttentionSplice, scale: float) -> None:
        """`attention` is a causal `DotProductAttention` with twice the query heads and this scale."""
        super().__init__()
        self.attention = attention
        self.splice = splice
        self.scale = scale

    def attend(self, streams: Streams, *, lengths: torch.Tensor, block_size: int, scale: float) -> Pair:
        """See `AttentionBackend.attend`. Memory grows with `S`, not with its square."""
        assert math.isclose(scale, self.scale), "Transformer Engine's module is built for one scale"
        length = streams.query_clean.shape[1]
        if length <= block_size:  # the window is everything, and the kernel not called
            return block_diffusion_attention(streams, lengths, block_size, scale, kernel=None)
        whole = whole_blocks(streams, block_size)
        out_clean, out_noisy = spliced_attention(self.splice, self.attention, whole, lengths, block_size, scale)
        return out_clean[:, :length], out_noisy[:, :length]


def _package_refusal() -> str | None:
    supported = f"{as_version(FIRST_VERSION)} to {as_version(LAST_VERSION)}"
    try:
        version = importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return (
            f"it needs the package transformer-engine, version {supported}: "
            "pip install --no-build-isolation 'transformer-engine[pytorch]'"
        )
    if not FIRST_VERSION <= Version(version).release[:2] <= LAST_VERSION:
        return f"transformer-engine ({version}) must be a version from {supported}, whose insides it knows"
    return None


def _head_dim_refusal(case: AttentionCase) -> str | None:
    largest = 256 if case.compute_capability == (9, 0) else 128
    if case.head_dim % 8 or case.head_dim > largest:
        return f"head_dim ({case.head_dim}) must be a multiple of 8 and at most {largest} on this GPU"
    return None


def _fp8_refusal(case: AttentionCase) -> str | None:
    """Transformer Engine's rules for training with FP8 attention; Hopper's are stricter than Blackwell's."""
    is_hopper = case.compute_capability < (10, 0)
    if not (9, 0) <= case.compute_capability < (12, 0):
        return f"compute capability ({as_version(case.compute_capability)}) must be 9.0 or 10.x for attention.fp8"
    override = os.environ.get("NVTE_DPA_FP8_RECIPE", "")
    if override not in DPA_RECIPES:
        return f"NVTE_DPA_FP8_RECIPE ({override}) must be one of {', '.join(filter(None, DPA_RECIPES))}, or unset"
    if case.fp8_recipe not in ("delayed", "tensorwise"):
        return f"precision.fp8 ({case.fp8_recipe}) must be delayed or tensorwise: attention.fp8 shares its recipe"
    if is_hopper and _attention_recipe(case) != "delayed":
        return (
            "precision.fp8 (tensorwise) must be delayed for attention.fp8 on compute capability 9.0, "
            "or NVTE_DPA_FP8_RECIPE=DelayedScaling set for the attention alone"
        )
    if is_hopper and case.head_dim != 128:
        return f"head_dim ({case.head_dim}) must be 128 for attention.fp8 on compute capability 9.0"
    if case.head_dim % 16 or case.head_dim > 128:
        return f"head_dim ({case.head_dim}) must be a multiple of 16 and at most 128 for attention.fp8"
    return None


def _attention_recipe(case: AttentionCase) -> str:
    return DPA_RECIPES[os.environ.get("NVTE_DPA_FP8_RECIPE", "")] or case.fp8_recipe


def cudnn_refusal(case: AttentionCase, version: tuple[int, int, int]) -> str | None:
    """Why this version of cuDNN cannot serve the case, as a clause; None if it can."""
    is_blackwell = case.compute_capability >= (10, 0)
    first = (9, 7, 0) if case.fp8 or is_blackwell else (9, 0, 0)
    if is_blackwell and case.fp8 and _attention_recipe(case) == "tensorwise":
        first = (9, 14, 0)
    if version < first or version in ((9, 10, 0), (9, 10, 1)):
        return f"cuDNN ({as_version(version)}) must be {as_version(first)} or newer, and neither 9.10.0 nor 9.10.1"
    return None


def config_refusal(config: TransformerConfig, case: AttentionCase) -> str | None:
    """Which setting of the model rules Transformer Engine's fused attention out, as a clause; None if none does."""
    # Megatron sets the variable from `attention_backend` before it builds the layers.
    if os.environ.get("NVTE_FUSED_ATTN", "1") == "0":
        return (
            "NVTE_FUSED_ATTN (0) must be 1 or unset, and attention_backend in student.transformer and "
            "teacher.transformer auto or fused"
        )
    if case.fp8 and config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules:
        return (
            "training.recompute (selective), or recompute_modules (core_attn) in student.transformer, must not be "
            "combined with attention.fp8: Megatron recomputes it outside the FP8 context; training.recompute full is "
            "possible, and fused attention needs none"
        )
    return None
