"""Where the metrics of a step go: a JSONL file always, TensorBoard if wanted, nowhere on other ranks.

    writer = build_writers(config.logging, rank=0, resume_step=20)
    writer.write(20, {"train/loss": 0.5})           # {"step": 20, "train/loss": 0.5}
    writer.close()

A run goes on when a disk does not: a write that fails warns once.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from megatron_opdlm.config.schema import LoggingConfig
from megatron_opdlm.observability.collapse_watch import CollapseWatch

logger = logging.getLogger(__name__)


class Writer(Protocol):
    """Takes the metrics of one step at a time."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records `metrics` under `step`."""
        ...

    def close(self) -> None:
        """Ends the writing."""
        ...


def build_writers(config: LoggingConfig, rank: int, resume_step: int) -> Writer:
    """The writer of this rank. `resume_step` is the first step that will be written; older records of later steps go.

    ValueError if the run directory cannot be written or TensorBoard is wanted and missing.
    """
    if rank != 0:
        return NullWriter()
    directory = Path(config.directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        writers: list[Writer] = [JsonlWriter(directory / "metrics.jsonl", resume_step)]
        writers.append(CollapseWatch(read_records(directory / "metrics.jsonl")))
        if config.tensorboard:
            writers.append(TensorBoardWriter(directory / "tensorboard", resume_step))
    except OSError as error:
        raise ValueError(f"logging.directory ({directory}) cannot be written: {error}") from error
    return SafeWriters(writers)


class NullWriter:
    """Writes nothing, so that callers need not ask for their rank."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class SafeWriters:
    """Several writers as one. One that fails warns the first time and is tried again at the next step."""

    def __init__(self, writers: list[Writer]) -> None:
        self._writers = writers
        self._failed: set[Writer] = set()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Gives the metrics to every writer."""
        for writer in self._writers:
            try:
                writer.write(step, metrics)
            except OSError as error:
                self._warn_once(writer, error)

    def close(self) -> None:
        """Closes every writer."""
        for writer in self._writers:
            try:
                writer.close()
            except OSError as error:
                self._warn_once(writer, error)

    def _warn_once(self, writer: Writer, error: OSError) -> None:
        if writer not in self._failed:
            self._failed.add(writer)
            logger.warning("%s failed, metrics may be missing there: %s", type(writer).__name__, error)


class JsonlWriter:
    """One JSON object per step, on disk when `write` returns. A number that is not finite is written as null."""

    def __init__(self, path: str | os.PathLike, resume_step: int = 0) -> None:
        self._path = Path(path)
        keep_records_before(self._path, resume_step)
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends `{"step": step, **metrics}`."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoardWriter:
    """TensorBoard event files; events of `resume_step` and later, left by an interrupted run, are hidden."""

    def __init__(self, directory: str | os.PathLike, resume_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "logging.tensorboard (true) needs the package tensorboard: pip install tensorboard, or set it to false"
            ) from error
        self._writer = SummaryWriter(str(directory), purge_step=resume_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds one scalar per metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


def read_records(path: str | os.PathLike) -> list[dict]:
    """The records of a metrics file, in order. A line that is not whole (the run was killed in it) is left out."""
    records = []
    for line in Path(path).read_text(encoding="utf-8").split("\n"):  # a text may have U+2028, where `splitlines` cuts
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records


def keep_records_before(path: Path, step: int) -> None:
    """Drops the records of `step` and later from a file of them, if there is one.

    The file is replaced whole, so a crash cannot lose the others.
    """
    if path.exists():
        kept = [record for record in read_records(path) if record["step"] < step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        partial.replace(path)
