"""Block-diffusion attention on a GPU: PyTorch's CUDA flash kernel against the float64 oracle, forward and backward."""

from __future__ import annotations

import pytest
import torch

from megatron_opdlm.models.attention.backend import build_backend

pytestmark = pytest.mark.gpu
B, S, N, G, D, K = 2, 150, 8, 2, 128, 4


def attend(backend_name: str, inputs: list[torch.Tensor], lengths: torch.Tensor, upstream: list[torch.Tensor]):
    """Both outputs and the six gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    backend = build_backend(backend_name, inputs[0].device.type)
    outputs = backend.attend(*leaves, lengths=lengths, block_size=K, scale=D**-0.5)
    gradients = torch.autograd.grad(outputs, leaves, [g.to(leaves[0].dtype) for g in upstream])
    return [*outputs, *gradients]


def relative_error(measured: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square of the difference over that of the exact values."""
    return float((measured.double() - exact).norm() / exact.norm())


def test_aten_in_bfloat16_on_cuda_matches_the_float64_oracle():
    torch.manual_seed(0)
    inputs = [torch.randn(B, S, heads, D, device="cuda") for heads in (N, G, G, N, G, G)]
    lengths = torch.tensor([S, S - 29], device="cuda")
    is_real = (torch.arange(S, device="cuda") < lengths[:, None])[..., None, None]
    upstream = [torch.randn(B, S, N, D, device="cuda") * is_real for _ in range(2)]
    half = [tensor.bfloat16() for tensor in inputs]
    exact = attend("dense", [tensor.double() for tensor in half], lengths, [g.bfloat16() for g in upstream])
    measured = attend("aten", half, lengths, upstream)
    for name, ours, oracle, bound in zip(
        ("clean", "noisy", *(f"gradient {i}" for i in range(6))), measured, exact, [6e-3] * 2 + [1e-2] * 6, strict=True
    ):
        if name in ("clean", "noisy"):
            ours, oracle = ours * is_real, oracle * is_real
        assert relative_error(ours, oracle) <= bound, name
