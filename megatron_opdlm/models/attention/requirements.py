"""What kernels for GPUs ask of a case and of the installation: the rules that several backends share.

Nothing here imports a kernel or touches a GPU, so a backend can say that it does not serve a case before anything is
loaded.

Example:

    >>> gpu_refusal(AttentionCase(device_type="cuda", compute_capability=(7, 5), dtype=torch.float16, head_dim=128))
    'compute capability (7.5) must be at least 8.0'
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_opdlm.models.attention.backend import AttentionCase


def gpu_refusal(case: AttentionCase, max_head_dim: int = 256) -> str | None:
    """Why no half-precision flash kernel serves the case, as a clause; None if one may."""
    if reason := device_refusal(case):
        return reason
    if case.dtype not in (torch.bfloat16, torch.float16):
        return f"precision.dtype ({case.dtype}) must be bfloat16 or float16"
    if case.head_dim % 8 or case.head_dim > max_head_dim:
        return f"head_dim ({case.head_dim}) must be a multiple of 8 and at most {max_head_dim}"
    return None


def device_refusal(case: AttentionCase) -> str | None:
    """Why no kernel for GPUs serves the case, whatever its precision and head size."""
    if case.fp8:
        return "attention.fp8 (true) needs attention.backend te"
    if case.device_type != "cuda":
        return f"it needs a GPU, the model is on {case.device_type}"
    if (case.compute_capability or (0, 0)) < (8, 0):
        return f"compute capability ({as_version(case.compute_capability or (0, 0))}) must be at least 8.0"
    return None


def name_refusal(case: AttentionCase, kernels: Sequence[str]) -> str | None:
    """Why `attention.kernel` is none that the backend has."""
    if case.kernel not in ("auto", *kernels):
        return f"attention.kernel ({case.kernel}) must be one of auto, {', '.join(kernels)}"
    return None


def as_version(numbers: Sequence[int]) -> str:
    """(9, 0) as "9.0"."""
    return ".".join(map(str, numbers))


def is_installed(module_name: str) -> bool:
    """Whether there is a module of this dotted name, found without importing it or the packages above it.

    Importing a kernel's package would load its libraries, which can fail or take seconds.
    """
    if sys.modules.get(module_name) is not None:
        return True
    top, *parts = module_name.split(".")
    if top in sys.modules:
        roots = getattr(sys.modules[top], "__path__", ())
    else:
        spec = importlib.util.find_spec(top)
        if spec is None or not parts:
            return spec is not None
        roots = spec.submodule_search_locations or ()
    return bool(parts) and any(_is_module(Path(root, *parts)) for root in roots)


def _is_module(path: Path) -> bool:
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
