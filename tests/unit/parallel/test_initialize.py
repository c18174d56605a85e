"""A process without torchrun is a world of one, and what it starts next finds the environment as it was."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from megatron_opdlm.config.schema import ParallelConfig
from megatron_opdlm.parallel.initialize import initialize, rank, shut_down, world_size


def test_a_process_alone_is_a_world_of_one_that_adds_up_and_leaves_the_environment_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    groups = initialize(ParallelConfig(), seed=0)
    try:
        number = torch.full((2,), 3.0)
        dist.all_reduce(number, group=groups.tp)
        assert (rank(), world_size(), groups.dp.size(), number.tolist()) == (0, 1, 1, [3.0, 3.0])
        assert dict(os.environ) == before
    finally:
        shut_down()
