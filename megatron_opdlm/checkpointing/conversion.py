"""Whole folders from one world to the other; the tools are doors to these two functions.

Both write beside the output and rename at the end, so an output folder is whole or absent.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_opdlm.checkpointing.adapters import checkpoint_reader, merged_reader
from megatron_opdlm.checkpointing.distributed import METADATA, save_checkpoint
from megatron_opdlm.checkpointing.folders import ASSETS, PARTIAL, newest_checkpoint
from megatron_opdlm.checkpointing.hf_folder import SHARD_BYTES, copy_assets, write_safetensors
from megatron_opdlm.checkpointing.hf_qwen3 import hf_tensors
from megatron_opdlm.checkpointing.manifest import check_complete
from megatron_opdlm.checkpointing.pretrained import open_pretrained
from megatron_opdlm.checkpointing.student_and_teacher import check_autoregressive, open_student
from megatron_opdlm.config.check import check_layout
from megatron_opdlm.config.schema import ParallelConfig, StudentConfig
from megatron_opdlm.models.attention.core_attention import CausalCoreAttention
from megatron_opdlm.models.build import build_model
from megatron_opdlm.models.qwen3 import DTYPES, read_config_json
from megatron_opdlm.parallel.initialize import initialize, world_size

logger = logging.getLogger(__name__)

NamedTensors = Iterator[tuple[str, torch.Tensor]]


def hf_to_megatron(
    hf: str, output: Path, *, role: str, dtype: str | None, mask_token: str, tensor_model_parallel_size: int = 1
) -> None:
    """Writes `output` as a Megatron checkpoint of the weights in `hf`. All ranks must call it.

    Raises:
        ValueError: the output exists, or the folder is not a model of a supported family with all its tensors.
    """
    check_absent(output)
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor_model_parallel_size,
        sequence_parallel=tensor_model_parallel_size > 1,  # leaves no trace in the weights; mixtures ask for it
    )
    check_layout(parallel, world_size())
    pretrained = open_pretrained(hf, "--hf")
    if role == "student":
        source = open_student(StudentConfig(hf=hf, mask_token=mask_token))
        architecture, write_assets = source.architecture, source.write_assets
    else:
        check_autoregressive(pretrained.architecture, "--hf", hf)
        architecture, write_assets = pretrained.architecture, lambda folder: copy_assets(pretrained.assets, folder)
    groups = initialize(parallel, seed=0)
    model = build_model(
        architecture,
        CausalCoreAttention,  # which attention stands in the layers leaves no trace in the weights
        parallel=parallel,
        dtype=dtype or _megatron_dtype(architecture.dtype),
        padded_vocab_size=architecture.padded_vocab_size(
            parallel.make_vocab_size_divisible_by, tensor_model_parallel_size
        ),
        overrides={},
    )
    pretrained.load_into(model, groups, architecture)
    save_checkpoint(
        output, {"model": model.sharded_state_dict(metadata=METADATA)}, lambda folder: write_assets(folder / ASSETS)
    )
    logger.info("wrote %s", output)


def megatron_to_hf(checkpoint: Path, output: Path, *, dtype: str | None) -> None:
    """Writes `output` as a Hugging Face folder of the checkpoint's weights, adapters merged.

    Raises:
        ValueError: the output exists, the checkpoint is missing, incomplete or damaged, or the model that its adapters
            belong to is.
    """
    check_absent(output)
    folder = newest_checkpoint(checkpoint) or checkpoint
    check_complete(folder, "hashes")
    partial = output.with_name(output.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    write_hf_folder(folder, partial, dtype=dtype)
    partial.rename(output)
    logger.info("wrote %s", output)


def write_hf_folder(
    folder: Path,
    destination: Path,
    *,
    dtype: str | None,
    max_shard_bytes: int = SHARD_BYTES,
    through: Callable[[NamedTensors], NamedTensors] = lambda tensors: tensors,
) -> None:
    """Fills `destination` with the assets and weights of the whole checkpoint `folder`.

    `through` gets the tensors on their way to the files, and may look at them or add some.
    """
    copy_assets(folder / ASSETS, destination)
    tensors = through(_streamed(folder, DTYPES[dtype] if dtype else None))
    first_name, first = next(tensors)
    write_safetensors(destination, _chain((first_name, first), tensors), max_shard_bytes)
    _record_dtype(destination, first.dtype)


def _streamed(folder: Path, dtype: torch.dtype | None) -> NamedTensors:
    """Hugging Face tensors read one Megatron tensor at a time."""
    architecture = open_pretrained(str(folder), "--checkpoint").architecture

    read, merged_dtype = merged_reader(folder, architecture) or (checkpoint_reader(folder), None)
    dtype = dtype or merged_dtype
    for name, tensor in tqdm(hf_tensors(architecture, read), desc="writing tensors", unit="tensor", leave=False):
        yield name, tensor.to(dtype or tensor.dtype)


def _chain(first: tuple[str, torch.Tensor], rest: Iterator) -> NamedTensors:
    yield first
    yield from rest


def _record_dtype(folder: Path, dtype: torch.dtype) -> None:
    """transformers loads a folder in the format its config names."""
    values = read_config_json(folder)
    values.pop("torch_dtype", None)
    values["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def _megatron_dtype(stored: str) -> str:
    """float16 folders are converted to bfloat16's wider range only when asked to; float32 holds them exactly."""
    return stored if stored in ("bfloat16", "float32") else "float32"


def check_absent(output: Path) -> None:
    """ValueError if the folder to write is there."""
    if output.exists():
        raise ValueError(f"--output ({output}) exists already; name a folder that does not")
