"""A Hugging Face model folder: safetensors read tensor by tensor, and written shard by shard.

    weights = SafetensorsReader(Path("Qwen3-0.6B"))
    weights.shape("model.norm.weight"); weights.read("model.norm.weight")

Nothing here knows a model. Only safetensors and JSON are read, never pickle; code that a folder brings is never run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_opdlm.checkpointing.harmless import file_inside

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
ASSET_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)
SHARD_BYTES = 5 << 30
"""Of one file of weights, at most."""


class SafetensorsReader:
    """The tensors of a folder by name; each is read when asked for.

    Raises:
        ValueError: no safetensors in the folder, a damaged file, or a file that the index names and the folder lacks.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._files = self._locate()
        self._open: dict[str, safe_open] = {}
        self.names = set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it. ValueError if the folder does not have it."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> torch.Tensor:
        """The tensor, or only these rows and columns of it."""
        sliced = self._slice(name)
        return sliced[rows] if columns is None else sliced[rows, columns]

    def _slice(self, name: str):
        if name not in self._files:
            raise ValueError(f"{self.folder} has no tensor {name}")
        return self._file(self._files[name]).get_slice(name)

    def _file(self, file_name: str) -> safe_open:
        if file_name not in self._open:
            path = file_inside(self.folder, file_name)
            if not path.is_file():
                raise ValueError(f"{self.folder} lacks {file_name}, which holds some of its weights")
            try:
                self._open[file_name] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
        return self._open[file_name]

    def _locate(self) -> dict[str, str]:
        """Tensor name -> file name."""
        index = self.folder / INDEX_FILE
        if index.is_file():
            return _read_weight_map(index)
        if not (self.folder / SINGLE_FILE).is_file():
            raise ValueError(f"{self.folder} has neither {SINGLE_FILE} nor {INDEX_FILE}")
        self._open = {}
        return dict.fromkeys(self._file(SINGLE_FILE).keys(), SINGLE_FILE)


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is not a safetensors index: {error}") from error
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} is not a safetensors index: weight_map must name a file for each tensor")
    return weight_map


def write_safetensors(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes the tensors in order, a shard as soon as it is full, so that at most one shard is in memory."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    total = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending and sum(t.numel() * t.element_size() for t in pending.values()) + size > max_shard_bytes:
            shards.append(_write_shard(folder, len(shards), pending))
            pending = {}
        pending[name] = tensor.contiguous()
        total += size
    shards.append(_write_shard(folder, len(shards), pending))
    _name_shards(folder, shards, total)


def _write_shard(folder: Path, number: int, tensors: dict[str, torch.Tensor]) -> list[str]:
    path = folder / f"shard-{number}.safetensors"
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)  # safetensors 0.8 leaves files that their owner alone can read, whatever the umask
    return list(tensors)


def _name_shards(folder: Path, shards: list[list[str]], total_bytes: int) -> None:
    """Hugging Face's file names need the number of shards, which is known only at the end."""
    if len(shards) == 1:
        (folder / "shard-0.safetensors").rename(folder / SINGLE_FILE)
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file_name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}.safetensors").rename(folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def copy_assets(source: Path, destination: Path) -> None:
    """Copies config, generation config, tokenizer files and model code (SDAR's, say), whichever the source has."""
    destination.mkdir(parents=True, exist_ok=True)
    for name in (*ASSET_FILES, *(path.name for path in sorted(source.glob("*.py")))):
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)
