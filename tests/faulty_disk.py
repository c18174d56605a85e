"""A disk that goes wrong at one operation of our choice, for tests of what is then left on it.

    disk = FaultyDisk(folder, Fault.FULL, at=7)
    with disk.in_place():                     # for this process: files below `folder` are written through it
        save_checkpoint(folder / "c", state, write_assets)
    disk.num_operations                       # that changed something, each of which can be the one that goes wrong

Operations are: a file is created or written to, synced, renamed; a folder is made.
"""

from __future__ import annotations

import builtins
import contextlib
import enum
import errno
import io
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch


class Fault(enum.Enum):
    """What goes wrong."""

    FAILS = "the operation fails, those after it do not"
    FULL = "half of what was to be written gets there, and nothing after it"
    KILLED = "the same, and the process comes to an end: nothing is cleared away"
    CUT = "half of what was to be written gets there, and nobody says so; an operation that writes nothing is as usual"


class Killed(BaseException):
    """Stands for the end of the process, which does nothing any more."""


class FaultyDisk:
    """Everything below `root`; the operation number `at`, from 0, goes wrong (-1: none does)."""

    def __init__(self, root: Path, fault: Fault = Fault.FAILS, at: int = -1) -> None:
        self.root, self.fault, self.at = root, fault, at
        self.num_operations = 0
        self.cut: Path | None = None
        """The file that lacks something, under `Fault.CUT`."""
        self._lock = threading.Lock()
        self._open, self._save, self._rmtree = io.open, torch.save, shutil.rmtree

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """All of this process writes through it while the block lasts."""
        with contextlib.ExitStack() as patches:
            for owner, name, stand_in in (
                (io, "open", self.open),
                (builtins, "open", self.open),
                (torch, "save", self.save),
                (shutil, "rmtree", self.rmtree),
                *((os, name, self._watched(getattr(os, name))) for name in ("rename", "replace", "mkdir")),
                (os, "fsync", self._watched(_fsync)),
            ):
                patches.enter_context(mock.patch.object(owner, name, stand_in))
            yield

    def operation(self, write: Callable[[float], Any], *, writes: bool) -> Any:
        """`write(share)` does the operation, or only the first `share` of it. `writes`: whether it takes up space."""
        with self._lock:
            number, self.num_operations = self.num_operations, self.num_operations + 1
        if self.at < 0 or number < self.at:
            return write(1.0)
        if number == self.at and self.fault is Fault.CUT:
            return write(0.5) if writes else write(1.0)
        if number == self.at and writes and self.fault in (Fault.FULL, Fault.KILLED):
            write(0.5)
        if self.fault is Fault.KILLED:
            raise Killed
        if number == self.at or (self.fault is Fault.FULL and writes):
            code = errno.EIO if self.fault is Fault.FAILS else errno.ENOSPC
            raise OSError(code, os.strerror(code))
        return write(1.0)

    def open(self, file: Any, mode: str = "r", *arguments: Any, **more: Any) -> Any:
        """Stands for `open`."""
        opened = lambda _=1.0: self._open(file, mode, *arguments, **more)  # noqa: E731
        if not set(mode) & set("wax") or isinstance(file, int) or self.root not in Path(file).absolute().parents:
            return opened()
        return _FaultyFile(self.operation(opened, writes=False), Path(file), self)

    def save(self, value: Any, file: Any, *arguments: Any, **more: Any) -> None:
        """Stands for `torch.save`, whose C++ opens files by itself."""
        if not isinstance(file, str | Path):
            return self._save(value, file, *arguments, **more)
        buffer = io.BytesIO()
        self._save(value, buffer, *arguments, **more)
        with self.open(file, "wb") as opened:
            opened.write(buffer.getvalue())

    def rmtree(self, *arguments: Any, **more: Any) -> None:
        """Stands for `shutil.rmtree`: a process that was killed clears nothing away."""
        is_dead = self.fault is Fault.KILLED and 0 <= self.at < self.num_operations
        if not is_dead:
            self._rmtree(*arguments, **more)

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        takes_space = function.__name__ == "mkdir"

        def write(share: float, *arguments: Any, **more: Any) -> Any:
            return function(*arguments, **more) if share == 1.0 else None

        return lambda *arguments, **more: self.operation(
            lambda share: write(share, *arguments, **more), writes=takes_space and self.fault is not Fault.CUT
        )


def _fsync(descriptor: int) -> None:
    """Power is not lost in these tests, and waiting for a real disk takes most of a save's time."""


class _FaultyFile:
    """A file whose writes are operations of the disk."""

    def __init__(self, file: Any, path: Path, disk: FaultyDisk) -> None:
        self._file, self._path, self._disk = file, path, disk

    def write(self, data: Any) -> int:
        whole = data if isinstance(data, str) else memoryview(data).cast("B")
        self._disk.operation(lambda share: self._put(whole, share), writes=True)
        return len(whole)

    def _put(self, whole: Any, share: float) -> None:
        if share < 1.0:
            self._disk.cut = self._path
        self._file.write(whole[: int(share * len(whole))])
        self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _FaultyFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
