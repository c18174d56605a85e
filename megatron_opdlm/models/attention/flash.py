"""Block-diffusion attention with the flash-attention package: version 3 on Hopper GPUs if installed, else version 2.

The package's public functions take no other output and log-sum-exp in their backward, so its private ones are called,
whose parameters differ from version to version. Each is read from its signature once, when the backend is built: what
it must have is there or the version is refused; what else it asks for gets the value that switches the feature off.
Read for this: flash-attn 2.7.0 to 2.8.4, flash-attn 3 from January 2025 to March 2026. Not yet run on a GPU.

Example:

    >>> backend = FlashAttention(AttentionCase(device_type="cuda", compute_capability=(9, 0), dtype=torch.bfloat16))
    >>> out_clean, out_noisy = backend.attend(streams, lengths=lengths_B, block_size=4, scale=0.125)
"""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
from collections.abc import Callable
from types import ModuleType

import torch

from megatron_opdlm.models.attention.backend import AttentionBackend, AttentionCase, Pair, Streams
from megatron_opdlm.models.attention.decomposition import block_diffusion_attention
from megatron_opdlm.models.attention.requirements import as_version, gpu_refusal, is_installed, name_refusal

logger = logging.getLogger(__name__)

MODULES = {
    "fa3": ("flash_attn_interface", "flash_attn_3.flash_attn_interface"),
    "fa2": ("flash_attn.flash_attn_interface",),
}
"""Value of `attention.kernel` -> the modules that hold the private functions, depending on how they were installed."""

FORWARD = {
    # From this parameter on, version 3 returns the output, then the log-sum-exp.
    "fa3": {"num_splits": 1},
    # From these on, version 2 does: 2.6 has one `window_size` and returns the queries second.
    "fa2": {"window_size_left": -1, "window_size_right": -1},
}
"""What the forward function must be able to take besides queries, keys, values, scale and the causal flag."""

OFF = {
    **dict.fromkeys(("dropout_p", "softcap"), 0.0),
    **dict.fromkeys(("window_size_left", "window_size_right"), -1),
    "return_softmax": False,
    **dict.fromkeys(("alibi_slopes", "k_new", "v_new", "qv", "out", "page_table", "kv_batch_idx", "leftpad_k")),
    **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_new", "seqused_q", "seqused_k")),
    **dict.fromkeys(("sequed_q", "sequed_k", "max_seqlen_q", "max_seqlen_k")),
    **dict.fromkeys(("rotary_cos", "rotary_sin", "seqlens_rotary", "q_descale", "k_descale", "v_descale")),
}
"""Parameters that some version requires, with the value that does without what they are for."""

KNOWN = "known are flash-attn 2.7 and 2.8, and flash-attn 3 from 2025 on"


class FlashAttention(AttentionBackend):
    """The causal decomposition over the kernels of the flash-attention package."""

    @classmethod
    def refusal(cls, case: AttentionCase) -> str | None:
        """See `AttentionBackend.refusal`."""
        if reason := gpu_refusal(case) or name_refusal(case, MODULES):
            return reason
        is_hopper = case.compute_capability[0] == 9
        if case.kernel == "fa3" and not is_hopper:
            found = as_version(case.compute_capability)
            return f"attention.kernel (fa3) needs compute capability 9.x, the GPU has {found}"
        if installed_module(case) is None:
            wanted = "flash-attn 2.7 or newer" if case.kernel == "fa2" or not is_hopper else "flash-attn 3"
            wanted += ", or 2.7 or newer" if case.kernel == "auto" and is_hopper else ""
            return f"the package is not installed: attention.kernel ({case.kernel}) needs {wanted}"
        return None

    def __init__(self, case: AttentionCase) -> None:
        """Imports the package.

        Raises:
            ValueError: it cannot be imported, or its functions are not those of a version that is understood.
        """
        generation, module_name = installed_module(case)
        if case.kernel == "auto":
            logger.info("attention.kernel auto: %s", generation)
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:  # built for another PyTorch or CUDA
            raise ValueError(f"attention.backend flash: {module_name} cannot be imported: {error}") from error
        self.kernel = FlashKernel(module, generation)

    def attend(self, streams: Streams, *, lengths: torch.Tensor, block_size: int, scale: float) -> Pair:
        """See `AttentionBackend.attend`. Memory grows with `S`, not with its square."""
        return block_diffusion_attention(streams, lengths, block_size, scale, self.kernel)


