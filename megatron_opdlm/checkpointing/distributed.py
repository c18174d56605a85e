"""Megatron distributed checkpoints: what a sharded state becomes on disk, written at once or beside the training.

A checkpoint folder holds the shards of `torch_dist`, the Hugging Face assets of the model in `hf/`, for a training run
its `config.yaml`, and the manifest that makes it whole (see `folders`).

    save_checkpoint(folder, {"model": model.sharded_state_dict(metadata=METADATA)}, write_assets)
    state = load_checkpoint(folder, {"model": model.sharded_state_dict(metadata=METADATA)})

    with BackgroundSaves() as saves:
        saves.save(folder, state, write_assets)      # returns as soon as the state is copied; training goes on

Megatron-Core makes the shards and PyTorch's `FileSystemWriter` writes them, in threads of this process. Megatron-Core's
own writer forks the training process: the writers of a killed run go on writing into the folder that its successor
fills, a save whose writer was killed is waited for without end, and what it takes to save in the background differs
between releases (0.16 forks, 0.19 asks for another package).

Up to 0.18 Megatron-Core puts the small values into a file of their own, from 0.19 on among the shards. 0.19 reads both.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import __version__ as megatron_version
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from packaging.version import Version
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter, LoadPlan
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_opdlm.checkpointing.folders import begin_folder, check_complete, partial_folder, publish

logger = logging.getLogger(__name__)

METADATA = {
    # Loadable onto any other tensor-, pipeline- and data-parallel layout.
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}
NUM_WRITERS = 2
"""Threads, and files, of a rank."""
SMALL_VALUES = "common.pt"
"""Where Megatron-Core up to 0.18 puts what is no tensor."""


def save_checkpoint(
    folder: Path, state: dict, write_assets: Callable[[Path], None], on_published: Callable[[], None] = lambda: None
) -> None:
    """Writes `state` (sharded tensors and small common values) to `folder`. All ranks must call it.

    `write_assets(folder)` runs on rank 0 and adds files of its own; `on_published()` runs there when all is in place.
    """
    _prepare(folder, state, write_assets, on_published, copy=False).write(group=None)


class BackgroundSaves:
    """Saves that copy the state and write it while training goes on, one at a time. All ranks must make one.

    The ranks' writing threads talk over a gloo group of their own. A save needs nothing of the ranks' main threads once
    it is begun: it is published as soon as every rank's files are written, also if a rank's training has failed by
    then. What is killed before that leaves a `.partial` folder, never half a checkpoint.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None

    def save(
        self,
        folder: Path,
        state: dict,
        write_assets: Callable[[Path], None],
        on_published: Callable[[], None] = lambda: None,
    ) -> None:
        """Like `save_checkpoint`, but returns once `state` is copied to the host's memory. All ranks must call it.

        Waits for the save before this one, and raises what stopped it.
        """
        self.wait()
        prepared = _prepare(folder, state, write_assets, on_published, copy=True)
        self._pending = self._thread.submit(prepared.write, self._group)

    def wait(self) -> None:
        """Returns when the checkpoint of the last `save` is in place. CheckpointException if it was not written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> BackgroundSaves:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A checkpoint whose folder holds everything but the tensors, and the tensors in the form of PyTorch's writer."""

    partial: Path
    tensors: dict
    on_published: Callable[[], None]

    def write(self, group: dist.ProcessGroup | None) -> None:
        """Writes the tensors and publishes the folder. All ranks of the group must call it."""
        started = time.perf_counter()
        planner = MCoreSavePlanner(flatten_state_dict=False)
        writer = _PublishingWriter(self.partial, self.on_published)
        torch.distributed.checkpoint.save(self.tensors, storage_writer=writer, planner=planner, process_group=group)
        logger.info("wrote %s in %.1f s", self.partial.stem, time.perf_counter() - started)


