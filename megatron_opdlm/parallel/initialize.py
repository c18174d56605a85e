"""From environment variables of torchrun to Megatron's process groups.

    groups = initialize(config.parallel, seed=config.training.seed)
    groups.tp.size(), groups.dp.rank()

Without torchrun a single process is a world of one.
"""

from __future__ import annotations

import datetime
import os
import socket

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_opdlm.config.schema import ParallelConfig
from megatron_opdlm.parallel.device import device


def initialize(parallel: ParallelConfig, seed: int) -> ProcessGroupCollection:
    """Joins the world (NCCL on GPUs, gloo on CPUs) and builds Megatron's groups. All ranks must call it."""
    if not dist.is_initialized():
        _initialize_world(parallel)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.virtual_pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        )
    # Initial weights are always loaded, so equal seeds on all ranks serve; no dropout anywhere.
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return ProcessGroupCollection.use_mpu_process_groups()


def world_size() -> int:
    """Processes of this run; known from torchrun before any of them has joined the world."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Rank of this process; known from torchrun before it has joined the world."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def shut_down() -> None:
    """Leaves Megatron's groups and the world."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _initialize_world(parallel: ParallelConfig) -> None:
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    on_gpu = device().type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device())
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", timeout=datetime.timedelta(minutes=parallel.distributed_timeout_minutes)
    )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
