"""Megatron-Core on a machine without a GPU: gloo processes, the same code.

Megatron-Core reaches for its device through some twenty CUDA entry points. Without a CUDA device each of them would
raise, so sending them to the CPU changes nothing that could have worked. `install()` does so; where there is a GPU it
does nothing at all. It runs before the first import of `megatron.core`, from `megatron_opdlm.parallel`:

    import megatron_opdlm.parallel            # installs the seam
    from megatron.core.models.gpt import GPTModel

This is the only file of the project that patches anything.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_opdlm.parallel.adam import Adam

CPU = torch.device("cpu")
FACTORIES = ("arange", "empty", "empty_like", "full", "ones", "tensor", "zeros")


def install() -> bool:
    """Puts the seam in place. True where it is in place, False on a machine with a GPU."""
    if torch.cuda.is_available():
        return False
    if torch.cuda.current_device is not _current_device:
        # Transformer Engine may be installed, but it has no kernel for the CPU: `import transformer_engine` then raises
        # ModuleNotFoundError and Megatron takes its own layers.
        sys.modules["transformer_engine"] = None
        torch.compile = _uncompiled
        _patch_torch_cuda()
        _patch_tensors()
        _patch_megatron()
    return True


def _current_device() -> torch.device:
    return CPU


def _uncompiled(function: Callable | None = None, **options: Any) -> Callable:
    """Stands in for `torch.compile`: functions run eagerly, without a C++ compiler.

    Megatron decorates functions with it as it is imported, and to import the compiler takes as long as to import torch.
    """
    return (lambda later: later) if function is None else function


class _Stream:
    """Stands in for CUDA streams and events. A class, because libraries write `torch.cuda.Stream | None`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: _Stream) -> None: ...

    def wait_event(self, event: _Stream) -> None: ...

    def record_event(self, event: _Stream | None = None) -> _Stream:
        return self

    def record(self, stream: _Stream | None = None) -> None: ...

    def wait(self, stream: _Stream | None = None) -> None: ...

    def synchronize(self) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0


def _patch_torch_cuda() -> None:
    """The current device, synchronisation, streams; the CPU generator plays the part of the CUDA one."""
    cuda = torch.cuda
    cuda.current_device = _current_device
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device="cuda": torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = cuda.default_stream = lambda device=None: _Stream()


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)  # pinning needs a CUDA driver
        return factory(*args, **kwargs)

    return on_cpu


def _patch_tensors() -> None:
    """Factories asked for device="cuda", `.cuda()`, and `.type()`, which Megatron's optimizers compare to a string."""
    # `with torch.device("meta")` knows the factories by identity and caches that set at first use: it must hold the
    # original functions, which the wrappers call, or the context would not reach them.
    _device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    type_of = torch.Tensor.type

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        named = type_of(self, *args, **kwargs)
        return named if args or kwargs else named.replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = tensor_type
    torch.Tensor.cuda = lambda self, *args, **kwargs: self


def _gather_uneven(mappings: ModuleType) -> None:
    """Gloo gathers and scatters pieces of one size only; uneven ones are filled up to the longest on their way."""
    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def filled(piece: torch.Tensor, length: int) -> torch.Tensor:
        return torch.cat([piece, piece.new_zeros(length - len(piece), *piece.shape[1:])])

    def gather_any(piece: torch.Tensor, group: Any, sizes: list[int] | None = None, *args: Any) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return gather(piece, group, sizes, *args)
        gathered = gather(filled(piece, max(sizes)), group).split(max(sizes))
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

    def reduce_scatter_any(whole: torch.Tensor, group: Any, sizes: list[int] | None = None, *args: Any) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return reduce_scatter(whole, group, sizes, *args)
        parts = [filled(part, max(sizes)) for part in whole.split(list(sizes))]
        return reduce_scatter(torch.cat(parts), group)[: sizes[group.rank()]]

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather_any, reduce_scatter_any


def _as_on_the_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Megatron's function makes an array only of what it had to move; collectives take no tensor for it."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _patch_megatron() -> None:
    """Random states, experts, an Adam with the contract that Megatron's distributed optimizer and checkpoints assume.

    With torch.optim.Adam, Megatron-Core 0.16.1 and 0.19.2 lose or share the per-parameter `step` when a checkpoint is
    loaded (https://github.com/NVIDIA/Megatron-LM, core/optimizer/distrib_optimizer.py); our Adam, like Transformer
    Engine's FusedAdam, keeps `step` in the parameter group.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron-Core warns of each optional GPU package it does not find
        import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401  it warns too
        import megatron.core.optimizer as optimizer
        import megatron.core.optimizer.distrib_optimizer as distributed_optimizer
        import megatron.core.tensor_parallel.mappings as mappings
        import megatron.core.tensor_parallel.random as random
        import megatron.core.transformer.moe.moe_utils as mixture
        import megatron.core.transformer.moe.token_dispatcher as dispatcher

    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    _gather_uneven(mappings)
    dispatcher.maybe_move_tensor_to_cpu = _as_on_the_cpu
    mixture.te_general_gemm = None  # routers look for it, but it has no value where Transformer Engine is absent
    optimizer.Adam = distributed_optimizer.Adam = Adam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distributed_optimizer.HAVE_APEX_OR_TE = distributed_optimizer.USING_TE_OPTIMIZER = True
