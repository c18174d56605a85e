"""Runs a function on several processes that form one gloo process group, for tests of what ranks do together.

def add_up(rank: int, start: int) -> int:
    total = torch.tensor(start + rank)
    dist.all_reduce(total)
    return total.item()

assert run_on_ranks(add_up, 2, 10) == [21, 21]
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIME_LIMIT = 300.0
"""Seconds after which a test's processes are ended, where it does not say otherwise."""

PRELOADED = [
    "megatron_opdlm.training.trainer",
    "torch._dynamo",  # by the first optimizer of a process
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen3.modeling_qwen3",
    "pytest",
    "hypothesis",
]
"""What is imported by the one process that all others are forked from: it takes each of them seconds otherwise."""
FORKED = multiprocessing.get_context("forkserver")
"""Makes the processes: `FORKED.Process(target=function, args=...)`."""
FORKED.set_forkserver_preload(PRELOADED)


def run_on_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, time_limit: float = TIME_LIMIT
) -> list[Any]:
    """[function(rank, *arguments) for every rank], each in a fresh process with the default process group initialised.

    `function` is at module level; arguments and return values can be pickled. No process outlives the call. Raises
    RuntimeError with the traceback of the rank that failed first, `torch.multiprocessing.ProcessExitedException` where
    a process died without one, and TimeoutError after `time_limit` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        what = (function, world_size, folder, arguments, time_limit)
        ranks = mp.start_processes(_run_rank, what, world_size, join=False, start_method="forkserver")
        try:
            _wait_for(ranks, function.__name__, time_limit)
        except mp.ProcessRaisedException:
            raise RuntimeError(Path(folder, "failure").read_text()) from None
        finally:
            for process in ranks.processes:
                process.kill()
                process.join()
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(world_size)]


def _wait_for(ranks: mp.ProcessContext, name: str, time_limit: float) -> None:
    deadline = time.monotonic() + time_limit
    while not ranks.join(timeout=max(deadline - time.monotonic(), 0.0)):
        if time.monotonic() >= deadline:
            raise TimeoutError(f"{name} did not finish on all ranks within {time_limit:.0f} s")


def _run_rank(
    rank: int, function: Callable[..., Any], world_size: int, folder: str, arguments: tuple, time_limit: float
) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what is imported stays: collections need not look at it
    # A file instead of a TCP port for the rendezvous: no other process can take it.
    rendezvous, limit = f"file://{folder}/rendezvous", timedelta(seconds=time_limit)
    try:
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size, timeout=limit)
        Path(folder, str(rank)).write_bytes(pickle.dumps(function(rank, *arguments)))
        dist.destroy_process_group()
    except BaseException:
        _note_failure(Path(folder, "failure"), rank)
        raise


def _note_failure(path: Path, rank: int) -> None:
    # The first rank to fail still has its connections open; what the others raise once they close is of no interest.
    with contextlib.suppress(FileExistsError), path.open("x") as file:
        file.write(f"on rank {rank}:\n{traceback.format_exc()}")
