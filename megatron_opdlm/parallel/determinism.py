"""`training.deterministic`: the same run again is the same run, bit for bit.

    if config.training.deterministic:
        make_deterministic()                    # before the first kernel runs

On CPUs a run is repeatable anyway, on the same layout and number of threads; there this only keeps it so. On GPUs what
is left open are the orders in which kernels and NCCL add up. Each is pinned by a switch of the library's own, unless
the environment has set it already. Where PyTorch has no deterministic kernel it raises a RuntimeError that names the
operation, rather than going on. Backward passes of attention and the products of short matrices become slower. Random
numbers need nothing: they come from generators of their own (`diffusion.randomness`).

Two GPUs of different kinds, another layout, other versions of libraries: all may round differently. Not yet run on a
GPU.
"""

from __future__ import annotations

import os

import torch

ENVIRONMENT = {
    # cuBLAS keeps its partial sums in buffers of a fixed size (docs.nvidia.com/cuda/cublas, "Results reproducibility")
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # Transformer Engine: no attention backward pass that adds up by atomic operations
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    # NCCL: no sums in the switch, whose order is not fixed
    "NCCL_ALGO": "^NVLS",
}
"""Read by the libraries when they are first used."""


def make_deterministic() -> None:
    """Pins what libraries would leave open, in this process, for good.

    Megatron-Core, the back ends of attention and the modules of `models` ask PyTorch for this state where they choose
    between kernels.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
