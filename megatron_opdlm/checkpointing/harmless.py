"""Files from somewhere else: what they name stays in their folder, and what they pickle is data.

    path = file_inside(folder, "model-00001-of-00002.safetensors")      # ValueError for "../../.ssh/id_rsa"
    check_harmless(checkpoint)                                          # before PyTorch unpickles its index

A distributed checkpoint of PyTorch has an index, `.metadata`, that is pickled, and may have pickled values beside its
tensors; PyTorch unpickles both without restraint, and a pickle can run any code. So a checkpoint is looked through
first. Tensors and `common.pt` PyTorch reads with `weights_only` itself.

What is looked at must be what PyTorch will see. A pickle can also set attributes of the objects and classes that it is
allowed to name, and so give a dictionary an `items` of its own, or a path no `parts`: hence the exact types, and the
comparison of the classes with what they were before.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path, PurePosixPath

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

INDEX = ".metadata"
_INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": None,
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath"},
    "collections": {"OrderedDict"},
}
"""Module -> the names an index may have of it; None for all classes of it."""
_OF_BAD_PICKLES = (
    *(pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError),
    *(OverflowError, MemoryError),  # a length that was changed
)
"""What unpickling an index raises, not running any code, if it is damaged."""


def file_inside(folder: Path, name: str) -> Path:
    """`folder / name`. ValueError if that leaves the folder by its name; links in the folder are the owner's."""
    if type(name) is str and not (set("\\\0") & set(name)):
        path = PurePosixPath(name)
        if not path.is_absolute() and ".." not in path.parts:
            return folder / name
    raise ValueError(f"{folder}: the file name {name!r} leads out of the folder")


def check_harmless(folder: Path) -> None:
    """ValueError if the checkpoint pickles anything but data, or if its index is damaged."""
    index = _read_index(folder)
    for place, stored in index.storage_data.items():
        if not _is_place_of_bytes(place, stored):
            raise ValueError(f"checkpoint {folder} is damaged: {INDEX} does not say where a part of it is")
        path = file_inside(folder, vars(stored).get("relative_path"))
        if isinstance(index.state_dict_metadata.get(place.fqn), BytesStorageMetadata):
            _check_value(path, stored.offset, stored.length)


def _is_place_of_bytes(place: object, stored: object) -> bool:
    """Whether it is a part of a file, as it is: PyTorch has transformations that would make something else of it."""
    if type(place) is not MetadataIndex or type(place.fqn) is not str or type(stored) is not _StorageInfo:
        return False
    span = [vars(stored).get(name) for name in ("offset", "length")]
    return all(type(number) is int and number >= 0 for number in span) and not stored.transform_descriptors


class _IndexUnpickler(pickle.Unpickler):
    """Knows the classes of an index, and no others, and leaves them as they are."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._attributes: dict[object, dict[str, object]] = {}
        """Of what has been found, as it was then."""

    def load(self) -> object:
        try:
            return super().load()
        finally:
            changed = [owner for owner, attributes in self._attributes.items() if _put_back(owner, attributes)]
            if changed:
                raise pickle.UnpicklingError("it changes classes, which no index does")

    def find_class(self, module: str, name: str) -> object:
        found = self._known(module, name)
        self._attributes.setdefault(found, dict(getattr(found, "__dict__", {})))
        return found

    def _known(self, module: str, name: str) -> object:
        names = _INDEX_CLASSES.get(module, ())
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if names is None and "." not in name and not name.startswith("__"):
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        elif names and name in names:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no index does")


def _put_back(owner: object, attributes: dict[str, object]) -> bool:
    """Gives a class the attributes that it had; whether it had lost or gained any."""
    found = dict(getattr(owner, "__dict__", {}))
    changed = [name for name in found.keys() | attributes if found.get(name) is not attributes.get(name)]
    for name in changed:
        setattr(owner, name, attributes[name]) if name in attributes else delattr(owner, name)
    return bool(changed)


def _read_index(folder: Path) -> Metadata:
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(f"checkpoint {folder} is incomplete: {INDEX} is missing")
    try:
        index = _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
    except _OF_BAD_PICKLES as error:
        raise ValueError(f"checkpoint {folder} is damaged: {INDEX} cannot be read: {error}") from error
    fields = vars(index) if type(index) is Metadata else {}
    if any(type(fields.get(name)) is not dict for name in ("storage_data", "state_dict_metadata")):
        raise ValueError(f"checkpoint {folder} is damaged: {INDEX} holds no index")
    return index


def _check_value(path: Path, offset: int, length: int) -> None:
    """A value beside the tensors, which PyTorch would unpickle."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = io.BytesIO(file.read(length))
        torch.load(content, weights_only=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (*_OF_BAD_PICKLES, RuntimeError) as error:
        raise ValueError(f"{path} holds something else than data: {str(error).partition(chr(10))[0]}") from error
