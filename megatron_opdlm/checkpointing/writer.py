"""The writer of a checkpoint's shards: PyTorch's, which also records what it writes and publishes the folder.

    writer = PublishingWriter(partial_folder(folder), on_published=lambda: None)
    torch.distributed.checkpoint.save(tensors, storage_writer=writer, planner=planner)

Every byte is hashed on its way to the disk. PyTorch writes with several threads, and loses an error of any but the
first: the file of a thread that met a full disk would be missing from the index, and nobody would hear of it. So errors
are kept here too, and raised when the threads are through.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.distributed.checkpoint import FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_opdlm.checkpointing.folders import publish
from megatron_opdlm.checkpointing.manifest import FileRecord

NUM_WRITERS = 2
"""Threads, and files, of a rank."""


class PublishingWriter(FileSystemWriter):
    """Publishes the folder where PyTorch writes the index, which is after the last file of the slowest rank.

    PyTorch calls `finish` on the first rank only, with the others waiting, and raises on all of them what it raises.
    """

    def __init__(self, partial: Path, on_published: Callable[[], None]) -> None:
        super().__init__(partial, thread_count=NUM_WRITERS)
        self.fs = _RecordingFileSystem()
        self.partial, self.on_published = partial, on_published

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list]:
        """Writes this rank's files; the last of the results is what has to stand in the manifest about them."""
        results: list[WriteResult] = super().write_data(plan, planner).value()
        if self.fs.errors:
            raise self.fs.errors[0]
        assert len(results) == len(plan.items), "each item is written"
        with_records: Future[list] = Future()
        with_records.set_result([*results, self.fs.records])
        return with_records

    def finish(self, metadata: Metadata, results: list[list]) -> None:
        """Writes the index and publishes the folder."""
        for results_of_rank in results:
            self.fs.records |= results_of_rank.pop()
        super().finish(metadata, results)
        publish(self.partial, self.fs.records)
        self.on_published()


class _RecordingFileSystem(FileSystem):
    """Knows of the files written through it what was meant to be in them, and what went wrong."""

    def __init__(self) -> None:
        self.records: dict[str, FileRecord] = {}
        self.errors: list[BaseException] = []

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        """Opens a file to write."""
        assert mode == "wb", "a writer does not read"
        stream = None
        try:
            with super().create_stream(path, mode) as file:
                stream = _HashingStream(file)
                yield stream
        except BaseException as error:
            reason = stream.error if stream is not None and stream.error is not None else error
            self.errors.append(reason)
            raise reason from None
        self.records[Path(path).name] = stream.record()

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        """Gives a file its name."""
        super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


class _HashingStream(io.IOBase):
    """A file being written from its beginning to its end."""

    def __init__(self, file: io.IOBase) -> None:
        self._file, self._hash, self._size = file, hashlib.sha256(), 0
        self.error: OSError | None = None
        """Why a write failed; `torch.save` says only that it did not get on."""

    def write(self, data: bytes | memoryview) -> int:
        self._hash.update(data)
        self._size += memoryview(data).nbytes
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def tell(self) -> int:
        return self._file.tell()

    def fileno(self) -> int:
        return self._file.fileno()

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def close(self) -> None:
        self._file.close()

    def record(self) -> FileRecord:
        return FileRecord(self._size, self._hash.hexdigest())
