"""Frozen weights that live in host memory and are on the device for as long as somebody uses them.

    weights = HostedWeights(teacher.parameters())         # the device has none of them any more
    with weights.on_device():
        hidden = teacher(ids, positions, None)

The tensors stay the same objects at the same places of the model; only the memory behind them comes and goes. They are
frozen, so nothing is ever copied back.

Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


class HostedWeights:
    """Copies of weights in host memory, pinned if the weights were on a GPU. Tensors may share memory."""

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        """Copies the weights, which must not change any more, and frees their memory."""
        storages = {weight.untyped_storage().data_ptr(): weight.untyped_storage() for weight in weights}
        self._bytes = [torch.empty(0, dtype=torch.uint8, device=s.device).set_(s) for s in storages.values()]
        self._copies = [_host_copy(on_device) for on_device in self._bytes]
        self.num_bytes = sum(len(copy) for copy in self._copies)
        """Device memory that the weights take while they are there."""
        self._release()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """While it lasts, the weights can be read. Kernels on the current stream see them whole."""
        for on_device, copy in zip(self._bytes, self._copies, strict=True):
            on_device.untyped_storage().resize_(len(copy))
            on_device.copy_(copy, non_blocking=True)
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
        """The allocator gives freed memory to later work of the same stream, behind the kernels that still read it."""
        for on_device in self._bytes:
            on_device.untyped_storage().resize_(0)


def _host_copy(on_device: torch.Tensor) -> torch.Tensor:
    return torch.empty(len(on_device), dtype=torch.uint8, pin_memory=on_device.is_cuda).copy_(on_device)
