"""Block-diffusion attention with the flash kernels that PyTorch ships, on CPU and on CUDA: needs no other package.

The kernels are private operators (`torch.ops.aten`) since the public `scaled_dot_product_attention` neither returns
the log-sum-exp nor takes another output in its backward, and the decomposition needs both. Both read grouped keys and
values as they are, without repeating them for each query head.

Example:

    >>> backend = AtenAttention("cpu")
    >>> out_clean, out_noisy = backend.attend(*streams, lengths=lengths_B, block_size=4, scale=0.125)
"""

from __future__ import annotations

import torch

from megatron_opdlm.models.attention.backend import AttentionBackend, AttentionCase, Pair, Streams
from megatron_opdlm.models.attention.decomposition import block_diffusion_attention


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


class CudaFlash:
    """PyTorch's CUDA flash kernel (FlashAttention-2; 3 or 4 after `activate_flash_attention_impl`), compute 8.0 and up.

    bfloat16 and float16, head dimensions that are multiples of 8. Its causal mask aligns to the bottom right, which is
    the same thing here, where queries and keys are equally many. Its log-sum-exp is float32.
    """

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `CausalKernel.forward`.

        Raises:
            ValueError: a precision that the kernel does not have.
        """
        if query.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"precision.dtype ({query.dtype}) must be bfloat16 or float16 for attention.backend aten on CUDA; "
                "attention.backend dense takes others"
            )
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
        length = query.shape[1]
        # Only dropout reads the random state, which the operator wants all the same.
        random_state = torch.empty(2, dtype=torch.uint64, device=query.device)
        unused = torch.empty((), dtype=torch.uint64, device=query.device)
        return torch.ops.aten._flash_attention_backward(
            grad_out,
            query,
            key,
            value,
            out,
            lse,
            None,
            None,
            length,
            length,
            0.0,
            True,
            random_state,
            unused,
            scale=scale,
        )


class AtenAttention(AttentionBackend):
    """The causal decomposition over the kernel of one device type. Memory grows with `S`, not with its square."""

    @classmethod
    def refusal(cls, case: AttentionCase) -> str | None:
        """See `AttentionBackend.refusal`."""
        if case.fp8:
            return "attention.fp8 (true) needs attention.backend te"
        return None

    def __init__(self, case: AttentionCase) -> None:
        self.kernel = {"cpu": CpuFlash, "cuda": CudaFlash}[case.device_type]()

    def attend(self, streams: Streams, *, lengths: torch.Tensor, block_size: int, scale: float) -> Pair:
        """See `AttentionBackend.attend`."""
        return block_diffusion_attention(streams, lengths, block_size, scale, self.kernel)
