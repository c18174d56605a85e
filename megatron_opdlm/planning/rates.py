"""Every number that a prediction assumes, in one place. None of them has been measured with this project on a GPU.

    Rates(matmul=0.5)                                           # a more careful guess

`message_seconds` is how long a message takes at them.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_opdlm.observability.hardware import Gpu
from megatron_opdlm.planning.layout import Layout
from megatron_opdlm.planning.work import Message


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Shares of the data sheet's peaks, and latencies."""

    matmul: float = 0.65
    """Of the peak, by the products of linear layers on thousands of tokens. Megatron-LM reports 41 to 48 % MFU for
    whole steps on H100 (github.com/NVIDIA/Megatron-LM, README); what else a step does is counted apart here."""
    attention: float = 0.40
    """Of the bfloat16 peak, by causal attention, forward and backward; FlashAttention-3 reports up to 75 % for long
    sequences (arXiv 2407.08608), our rows are short and have a window beside it."""
    memory: float = 0.80
    """Of the memory bandwidth, by kernels that only move numbers."""
    network: float = 0.75
    """Of the bandwidth of links and network cards, by large collectives."""
    message_latency: float = 15e-6
    """Seconds of a collective however small."""
    seconds_per_kernel: float = 5e-6
    """Between two kernels that a program launches one by one."""
    kernels_per_layer: int = 45
    """Of a forward; a backward has twice as many."""
    kernels_per_mixture: int = 90
    """The same with a router and experts."""
    replayed_layer: float = 20e-6
    """Least seconds of a layer in a CUDA graph, about ten dependent kernels."""
    host_seconds_per_forward: float = 3e-3
    """Of the rollout's program between two forwards: scheduling, drawing, committing, a copy to the host."""
    seconds_per_update: float = 2e-3
    """Of an optimizer step, besides moving its numbers: gradient norm, launches."""
    update_bytes: int = 30
    """An update of bfloat16 weights reads and writes for each element: gradient 4, main parameter and moments 12 and
    12, weight 2."""
    host_bandwidth: float = 40e9
    """Bytes a second from pinned host memory, over PCIe 5.0."""
    reserved_gib: float = 4.0
    """CUDA's context, NCCL's buffers, workspaces of products."""
    fragmentation: float = 0.06
    """Of the memory, lost between blocks of PyTorch's allocator."""

    def launch_seconds(self, is_mixture: bool) -> float:
        """To launch a layer's forward."""
        return self.seconds_per_kernel * (self.kernels_per_mixture if is_mixture else self.kernels_per_layer)


def message_seconds(message: Message, layout: Layout, gpu: Gpu, rates: Rates) -> float:
    """Of a message's collectives, or of one transfer."""
    if message.is_exchange:
        bandwidth = layout.exchange_bandwidth(message.stride, message.size, gpu)
    else:
        bandwidth = layout.ring_bandwidth(message.stride, message.size, gpu)
    return message.num_bytes / (bandwidth * rates.network) + message.num_collectives * rates.message_latency
