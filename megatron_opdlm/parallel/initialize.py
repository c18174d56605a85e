"""From environment variables of torchrun to Megatron's process groups.

    groups = initialize(config.parallel, seed=config.training.seed)
    groups.tp.size(), groups.dp.rank()

Without torchrun a single process is a world of one.
"""

from __future__ import annotations

import datetime
import logging
import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.distributed.rendezvous import rendezvous

from megatron_opdlm.config.schema import ParallelConfig
from megatron_opdlm.parallel.device import device

logger = logging.getLogger(__name__)


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
            distributed_timeout_minutes=parallel.distributed_timeout_minutes,
        )
    # Initial weights are always loaded, so equal seeds on all ranks serve; no dropout anywhere.
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return ProcessGroupCollection.use_mpu_process_groups()


def control_store() -> dist.Store:
    """A connection of its own to the store at which the ranks met, for notes that must not wait for collectives.

    A rank alone writes to itself: the store may be a file, and a full disk is no reason to end.
    """
    if dist.get_world_size() == 1:
        return dist.HashStore()
    return dist.PrefixStore("control", dist.distributed_c10d._get_default_store().clone())


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
    _warn_of_shared_store()
    on_gpu = device().type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device())
    timeout = datetime.timedelta(minutes=parallel.distributed_timeout_minutes)
    store, own_rank, num_ranks = _meeting_place(timeout)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.PrefixStore(_attempt(), store),
        rank=own_rank,
        world_size=num_ranks,
        timeout=timeout,
    )


def _meeting_place(timeout: datetime.timedelta) -> tuple[dist.Store, int, int]:
    """The store, this process's rank, and how many there are."""
    if "RANK" not in os.environ:  # alone: nobody needs a port or its number in the environment
        return dist.HashStore(), 0, 1
    return next(rendezvous("env://", timeout=timeout))


def _attempt() -> str:
    """Keeps what a run left in torchrun's store before a restart apart from what it finds there after it.

    torchrun makes one store for all attempts (torch 2.13, `elastic/rendezvous/dynamic_rendezvous.py`), in which ranks
    would find the addresses of those that have died. Where there are several nodes, their launchers count differently;
    there only a store for each attempt helps: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
    """
    is_one_node = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}" if is_one_node else "attempt"


def _warn_of_shared_store() -> None:
    """Several launchers that are to start the ranks again, all attempts at one store: see `_attempt`."""
    names = "GROUP_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS"
    num_launchers, num_restarts = (int(os.environ.get(name, "0")) for name in names)
    is_shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if rank() == 0 and is_shared and num_launchers > 1 and num_restarts > 0:
        logger.warning(
            "--max-restarts %d on %d nodes: a restart will find the addresses of dead ranks, and hang; launch with "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment",
            num_restarts,
            num_launchers,
        )
