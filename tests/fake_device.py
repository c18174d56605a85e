"""What tells a GPU from the CPU, on the CPU: graphs of recorded operations, and waiting for results.

replay, hidden = record(forward)             # as `CudaCapture`: the same operations on the same memory, no Python

with DeviceWaits(model, monkeypatch) as device:
    engine.generate(tasks, step=0)           # AssertionError where a GPU would be waited for
device.num_copies                            # tensors that were copied to the host on purpose
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Tags of operations whose result, or its shape, the host has to see."""


class _Recorder(TorchDispatchMode):
    """Notes every operation with the memory that it read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        assert not _waits(function, arguments), f"a graph cannot hold {function}"
        result = function(*arguments, **(settings or {}))
        # A graph knows memory. A tensor may get another one (`x.data = y`), an alias of it keeps this one.
        self.calls.append(
            tree_map_only(torch.Tensor, torch.Tensor.detach, (function, arguments, settings or {}, result))
        )
        return result

    def replay(self) -> None:
        """Runs them once more, each into the memory where its result was."""
        for function, arguments, settings, result in self.calls:
            again = function(*arguments, **settings)
            for place, tensor in zip(_tensors(result), _tensors(again), strict=True):
                if place.data_ptr() != tensor.data_ptr():
                    place.copy_(tensor)


def record(forward: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """`Capture` of `rollout.forward_graphs` on the CPU. Capturing computes nothing, so the result is NaN at first."""
    with _Recorder() as recorder:
        result = forward()
    result.fill_(torch.nan)
    return recorder.replay, result


class DeviceWaits(TorchDispatchMode):
    """Takes the CPU for a device: tensors that got there by `to_device`, and what is made of them or with `device=`.

    It fails where the host would wait for them, other than in `Tensor.cpu`, which it counts; where one meets a tensor
    of the host; and where one gets to the device other than by `to_device`.
    """

    def __init__(self, model, monkeypatch) -> None:
        super().__init__()
        self.num_copies = 0
        for tensor in [*model.parameters(), *(chunk.rotary_pos_emb.inv_freq for chunk in model.chunks)]:
            tensor.is_on_device = True
        move, copy_to_list, copy_to_host = torch.Tensor.to, torch.Tensor.tolist, torch.Tensor.cpu

        def to(tensor, *arguments, **settings):
            if not (arguments and isinstance(arguments[0], torch.device)) or is_on_device(tensor):
                return move(tensor, *arguments, **settings)
            assert sys._getframe(1).f_code.co_name == "to_device", "a tensor is moved by a copy that waits"
            moved = tensor.clone()
            moved.is_on_device = True
            return moved

        def tolist(tensor):
            assert not is_on_device(tensor), "tolist waits for the device"
            return copy_to_list(tensor)

        def cpu(tensor):
            self.num_copies += is_on_device(tensor)
            copied = copy_to_host(tensor).clone()
            copied.is_on_device = False
            return copied

        for name, function in (("to", to), ("tolist", tolist), ("cpu", cpu)):
            monkeypatch.setattr(torch.Tensor, name, function)

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        settings = settings or {}
        operands = list(_tensors((arguments, settings)))
        is_of_device = any(map(is_on_device, operands))
        if is_of_device:
            assert not _waits(function, arguments), f"{function} waits for the device"
            strangers = [tensor for tensor in operands if tensor.dim() and not is_on_device(tensor)]
            assert not strangers, f"{function} of a tensor on the device and one on the host"
        result = function(*arguments, **settings)
        for tensor in _tensors(result):
            tensor.is_on_device = is_of_device or settings.get("device") is not None
        return result


def is_on_device(tensor: torch.Tensor) -> bool:
    """Whether a GPU would have it."""
    return getattr(tensor, "is_on_device", False)


def _waits(function, arguments) -> bool:
    is_index = function.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
    if is_index:
        indices = [index for index in arguments[1] if index is not None]
        is_mask = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        # one value for all the places of a mask is filled in without counting them
        return is_mask and (len(arguments) < 3 or arguments[2].numel() > 1)
    return bool(WAITS & set(function.tags))


def _tensors(values) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))
