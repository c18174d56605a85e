"""What this environment consists of, in a line per part: the first thing to look at, and to send, when a run differs.

    python -m megatron_opdlm.versions               # at once: reads what pip knows
    python -m megatron_opdlm.versions --devices     # imports torch too: GPUs, driver side, cuDNN, NCCL
    python -m megatron_opdlm.versions --json
    python -m megatron_opdlm.versions --require torch apex      # exit code 2 if one of them is not there

The container prints it when it starts, `launch/torchrun.sh` on every node. A part that is not there is `none`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import runpy
from pathlib import Path

from megatron_opdlm import __version__

PACKAGES = (
    "torch",
    "triton",
    "megatron-core",
    "transformer-engine",
    "flash-attn",
    "apex",
    "transformers",
    "tokenizers",
    "safetensors",
    "datasets",
    "numpy",
)
"""Parts that change numbers or speed, by the names that pip has for them."""


def versions() -> dict[str, str]:
    """Part -> version, without importing any of them."""
    found = {"megatron-opdlm": __version__, "python": platform.python_version()}
    found |= {name: _installed(name) for name in PACKAGES}
    found["cuda of torch"] = _cuda_of_torch()
    return found


def devices() -> dict[str, str]:
    """What torch finds on this machine."""
    import torch

    if not torch.cuda.is_available():
        return {"gpus": "none"}
    kinds = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "gpus": ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)),
        "cudnn": str(torch.backends.cudnn.version()),
        "nccl": ".".join(str(number) for number in torch.cuda.nccl.version()),
    }


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _cuda_of_torch() -> str:
    """The CUDA that torch is built with. Its file `version.py` alone is run: importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return "none"
    return runpy.run_path(str(Path(spec.origin).with_name("version.py"))).get("cuda") or "none"


def main(arguments: list[str] | None = None) -> None:
    """Prints the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", action="store_true", help="import torch, and say which GPUs it finds")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--require", nargs="+", choices=PACKAGES, default=[], help="fail if one of these is not there")
    chosen = parser.parse_args(arguments)
    found = versions() | (devices() if chosen.devices else {})
    print(json.dumps(found) if chosen.json else "\n".join(f"{name:<19} {value}" for name, value in found.items()))
    if missing := [name for name in chosen.require if found[name] == "none"]:
        parser.error(f"--require: not installed: {', '.join(missing)}")


if __name__ == "__main__":
    main()
