"""PyTorch's own causal attention kernels for GPUs: FlashAttention-2, FlashAttention-3 and -4 if installed, and cuDNN.

All are private operators; only those arguments and results are used that PyTorch 2.7 to 2.13 have in common. Queries
and keys are equally many, so a causal mask aligned to the top left (cuDNN) and one aligned to the bottom right
(FlashAttention) are the same mask. Without dropout no kernel reads the random state that a backward operator asks for.
Not yet run on a GPU.

`auto` takes cuDNN where PyTorch's own attention prefers it (compute capability 9.x and 10.x, cuDNN above 9.15.0), and
FlashAttention-2 otherwise. cuDNN builds a plan for each shape it meets, so lengths padded to a coarse
`training.pad_to_multiple` serve it well.

Example:

    >>> kernel = build_kernel(AttentionCase(device_type="cuda", compute_capability=(9, 0), dtype=torch.bfloat16))
    >>> out, lse = kernel.forward(query, key, value, scale=0.125)

Legend: `B` sequences, `S` positions, `N` query heads, `G` key-value heads, `D` head dimension.
"""

from __future__ import annotations

import logging
import os

import torch
import torch.nn.attention

from megatron_opdlm.models.attention.backend import AttentionCase
from megatron_opdlm.models.attention.decomposition import CausalKernel
from megatron_opdlm.models.attention.requirements import as_version, gpu_refusal, is_installed, name_refusal

logger = logging.getLogger(__name__)

KERNELS = ("fa2", "fa3", "fa4", "cudnn")
"""Values of `attention.kernel` besides `auto`."""

FLASH_GENERATIONS = {"fa3": ("FA3", "flash_attn_interface", (9,)), "fa4": ("FA4", "flash_attn.cute.interface", (9, 10))}
"""PyTorch's name of a FlashAttention that it can switch to, the module it takes it from, and the major compute
capabilities that it accepts."""

CUDNN_ONE_PLAN = "TORCH_CUDNN_SDPA_AVOID_RECOMPILE"
"""Environment variable that makes PyTorch use one cuDNN plan for several lengths, with another layout of the lse."""


def refusal(case: AttentionCase) -> str | None:
    """Why no kernel here serves the case, or not the one that `attention.kernel` names; None if one does."""
    if reason := gpu_refusal(case) or name_refusal(case, KERNELS):
        return reason
    if case.kernel in FLASH_GENERATIONS:
        return _generation_refusal(case)
    return _cudnn_refusal(case) if case.kernel == "cudnn" else None


def _generation_refusal(case: AttentionCase) -> str | None:
    _, module_name, majors = FLASH_GENERATIONS[case.kernel]
    if case.compute_capability[0] not in majors:
        capabilities = " or ".join(f"{major}.x" for major in majors)
        found = as_version(case.compute_capability)
        return f"attention.kernel ({case.kernel}) needs compute capability {capabilities}, the GPU has {found}"
    if case.kernel == "fa4" and case.head_dim > 128:
        return f"head_dim ({case.head_dim}) must be at most 128 for attention.kernel fa4"
    if not hasattr(torch.nn.attention, "restore_flash_attention_impl"):
        return f"attention.kernel ({case.kernel}) needs a PyTorch that can switch its flash attention, such as 2.13"
    if not is_installed(module_name):
        return f"attention.kernel ({case.kernel}) needs the module {module_name} of the flash-attention project"
    return None


def _cudnn_refusal(case: AttentionCase) -> str | None:
    # PyTorch prefers it from there on only: older ones err at lengths that are no multiple of 128 (`sdp_utils.cpp`,
    # https://github.com/pytorch/pytorch/issues/169849).
    version = torch.backends.cudnn.version()
    if version is not None and version <= 91500:
        return f"cuDNN ({version}) must be newer than 9.15.0 (91500) for attention.kernel cudnn"
    if torch.are_deterministic_algorithms_enabled():
        return "attention.kernel cudnn is not deterministic, as torch.use_deterministic_algorithms asks"
    # Larger heads need cuDNN above 9.22 with exactly 256, in PyTorch versions that allow them (`sdp_utils.cpp`).
    if case.head_dim > 128:
        return f"head_dim ({case.head_dim}) must be at most 128 for attention.kernel cudnn"
    if os.environ.get(CUDNN_ONE_PLAN, "0") != "0":
        return f"the environment variable {CUDNN_ONE_PLAN} must be unset for attention.kernel cudnn"
    return None


