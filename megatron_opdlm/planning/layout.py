"""The sizes of all groups of ranks that follow from a layout and a number of GPUs, and how fast each group talks.

    layout = Layout.of(config.parallel, num_gpus=64, gpus_per_node=8)
    layout.data_parallel_size, layout.optimizer_size
    layout.ring_bandwidth(layout.stride_of_data, layout.optimizer_size, GPUS["h100-80gb"])

Megatron lays ranks out tensor parallel first, then context, data and pipeline parallel. So the ranks of a
tensor-parallel group are neighbours, and those of a data-parallel group are tensor x context ranks apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_opdlm.config.schema import ParallelConfig
from megatron_opdlm.observability.hardware import Gpu


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of groups; all derived from the settings and the number of ranks."""

    num_ranks: int
    tensor: int
    pipeline: int
    chunks: int
    """Of a stage: 1 without the interleaved schedule."""
    context: int
    expert: int
    expert_tensor: int
    sequence_parallel: bool
    gpus_per_node: int = 8

    @classmethod
    def of(cls, parallel: ParallelConfig, num_ranks: int, gpus_per_node: int = 8) -> Layout:
        """The layout of a `parallel` section that `config.check.check_layout` lets pass for so many ranks."""
        return cls(
            num_ranks=num_ranks,
            tensor=parallel.tensor_model_parallel_size,
            pipeline=parallel.pipeline_model_parallel_size,
            chunks=parallel.virtual_pipeline_model_parallel_size or 1,
            context=parallel.context_parallel_size,
            expert=parallel.expert_model_parallel_size,
            expert_tensor=parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size,
            sequence_parallel=parallel.sequence_parallel,
            gpus_per_node=gpus_per_node,
        )

    @property
    def data_parallel_size(self) -> int:
        """Ranks that train different rows."""
        return self.num_ranks // (self.tensor * self.pipeline * self.context)

    @property
    def optimizer_size(self) -> int:
        """Ranks that share out the optimizer's state of everything but experts: data times context parallel."""
        return self.data_parallel_size * self.context

    @property
    def expert_optimizer_size(self) -> int:
        """The same for the experts of a mixture."""
        return self.num_ranks // (self.expert * self.expert_tensor * self.pipeline)

    @property
    def rollout_size(self) -> int:
        """Copies of the student that decode different prompts: those of a context-parallel group do too."""
        return self.optimizer_size

    @property
    def stride_of_data(self) -> int:
        """From a rank to the next one of its group that reduces gradients (context ranks belong to it)."""
        return self.tensor

    def members_in_node(self, stride: int, size: int) -> int:
        """How many of a group's ranks stand in one server."""
        return max(1, min(size, self.gpus_per_node // stride))

    def ring_bandwidth(self, stride: int, size: int, gpu: Gpu) -> float:
        """Bytes a second in and out of each rank while a group reduces or gathers, at most.

        Within a server the link between GPUs decides. Over several, a ring enters and leaves each of them once for
        every member there, each of which has a network card of its own.
        """
        members = self.members_in_node(stride, size)
        if members >= size:
            return gpu.link_bandwidth
        return min(gpu.link_bandwidth, members * gpu.network_bandwidth)

    def exchange_bandwidth(self, stride: int, size: int, gpu: Gpu) -> float:
        """Bytes a second out of each rank while every rank of a group sends to every other."""
        outside = 1 - self.members_in_node(stride, size) / size
        return gpu.link_bandwidth if outside <= 0 else min(gpu.link_bandwidth, gpu.network_bandwidth / outside)

    def spelt(self) -> str:
        """`TP8 PP2x2 CP1 DP4`, with what is over one."""
        sizes = {"TP": self.tensor, "CP": self.context, "EP": self.expert}
        named = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        if self.pipeline > 1:
            named.append(f"PP{self.pipeline}" + (f"x{self.chunks}" if self.chunks > 1 else ""))
        if self.expert_tensor != self.tensor:
            named.append(f"ETP{self.expert_tensor}")
        return " ".join([*named, f"DP{self.data_parallel_size}"])
