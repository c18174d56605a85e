"""What a checkpoint folder holds, file by file: the size and the SHA-256 of each, in its `manifest.json`.

The sizes find what was cut off, the hashes what was changed. Shards are hashed while they are written, so the manifest
says what was meant to be in them, whatever the disk made of it.

    write_manifest(folder, {"__0_0.distcp": FileRecord(size=5, sha256="8cb2...")})    # hashes what else is there
    check_complete(folder, "hashes")                                                 # ValueError names a bad file

Files other than shards are small, and reading one that was changed could do anything (the index of the shards is a
pickle), so their hashes are always verified; those of the shards, which take as long as reading them, if asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from megatron_opdlm.checkpointing.harmless import file_inside
from megatron_opdlm.config.schema import Verification

MANIFEST = "manifest.json"
SHARD = ".distcp"
NUM_READERS = 8
"""Threads that hash files when a checkpoint is verified."""
_HEX = re.compile(r"[0-9a-f]{64}")


class FileRecord(NamedTuple):
    """A file as it must be."""

    size: int
    """Bytes."""
    sha256: str
    """Of its content, in lower-case hexadecimal digits."""


def write_manifest(folder: Path, written: Mapping[str, FileRecord]) -> None:
    """Lists all files of the folder in its manifest, which is on disk, like them, when this returns.

    Those in `written` were recorded as they were written; the others are read. OSError if one of the former is not
    there or has another size now, which is how a disk fails that does not say so.
    """
    for name, record in written.items():  # asked for by name: a shared file system may list late what other nodes wrote
        found = (folder / name).stat().st_size if (folder / name).is_file() else "no"
        if found != record.size:
            raise OSError(f"{folder / name} has {found} bytes instead of the {record.size} that were written")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} | written.keys()
    records = {name: written.get(name) or _record_of(folder / name) for name in sorted(files)}
    content = {
        "sizes": {name: record.size for name, record in records.items()},
        "sha256": {name: record.sha256 for name, record in records.items()},
    }
    (folder / MANIFEST).write_text(json.dumps(content, indent=2))
    for path in (folder / MANIFEST, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync(path)


def sync(path: Path) -> None:
    """Returns when the file's content, or the folder's list of names, would survive the loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _record_of(path: Path) -> FileRecord:
    sync(path)
    with path.open("rb") as file:
        return FileRecord(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder is a Megatron checkpoint of ours (as against a Hugging Face folder)."""
    return (folder / MANIFEST).is_file()


def check_complete(folder: Path, verify: Verification = "sizes", share: slice = slice(None)) -> None:
    """ValueError naming the first file that is missing, cannot be read, or is not what was written.

    `hashes` reads every file once; `sizes` leaves out the content of the shards. Of the files to be read those in
    `share` are, where several ranks part them.
    """
    if not is_checkpoint(folder):
        raise ValueError(f"{folder} is not a Megatron checkpoint: it has no {MANIFEST}")
    records = _read_manifest(folder)
    for name, record in records.items():
        _check_size(folder, name, record.size)
    hashed = [name for name in records if verify == "hashes" or not name.endswith(SHARD)]
    with ThreadPoolExecutor(max_workers=NUM_READERS) as threads:
        for _ in threads.map(lambda name: _check_hash(folder, name, records[name].sha256), hashed[share]):
            pass


def _check_size(folder: Path, name: str, expected: int) -> None:
    try:
        found = (folder / name).stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"checkpoint {folder} is incomplete: {name} is missing") from error
    except (OSError, ValueError) as error:  # ValueError: no file can have such a name
        raise ValueError(f"checkpoint {folder} is damaged: {name!r} cannot be read: {error}") from error
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"checkpoint {folder} is damaged: {name} is not a file")
    if found.st_size != expected:
        raise ValueError(f"checkpoint {folder} is damaged: {name} has {found.st_size} bytes instead of {expected}")


def _check_hash(folder: Path, name: str, expected: str) -> None:
    try:
        with (folder / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"checkpoint {folder} is damaged: {name} cannot be read: {error.strerror}") from error
    if found != expected:
        raise ValueError(f"checkpoint {folder} is damaged: {name} is not what was written (its SHA-256 differs)")


def _read_manifest(folder: Path) -> dict[str, FileRecord]:
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    sizes, hashes = (content.get(key) if isinstance(content, dict) else None for key in ("sizes", "sha256"))
    if not (isinstance(sizes, dict) and isinstance(hashes, dict) and sizes.keys() == hashes.keys()):
        raise ValueError(f"{path} is damaged: it must have the size and the SHA-256 of each file")
    for name in sizes:
        _check_record(path, name, sizes[name], hashes[name])
    return {name: FileRecord(sizes[name], hashes[name]) for name in sizes}


def _check_record(path: Path, name: str, size: Any, sha256: Any) -> None:
    try:
        file_inside(path.parent, name)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {name!r} lies outside the checkpoint") from error
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise ValueError(f"{path} is damaged: {size!r} is not the size of a file")
    if not isinstance(sha256, str) or not _HEX.fullmatch(sha256):
        raise ValueError(f"{path} is damaged: {sha256!r} is not a SHA-256")