def choose_kernel(case: AttentionCase) -> str:
    """The name of the kernel for a case: the one asked for, or the one that `auto` takes."""
    if case.kernel != "auto":
        return case.kernel
    is_preferred = case.compute_capability[0] in (9, 10)
    return "cudnn" if is_preferred and _cudnn_refusal(case) is None else "fa2"


def build_kernel(case: AttentionCase) -> CausalKernel:
    """The kernel for a case that `refusal` lets pass.

    Raises:
        ValueError: FlashAttention-3 or -4 is installed but PyTorch cannot switch to it.
    """
    name = choose_kernel(case)
    if case.kernel == "auto":
        logger.info("attention.kernel auto: %s", name)
    if name == "cudnn":
        return CudnnAttention()
    if name == "fa2":
        return FlashAttention(None)
    generation = FLASH_GENERATIONS[name][0]
    try:
        switch_flash_attention(generation)
    except (ImportError, RuntimeError) as error:  # the module does not load, or has other functions than expected
        raise ValueError(f"attention.kernel ({name}): PyTorch cannot switch to it: {error}") from error
    return FlashAttention(generation)


def switch_flash_attention(generation: str | None) -> None:
    """Makes PyTorch's flash operators those of one FlashAttention: `FA3`, `FA4`, or None for its own, version 2.

    The switch is one for the whole process and moves `scaled_dot_product_attention` too.
    """
    if not hasattr(torch.nn.attention, "restore_flash_attention_impl"):
        assert generation is None, "refused before: this PyTorch has its own flash attention only"
    elif torch.nn.attention.current_flash_attention_impl() == generation:
        return
    elif generation is None:
        torch.nn.attention.restore_flash_attention_impl()
    else:
        torch.nn.attention.activate_flash_attention_impl(generation)


class FlashAttention:
    """PyTorch's flash operators, `[B, S, heads, D]` as they come."""

    def __init__(self, generation: str | None) -> None:
        """`generation`: see `switch_flash_attention`."""
        self.generation = generation

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `CausalKernel.forward`."""
        switch_flash_attention(self.generation)  # another kernel of this process may have moved it
        length = query.shape[1]
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, None, None, length, length, 0.0, True, False, scale=scale
        )
        return out, lse

    def backward(
        self,
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `CausalKernel.backward`."""
        switch_flash_attention(self.generation)
        length = query.shape[1]
        random_state = torch.empty(2, dtype=torch.uint64, device=query.device)
        unused = torch.empty((), dtype=torch.uint64, device=query.device)
        inputs = (grad_out, query, key, value, out, lse, None, None, length, length, 0.0, True, random_state, unused)
        return torch.ops.aten._flash_attention_backward(*inputs, scale=scale)


class CudnnAttention:
    """cuDNN's fused attention. It keeps heads before positions, of any strides."""

    def __init__(self) -> None:
        self._lse_dims = 4
        """Of the operator's log-sum-exp, which its backward wants again: [B, N, S, 1], before PyTorch 2.9 [B, N, S]."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `CausalKernel.forward`."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, True, False, scale=scale
        )
        self._lse_dims = lse.dim()
        return out.transpose(1, 2), lse.reshape(query.shape[:3])

    def backward(
        self,
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `CausalKernel.backward`.

        PyTorch keeps one plan for all calls whose queries, keys and values have the same strides; older versions look
        at no others, so the output and its gradient must always come in one layout.
        """
        grad_out, out = (x.contiguous() for x in (grad_out, out))
        grad_out, query, key, value, out = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
        lse = lse.contiguous()[(...,) + (None,) * (self._lse_dims - 3)]
        seed, offset = (torch.empty((), dtype=torch.int64, device=query.device) for _ in range(2))
        length = query.shape[2]
        inputs = (grad_out, query, key, value, out, lse, seed, offset, None, None, None, length, length, 0.0, True)
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(*inputs, scale=scale)
        return tuple(x.transpose(1, 2) for x in grads)
