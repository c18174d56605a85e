"""The device of this process."""

from __future__ import annotations

import os

import torch


def device() -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def to_device(tensor: torch.Tensor, target: torch.device) -> torch.Tensor:
    """A CPU tensor on `target`; the program does not wait for the copy."""
    if target.type != "cuda":
        return tensor.to(target)
    return tensor.pin_memory().to(target, non_blocking=True)
