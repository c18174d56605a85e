"""Megatron distributed checkpoints: what a sharded state becomes on disk, written at once or beside the training.

A checkpoint folder holds the shards of `torch_dist`, the Hugging Face assets of the model in `hf/`, for a training run
its `config.yaml`, and the manifest that makes it whole (see `folders`).

    save_checkpoint(folder, {"model": model.sharded_state_dict(metadata=METADATA)}, write_assets)
    state = load_checkpoint(folder, {"model": model.sharded_state_dict(metadata=METADATA)})

    with BackgroundSaves() as saves:
        saves.save(folder, state, write_assets)      # returns as soon as the state is copied; training goes on

Megatron-Core makes the shards and PyTorch's writer writes them (see `writer`), in threads of this process.
Megatron-Core's own writer forks the training process: the writers of a killed run go on writing into the folder that
its successor fills, a save whose writer was killed is waited for without end, and what it takes to save in the
background differs between releases (0.16 forks, 0.19 asks for another package).

Up to 0.18 Megatron-Core puts the small values into a file of their own, from 0.19 on among the shards. 0.19 reads both.
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
import shutil
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
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_opdlm.checkpointing.folders import PARTIAL, begin_folder, partial_folder
from megatron_opdlm.checkpointing.harmless import check_harmless
from megatron_opdlm.checkpointing.manifest import check_complete
from megatron_opdlm.checkpointing.writer import PublishingWriter

logger = logging.getLogger(__name__)

METADATA = {
    # Loadable onto any other tensor-, pipeline- and data-parallel layout.
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}
SMALL_VALUES = "common.pt"
"""Where Megatron-Core up to 0.18 puts what is no tensor."""


def save_checkpoint(
    folder: Path, state: dict, write_assets: Callable[[Path], None], on_published: Callable[[], None] = lambda: None
) -> None:
    """Writes `state` (sharded tensors and small common values) to `folder`. All ranks must call it.

    `write_assets(folder)` runs on rank 0 and adds files of its own; `on_published()` runs there when all is in place.
    ValueError on all ranks if it cannot be written, with the reason; then there is nothing of it.
    """
    _prepare(folder, state, write_assets, on_published, copy=False).write(group=None)


class BackgroundSaves:
    """Saves that copy the state and write it while training goes on, one at a time. All ranks must make one.

    The ranks' writing threads talk over a gloo group of their own. A save needs nothing of the ranks' main threads once
    it is begun: it is published as soon as every rank's files are written, also if a rank's training has failed by
    then. What is killed before that leaves a `.partial` folder, never half a checkpoint.
    """

    def __init__(self, timeout: datetime.timedelta | None = None) -> None:
        """`timeout` is how long a rank's writing waits for that of the others, by default 30 minutes."""
        self._group = dist.new_group(backend="gloo", timeout=timeout)
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
        """Returns when the checkpoint of the last `save` is in place. ValueError if it was not written."""
        try:
            if self._pending is not None:
                self._pending.result()
        finally:
            self._pending = None

    def sign_of_life(self) -> float | None:
        """Changes for as long as a save is under way: it ends by itself, in success or by the group's timeout."""
        pending = self._pending
        return None if pending is None or pending.done() else time.monotonic()

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
        writer = PublishingWriter(self.partial, self.on_published)
        try:
            torch.distributed.checkpoint.save(self.tensors, storage_writer=writer, planner=planner, process_group=group)
        except CheckpointException as error:
            rank, (reason, _) = next(iter(error.failures.items()))
            raise _failure(self.partial, f"rank {rank}: {reason}") from error
        logger.info("wrote %s in %.1f s", self.partial.stem, time.perf_counter() - started)


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
    _on_first_rank(lambda: begin_folder(folder), partial)
    capture, reason = _Capture(copy), None
    try:
        with _quiet():
            dist_checkpointing.save(state, str(partial), capture, content_metadata=METADATA)
    except (OSError, RuntimeError) as error:  # which of them `torch.save` raises depends on where the disk was full
        if dist.get_rank() != 0:
            raise
        reason = str(error)
        dist.barrier()  # the others wait in it, at the end of Megatron-Core's `save`; rank 0 alone writes there
    _tell_of_failure(reason, partial)
    _on_first_rank(lambda: write_assets(partial), partial)
    return _Prepared(partial, capture.tensors, on_published)


def _on_first_rank(write: Callable[[], object], partial: Path) -> None:
    """Lets rank 0 write while the others wait. All ranks must call it, and all raise ValueError if it cannot."""
    reason = None
    if dist.get_rank() == 0:
        try:
            write()
        except OSError as error:
            reason = str(error)
    _tell_of_failure(reason, partial)


def _tell_of_failure(reason: str | None, partial: Path) -> None:
    """ValueError on all ranks if rank 0 has a reason. All ranks must call it."""
    told = [reason]
    dist.broadcast_object_list(told, src=0)
    if told[0] is not None:
        raise _failure(partial, told[0])


def _failure(partial: Path, reason: str) -> ValueError:
    """What to raise where a checkpoint could not be written. What there is of it goes: the disk may be full."""
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    folder = partial.with_name(partial.name.removesuffix(PARTIAL))
    return ValueError(f"checkpoint {folder} could not be written: {reason}; those before it are as they were")


def load_checkpoint(folder: Path, state: dict) -> dict:
    """The values that `state` describes, read from `folder`. All ranks must call it.

    ValueError if it is damaged, pickles more than data (`harmless`), was written by a Megatron-Core too new for the one
    installed, or holds other tensors than `state` asks for.
    """
    agree(lambda: _check_sound(folder))
    try:
        with _quiet():
            return dist_checkpointing.load(state, str(folder))
    except (CheckpointException, CheckpointingException) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"checkpoint {folder} is damaged or of another model: {reason}") from error


def agree(check: Callable[[], None]) -> None:
    """Lets every rank check something: ValueError on all of them if one raises it. All ranks must call it."""
    reasons: list[str | None] = [None] * dist.get_world_size()
    reason = None
    try:
        check()
    except ValueError as error:
        reason = str(error)
    dist.all_gather_object(reasons, reason)
    for rank, found in enumerate(reasons):
        if found is not None:
            raise ValueError(found if len(reasons) == 1 else f"rank {rank}: {found}")


def _check_sound(folder: Path) -> None:
    check_complete(folder)
    check_harmless(folder)
    _check_readable(folder)


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