class _PublishingWriter(FileSystemWriter):
    """Publishes the folder where PyTorch writes the index, which is after the last file of the slowest rank.

    PyTorch calls `finish` on the first rank only, with the others waiting, and raises on all of them what it raises.
    """

    def __init__(self, partial: Path, on_published: Callable[[], None]) -> None:
        super().__init__(partial, thread_count=NUM_WRITERS)
        self.partial, self.on_published = partial, on_published

    def finish(self, metadata: Metadata, results: list) -> None:
        super().finish(metadata, results)
        publish(self.partial)
        self.on_published()


class _Capture(TorchDistSaveShardedStrategy):
    """Takes the place of Megatron-Core's writer and keeps what it is given to write."""

    def __init__(self, copy: bool) -> None:
        super().__init__("torch_dist", 1)
        self.copy = copy
        self.tensors: dict = {}

    def save(self, sharded_state_dict: dict, checkpoint_dir: Path) -> None:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        for shard in (shard for shards in by_key.values() for shard in shards):
            if isinstance(shard, ShardedTensor):
                # A parameter that is on the CPU already would change under the writer with the optimizer's next step.
                shard.data = shard.data.detach().to("cpu", copy=self.copy)
        self.tensors = mcore_to_pyt_state_dict(by_key)  # serialises what is no tensor, so that is a copy too


def _prepare(
    folder: Path, state: dict, write_assets: Callable[[Path], None], on_published: Callable[[], None], *, copy: bool
) -> _Prepared:
    partial = partial_folder(folder)
    if dist.get_rank() == 0:
        begin_folder(folder)
    dist.barrier()
    capture = _Capture(copy)
    with _quiet():
        dist_checkpointing.save(state, str(partial), capture, content_metadata=METADATA)
    if dist.get_rank() == 0:
        write_assets(partial)
    return _Prepared(partial, capture.tensors, on_published)


def load_checkpoint(folder: Path, state: dict) -> dict:
    """The values that `state` describes, read from `folder`. All ranks must call it.

    ValueError if it is damaged, written by a Megatron-Core too new for the one installed, or holds other tensors than
    `state` asks for.
    """
    check_complete(folder)
    _check_readable(folder)
    try:
        with _quiet():
            return dist_checkpointing.load(state, str(folder))
    except (CheckpointException, CheckpointingException) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"checkpoint {folder} is damaged or of another model: {reason}") from error


def _check_readable(folder: Path) -> None:
    if Version(megatron_version).release[:2] < (0, 19) and not (folder / SMALL_VALUES).is_file():
        raise ValueError(
            f"checkpoint {folder} was written under Megatron-Core 0.19 or later, which {megatron_version} cannot read"
        )


def read_tensor(folder: Path, key: str, layer: int | None) -> torch.Tensor:
    """One whole tensor of a checkpoint by its key; with `layer`, that layer's part of a stacked one.

    Reads nothing else, needs no process group and no model. ValueError if there is no such tensor.
    """
    with _quiet():
        reader = FileSystemReader(folder)
        stored = reader.read_metadata().state_dict_metadata.get(key)
        if stored is None:
            raise ValueError(f"checkpoint {folder} has no tensor {key}")
        rows = slice(0, stored.size[0]) if layer is None else slice(layer, layer + 1)
        tensor = torch.empty((rows.stop - rows.start, *stored.size[1:]), dtype=stored.properties.dtype)
        torch.distributed.checkpoint.load(
            {key: tensor}, storage_reader=reader, planner=_RowsPlanner(rows.start), no_dist=True
        )
    return tensor if layer is None else tensor[0]


class _RowsPlanner(DefaultLoadPlanner):
    """Reads the rows from `first` on of the only tensor of the state, as many as the tensor has."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def create_local_plan(self) -> LoadPlan:
        ((key, tensor),) = self.state_dict.items()
        offsets = torch.Size([self.first] + [0] * (tensor.dim() - 1))
        rows = ChunkStorageMetadata(offsets=offsets, sizes=tensor.size())
        stored = self.metadata.state_dict_metadata[key]
        return LoadPlan(create_read_items_for_chunk_list(key, stored, [rows]))

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn]


def _quiet() -> warnings.catch_warnings:
    """torch.distributed.checkpoint warns of its own deprecated calls, on each rank, at each save."""
    return warnings.catch_warnings(action="ignore")
