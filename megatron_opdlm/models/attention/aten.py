"""Block-diffusion attention with the flash kernels that PyTorch ships, on CPU and on CUDA: needs no other package.

The kernels are private operators (`torch.ops.aten`) since the public `scaled_dot_product_attention` neither returns
the log-sum-exp nor takes another output in its backward, and the decomposition needs both. They read grouped keys and
values as they are, without repeating them for each query head. Those for GPUs are in `aten_cuda`.

Example:

    >>> backend = AtenAttention(AttentionCase(device_type="cpu"))
    >>> out_clean, out_noisy = backend.attend(streams, lengths=lengths_B, block_size=4, scale=0.125)
"""

from __future__ import annotations

import torch

from megatron_opdlm.models.attention import aten_cuda
from megatron_opdlm.models.attention.backend import AttentionBackend, AttentionCase, Pair, Streams
from megatron_opdlm.models.attention.decomposition import block_diffusion_attention


class AtenAttention(AttentionBackend):
    """The causal decomposition over one of PyTorch's own kernels."""

    @classmethod
    def refusal(cls, case: AttentionCase) -> str | None:
        """See `AttentionBackend.refusal`."""
        if case.device_type != "cpu":
            return aten_cuda.refusal(case)
        if case.fp8:
            return "attention.fp8 (true) needs attention.backend te"
        if case.kernel != "auto":
            return f"attention.kernel ({case.kernel}) must be auto on a CPU: there is one kernel"
        return None

    def __init__(self, case: AttentionCase) -> None:
        """See `AttentionBackend.__init__`."""
        self.kernel = CpuFlash() if case.device_type == "cpu" else aten_cuda.build_kernel(case)

    def attend(self, streams: Streams, *, lengths: torch.Tensor, block_size: int, scale: float) -> Pair:
        """See `AttentionBackend.attend`. Memory grows with `S`, not with its square."""
        return block_diffusion_attention(streams, lengths, block_size, scale, self.kernel)


class CpuFlash:
    """PyTorch's CPU flash kernel: float32, float64, bfloat16 and float16. It keeps heads before positions."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `CausalKernel.forward`."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p=0.0, is_causal=True, scale=scale
        )
        return out.transpose(1, 2), lse

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
        grad_out, query, key, value, out = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, query, key, value, out, lse, dropout_p=0.0, is_causal=True, scale=scale
        )
        return tuple(x.transpose(1, 2) for x in grads)
