"""What GPUs can do at most, from their data sheets: the one table behind every roofline and every prediction.

    GPUS["h100-80gb"].flops                                     # 9.89e14 a second, dense bfloat16

Sources: NVIDIA's data sheets of the H100 (https://www.nvidia.com/en-us/data-center/h100), the H200
(https://www.nvidia.com/en-us/data-center/h200) and the A100 (https://www.nvidia.com/content/dam/en-zz/Solutions/
Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf), whose figures for tensor cores with sparsity
are halved here; DGX H100, H200 and A100 for the network, with a network card of 400 Gb/s for each GPU, or of 200 Gb/s
beside the A100. Links count one direction. Memory is what PyTorch reports, such as 79.11 GiB of an H100
(https://github.com/vllm-project/vllm/issues/27508).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU in its usual server of eight. Rates are per second, bandwidths in bytes."""

    device_name: str
    """Part of the name that the driver gives it."""
    flops: float
    """Dense bfloat16."""
    fp8_flops: float | None
    """Dense FP8; None without."""
    memory_gib: float
    """What a program can have of it."""
    memory_bandwidth: float
    link_bandwidth: float
    """To the other GPUs of its server."""
    network_bandwidth: float
    """To other servers."""
    per_node: int = 8


GPUS = {
    "h100-80gb": Gpu(
        device_name="H100 80GB HBM3",
        flops=989e12,
        fp8_flops=1979e12,
        memory_gib=79.1,
        memory_bandwidth=3.35e12,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
    ),
    "h100-pcie": Gpu(
        device_name="H100 PCIe",
        flops=756e12,
        fp8_flops=1513e12,
        memory_gib=79.1,
        memory_bandwidth=2.0e12,
        link_bandwidth=64e9,  # PCIe 5.0 x16
        network_bandwidth=25e9,
    ),
    "h200-141gb": Gpu(
        device_name="H200",
        flops=989e12,
        fp8_flops=1979e12,
        memory_gib=139.8,
        memory_bandwidth=4.8e12,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
    ),
    "a100-80gb": Gpu(
        device_name="A100-SXM4-80GB",
        flops=312e12,
        fp8_flops=None,
        memory_gib=79.1,
        memory_bandwidth=2.039e12,
        link_bandwidth=300e9,
        network_bandwidth=25e9,
    ),
}
"""Name, as `tools/plan.py --gpu` takes it -> GPU."""
