"""The architectures that `build` makes models of, and PyTorch's name for their number formats.

    architecture = read_architecture(Path("Qwen3-0.6B"))
    DTYPES[architecture.dtype]                                  # torch.bfloat16

What an architecture is, and how it is read, needs no torch and stands in `config.architecture`.
"""

from __future__ import annotations

import torch

from megatron_opdlm.config.architecture import Mixture, Qwen3Architecture, read_architecture, read_config_json

__all__ = ["DTYPES", "Mixture", "Qwen3Architecture", "read_architecture", "read_config_json"]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
