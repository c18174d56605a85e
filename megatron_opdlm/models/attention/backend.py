"""The interface of a block-diffusion attention backend, the table of backends, and the rule that chooses one.

A backend computes the pattern of `diffusion.attention_pattern` for a batch of sequences that come as two streams. It is
built once per model, for a case: the device, the number format, the head size. What it cannot do in that case it says
in one sentence, before anything is built.

Example:

    >>> backend = build_backend("auto", AttentionCase(device_type="cpu"))
    >>> streams = Streams(query_clean, key_clean, value_clean, query_noisy, key_noisy, value_noisy)
    >>> out_clean, out_noisy = backend.attend(streams, lengths=lengths_B, block_size=4, scale=head_dim**-0.5)

Legend: `B` sequences, `S` positions of one stream, `N` query heads, `G` key-value heads, `D` head dimension.
"""

from __future__ import annotations

import importlib
import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

logger = logging.getLogger(__name__)

BACKENDS = {
    "dense": "megatron_opdlm.models.attention.dense:DenseAttention",
    "aten": "megatron_opdlm.models.attention.aten:AtenAttention",
    "flash": "megatron_opdlm.models.attention.flash:FlashAttention",
    "te": "megatron_opdlm.models.attention.transformer_engine:TransformerEngineAttention",
    "flex": "megatron_opdlm.models.attention.flex:FlexAttention",
}
"""Name of `attention.backend` -> module and class. A module is imported when its backend is considered, and the package
behind it when it is built."""

AUTOMATIC = ("aten", "flash", "flex", "dense")
"""What `auto` tries, in this order, for attention that is not in FP8. On a Hopper `aten` runs cuDNN's kernel, the same
that `te` runs in bfloat16, so `te` is for FP8."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""Something of the clean stream, then of the noisy one."""


class Streams(NamedTuple):
    """Queries, keys and values of both streams; all start at position 0 of the block grid.

    Any strides with the last dimension dense. Query head `h` reads key-value head `h // (N // G)`.
    """

    query_clean: torch.Tensor
    """[B, S, N, D]"""
    key_clean: torch.Tensor
    """[B, S, G, D] with `N % G == 0`"""
    value_clean: torch.Tensor
    """[B, S, G, D]"""
    query_noisy: torch.Tensor
    key_noisy: torch.Tensor
    value_noisy: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """What decides whether a backend can serve a model here."""

    device_type: str
    """`cpu` or `cuda`."""
    compute_capability: tuple[int, int] | None = None
    """Of the GPU, e.g. (9, 0) for an H100; none on a CPU."""
    dtype: torch.dtype = torch.float32
    """Of queries, keys and values."""
    head_dim: int = 128
    kernel: str = "auto"
    """`attention.kernel`: which of the backend's kernels."""
    fp8: bool = False
    """`attention.fp8`: the attention products themselves in FP8."""
    fp8_recipe: str = "off"
    """`precision.fp8`: how the student's linear layers, and FP8 attention with them, choose their scales."""


class AttentionBackend(ABC):
    """A kernel for the student's attention over a clean and a noisy stream; differentiable once."""

    @classmethod
    @abstractmethod
    def refusal(cls, case: AttentionCase) -> str | None:
        """Why this backend cannot serve the case, as a clause ("head_dim (96) must be 128"); None if it can.

        It imports nothing heavy and needs no GPU.
        """

    @abstractmethod
    def __init__(self, case: AttentionCase) -> None:
        """Imports what the kernel needs. The case is one that `refusal` lets pass."""

    def for_layer(self, config: TransformerConfig, layer_number: int) -> AttentionBackend:
        """The backend of one layer (counted from 1). A backend that keeps state for each layer returns a module."""
        return self

    @abstractmethod
    def attend(self, streams: Streams, *, lengths: torch.Tensor, block_size: int, scale: float) -> Pair:
        """Attends within each sequence.

        Args:
            streams: see `Streams`.
            lengths: integer [B], real tokens of each sequence; what follows them is padding.
            block_size: positions per block; `S` need not be a multiple of it.
            scale: factor on the scores before the softmax.

        Returns:
            The clean and the noisy output, [B, S, N, D] each, in the input's dtype. At padded positions they are
            finite and otherwise unspecified: no gradient may be sent into them but zero.
        """


def build_backend(name: str, case: AttentionCase) -> AttentionBackend:
    """The backend called `name`: a key of `BACKENDS`, or `auto` for the first of `AUTOMATIC` that serves the case.

    Raises:
        ValueError: no such backend, or it cannot serve the case; the message says why.
    """
    if name == "auto":
        name = _choose(case)
        logger.info("attention.backend auto: %s on %s", name, case.device_type)
    if name not in BACKENDS:
        raise ValueError(f"attention.backend ({name}) must be one of auto, {', '.join(BACKENDS)}")
    backend = backend_class(name)
    if reason := backend.refusal(case):
        raise ValueError(f"attention.backend {name}: {reason}")
    return backend(case)


def _choose(case: AttentionCase) -> str:
    if case.fp8:
        return "te"  # never silently in another precision than asked for
    refusals = {name: backend_class(name).refusal(case) for name in AUTOMATIC}
    for name, reason in refusals.items():
        if reason is None:
            return name
        logger.info("attention.backend auto: not %s: %s", name, reason)
    raise ValueError("attention.backend auto: " + "; ".join(f"{name}: {reason}" for name, reason in refusals.items()))


def backend_class(name: str) -> type[AttentionBackend]:
    """The class of a key of `BACKENDS`."""
    module_name, class_name = BACKENDS[name].split(":")
    return getattr(importlib.import_module(module_name), class_name)
