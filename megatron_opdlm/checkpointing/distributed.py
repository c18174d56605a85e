"""Megatron distributed checkpoints in folders that are either whole or not there.

A checkpoint folder holds the shards of `torch_dist`, the Hugging Face assets of the model in `hf/`, for a training run
its `config.yaml`, and `manifest.json` with the size of every file. It is written under another name and renamed when
everything is in place, so a folder that an interrupted run left behind is never taken for a checkpoint.

    save_checkpoint(folder, {"model": model.sharded_state_dict(metadata=METADATA)}, write_assets)
    state = load_checkpoint(folder, {"model": model.sharded_state_dict(metadata=METADATA)})
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

logger = logging.getLogger(__name__)

METADATA = {
    # Loadable onto any other tensor-, pipeline- and data-parallel layout.
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}
MANIFEST = "manifest.json"
ASSETS = "hf"
PARTIAL = ".partial"
_STEP_FOLDER = re.compile(r"step_(\d{8})")


def save_checkpoint(folder: Path, state: dict, write_assets: Callable[[Path], None]) -> None:
    """Writes `state` (sharded tensors and small common values) to `folder`. All ranks must call it.

    `write_assets(folder)` runs on rank 0 and adds files of its own.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    with _quiet():
        dist_checkpointing.save(state, str(partial), content_metadata=METADATA)
    if dist.get_rank() == 0:
        write_assets(partial)
        _write_manifest(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    dist.barrier()


def load_checkpoint(folder: Path, state: dict) -> dict:
    """The values that `state` describes, read from `folder`. All ranks must call it.

    ValueError if it is damaged, or holds other tensors than `state` asks for.
    """
    check_complete(folder)
    try:
        with _quiet():
            return dist_checkpointing.load(state, str(folder))
    except (CheckpointException, CheckpointingException) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"checkpoint {folder} is damaged or of another model: {reason}") from error


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder is a Megatron checkpoint of ours (as against a Hugging Face folder)."""
    return (folder / MANIFEST).is_file()


def check_complete(folder: Path) -> None:
    """ValueError naming the first file that is missing or has not the size it was written with."""
    if not is_checkpoint(folder):
        raise ValueError(f"{folder} is not a Megatron checkpoint: it has no {MANIFEST}")
    try:
        sizes = json.loads((folder / MANIFEST).read_text())["sizes"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged: {error}") from error
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"checkpoint {folder} is incomplete: {name} is missing")
        if path.stat().st_size != size:
            raise ValueError(
                f"checkpoint {folder} is damaged: {name} has {path.stat().st_size} bytes instead of {size}"
            )


def step_folder(directory: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a training step."""
    return directory / f"step_{step:08d}"


def newest_checkpoint(directory: Path) -> Path | None:
    """The newest whole checkpoint of a run; damaged ones are passed over with a warning that says why."""
    for folder in reversed(_step_folders(directory)):
        try:
            check_complete(folder)
        except ValueError as error:
            logger.warning("%s; falling back to the checkpoint before it", error)
        else:
            return folder
    return None


def remove_old_checkpoints(directory: Path, keep: int) -> None:
    """Deletes all but the `keep` newest whole checkpoints of a run, and what interrupted saves left. 0 keeps all.

    A damaged checkpoint counts for nothing and is left for people to look at.
    """
    if keep:
        for folder in [folder for folder in _step_folders(directory) if _is_complete(folder)][:-keep]:
            shutil.rmtree(folder)
    for partial in directory.glob(f"step_*{PARTIAL}"):
        shutil.rmtree(partial)


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


def _is_complete(folder: Path) -> bool:
    try:
        check_complete(folder)
    except ValueError:
        return False
    return True


def _step_folders(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if path.is_dir() and _STEP_FOLDER.fullmatch(path.name))


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    (folder / MANIFEST).write_text(json.dumps({"sizes": sizes}, indent=2) + "\n")


def _quiet() -> warnings.catch_warnings:
    """torch.distributed.checkpoint warns of its own deprecated calls, on each rank, at each save."""
    return warnings.catch_warnings(action="ignore")