def installed_module(case: AttentionCase) -> tuple[str, str] | None:
    """The generation to use, `fa3` or `fa2`, and its module; None if nothing that fits the case is installed."""
    generations = [case.kernel] if case.kernel != "auto" else ["fa3", "fa2"]
    if case.compute_capability[0] != 9:
        generations = ["fa2"]
    names = ((generation, name) for generation in generations for name in MODULES[generation])
    return next((found for found in names if is_installed(found[1])), None)


class FlashKernel:
    """A causal kernel (`CausalKernel`) from the private functions of one version of the package."""

    def __init__(self, module: ModuleType, generation: str) -> None:
        """`generation`: `fa2` or `fa3`.

        Raises:
            ValueError: the functions cannot be called as needed.
        """
        source = f"{module.__name__} {_version(module)}"
        inputs = ("q", "k", "v", "softmax_scale")
        grads = ("dout", "out", "softmax_lse", "dq", "dk", "dv", "deterministic")
        self._settings = FORWARD[generation]
        self._forward = PrivateFunction(module, "_flash_attn_forward", (*inputs, *self._settings), source)
        self._backward = PrivateFunction(module, "_flash_attn_backward", (*inputs, *grads), source)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `CausalKernel.forward`."""
        out, lse, *_ = self._forward(q=query, k=key, v=value, softmax_scale=scale, **self._settings)
        batch_size, length, num_heads, _ = query.shape
        assert lse.shape == (batch_size, num_heads, length), f"log-sum-exp of shape {tuple(lse.shape)}"
        return out, lse.contiguous()

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
        """See `CausalKernel.backward`. The function writes the gradients, whatever it returns."""
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
        self._backward(
            dout=grad_out,
            q=query,
            k=key,
            v=value,
            out=out,
            softmax_lse=lse.contiguous(),
            dq=dq,
            dk=dk,
            dv=dv,
            softmax_scale=scale,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return dq, dk, dv


class PrivateFunction:
    """A function of a package, called by parameter name with whatever its version asks for besides."""

    def __init__(self, module: ModuleType, name: str, needed: tuple[str, ...], source: str) -> None:
        """`needed`: the parameters that a call gives; `source`: what to call the package in a message.

        Raises:
            ValueError: the function lacks one of them or a causal flag, or requires a parameter that is unknown here.
        """
        if not hasattr(module, name):
            raise ValueError(f"attention.backend flash: {source} has no {name}; {KNOWN}")
        self._function: Callable = getattr(module, name)
        parameters = _parameters(self._function)
        # Both spellings of the flag occur, in one version even side by side: `causal` forward, `is_causal` backward.
        causal = "is_causal" if "is_causal" in parameters else "causal"
        missing = [parameter for parameter in (*needed, causal) if parameter not in parameters]
        required = [key for key, value in parameters.items() if value.default is inspect.Parameter.empty]
        others = [key for key in required if key not in (*needed, causal)]
        unknown = [key for key in others if key not in OFF]
        if missing or unknown:
            what = f"lacks {', '.join(missing)}" if missing else f"also requires {', '.join(unknown)}"
            raise ValueError(f"attention.backend flash: {name} of {source} {what}; {KNOWN}")
        self._fixed = {causal: True, **{key: OFF[key] for key in others}}

    def __call__(self, **values: object) -> tuple[torch.Tensor, ...] | torch.Tensor:
        """Calls it with the needed parameters."""
        return self._function(**values, **self._fixed)


def _parameters(function: Callable) -> dict[str, inspect.Parameter]:
    # A custom operator of PyTorch takes any arguments by its own signature; the function behind it has the names.
    return dict(inspect.signature(getattr(function, "_init_fn", function)).parameters)


def _version(module: ModuleType) -> str:
    package = sys.modules.get(module.__name__.split(".")[0], module)
    return getattr(package, "__version__", "(version unknown)")
