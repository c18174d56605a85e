"""What tells a GPU from the CPU, on the CPU: graphs of recorded operations, and waiting for results.

replay, hidden = record(forward)             # as `CudaCapture`: the same operations on the same memory, no Python

with DeviceWaits(model) as device:
    engine.generate(tasks, step=0)           # AssertionError where a GPU would be waited for
device.num_copies                            # tensors that were copied to the host on purpose
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
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
        """Runs them once more, each into the memory where its result was; the host has no part in it."""
        with _disable_current_modes():
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

    def __init__(self, model) -> None:
        super().__init__()
        self.num_copies = 0
        self._calls = _Calls(self)
        for tensor in [*model.parameters(), *(chunk.rotary_pos_emb.inv_freq for chunk in model.chunks)]:
            tensor.is_on_device = True

    def __enter__(self):
        self._calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._calls.__exit__(*error)

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        settings = settings or {}
        operands = list(_tensors((arguments, settings)))
        is_of_device = any(map(is_on_device, operands))
        if is_of_device:
            assert not _waits(function, arguments), f"{function} waits for the device"
            strangers = [tensor for tensor in operands if tensor.dim() and not is_on_device(tensor)]
            assert not strangers, f"{function} of a tensor on the device and one on the host"
        return _marked(function(*arguments, **settings), is_of_device)


class _Calls(TorchFunctionMode):
    """What of `DeviceWaits` has to be seen as it was written: `device=`, `.to`, `.tolist`, `.cpu`."""

    def __init__(self, waits: DeviceWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, function, types, arguments=(), settings=None):
        settings = settings or {}
        if function is torch.Tensor.tolist:
            assert not is_on_device(arguments[0]), "tolist waits for the device"
        if function is torch.Tensor.cpu:
            self._waits.num_copies += is_on_device(arguments[0])
            return _marked(arguments[0].clone(), False)
        if function is torch.Tensor.to and isinstance(arguments[1], torch.device) and not is_on_device(arguments[0]):
            assert sys._getframe(1).f_code.co_name == "to_device", "a tensor is moved by a copy that waits"
            return _marked(arguments[0].clone(), True)
        result = function(*arguments, **settings)
        if settings.get("device") is None:
            return result
        assert function.__name__ != "tensor", "values are moved by a copy that waits"
        return _marked(result, True)


def _marked(result, is_on_device: bool):
    for tensor in _tensors(result):
        tensor.is_on_device = is_on_device
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
