"""Checkpoint folders that are either whole or not there: their names, their manifest, and which of them are kept.

A folder is filled under another name and renamed when everything is in place, so what an interrupted run left behind
is never taken for a checkpoint. Its manifest (see `manifest`) finds what was cut off or changed later.

    partial = begin_folder(step_folder(directory, 50))       # .../step_00000050.partial
    ...                                                      # write into it
    publish(partial)                                         # .../step_00000050
    newest_checkpoint(directory)
    point_to_best(directory, 50)                             # .../best -> step_00000050
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_opdlm.checkpointing.manifest import FileRecord, check_complete, sync, write_manifest
from megatron_opdlm.config.schema import Verification

logger = logging.getLogger(__name__)

ASSETS = "hf"
PARTIAL = ".partial"
BEST = "best"
_STEP_FOLDER = re.compile(r"step_(\d{8})")


def step_folder(directory: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a training step."""
    return directory / f"step_{step:08d}"


def partial_folder(folder: Path) -> Path:
    """Where the files of the checkpoint `folder` stand until all of them are written."""
    return folder.with_name(folder.name + PARTIAL)


def begin_folder(folder: Path) -> Path:
    """An empty folder to fill, in place of what an interrupted save left there."""
    partial = partial_folder(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def publish(partial: Path, written: Mapping[str, FileRecord] | None = None) -> None:
    """Lists the files of a filled folder in its manifest and gives it its name, in place of one that has it already.

    `written` are records of files made while they were written. OSError if the disk does not hold what was written.
    """
    write_manifest(partial, written or {})
    folder = partial.with_name(partial.name.removesuffix(PARTIAL))
    if folder.exists():
        _remove(folder)
    partial.rename(folder)
    sync(folder.parent)


def newest_checkpoint(directory: Path, verify: Verification = "sizes") -> Path | None:
    """The newest whole checkpoint of a run; what is newer and not whole is passed over with a warning that says why."""
    return first_sound(checkpoints(directory), lambda folder: check_complete(folder, verify))


def checkpoints(directory: Path) -> list[Path]:
    """Those of a run, damaged ones too, the newest first; with a warning about each that is not finished."""
    for partial in sorted(directory.glob(f"step_*[0-9]{PARTIAL}")):
        if not partial.with_name(partial.name.removesuffix(PARTIAL)).exists():
            logger.warning("%s is not finished and is passed over", partial)
    return _step_folders(directory)[::-1]


def first_sound(folders: list[Path], check: Callable[[Path], None]) -> Path | None:
    """The first of which `check` raises no ValueError; what that says of those before is a warning."""
    for folder in folders:
        try:
            check(folder)
        except ValueError as error:
            logger.warning("%s; falling back to the checkpoint before it", error)
        else:
            return folder
    return None


def point_to_best(directory: Path, step: int) -> None:
    """Lets `best` beside a run's checkpoints be the one of `step`: at every instant that or the one it was before."""
    best, partial = directory / BEST, directory / (BEST + PARTIAL)
    partial.unlink(missing_ok=True)
    partial.symlink_to(step_folder(directory, step).name)  # relative, so that a run can be moved
    if best.is_dir() and not best.is_symlink():
        _remove(best)  # a copy of the run has a folder there if its maker followed the link
    partial.replace(best)


def remove_old_checkpoints(directory: Path, keep: int) -> None:
    """Deletes all but the `keep` newest whole checkpoints of a run, and what interrupted saves left. 0 keeps all.

    The one that `best` points to stays. A damaged checkpoint counts for nothing and is left for people to look at. What
    cannot be deleted is left with a warning. Not while a checkpoint is being written.
    """
    best = directory / BEST
    try:
        if keep:
            for folder in [folder for folder in _step_folders(directory) if is_whole(folder)][:-keep]:
                if not (best.is_symlink() and best.readlink().name == folder.name):
                    _remove(folder)
        for partial in directory.glob(f"step_*{PARTIAL}"):
            shutil.rmtree(partial)
    except OSError as error:
        logger.warning("an old checkpoint stays: %s", error)


def _remove(folder: Path) -> None:
    """Renamed first: an interruption must not leave half a checkpoint under the name of a whole one."""
    leaving = folder.with_name(f"{folder.name}.old{PARTIAL}")
    shutil.rmtree(leaving, ignore_errors=True)
    folder.rename(leaving)
    shutil.rmtree(leaving)


def is_whole(folder: Path) -> bool:
    """Whether `check_complete` has nothing to say."""
    try:
        check_complete(folder)
    except ValueError:
        return False
    return True


def _step_folders(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if path.is_dir() and _STEP_FOLDER.fullmatch(path.name))
