"""Checkpoint folders that are either whole or not there: their names, their manifest, and which of them are kept.

A folder is filled under another name and renamed when everything is in place, so what an interrupted run left behind
is never taken for a checkpoint. Its `manifest.json` has the size of every file, which finds what was cut off later.

    partial = begin_folder(step_folder(directory, 50))       # .../step_00000050.partial
    ...                                                      # write into it
    publish(partial)                                         # .../step_00000050
    newest_checkpoint(directory)
    point_to_best(directory, 50)                             # .../best -> step_00000050
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
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


def publish(partial: Path) -> None:
    """Lists the files of a filled folder in its manifest and gives it its name, in place of one that has it already."""
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(partial)): path.stat().st_size for path in files}
    (partial / MANIFEST).write_text(json.dumps({"sizes": sizes}, indent=2))
    folder = partial.with_name(partial.name.removesuffix(PARTIAL))
    if folder.exists():
        _remove(folder)
    partial.rename(folder)


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder is a Megatron checkpoint of ours (as against a Hugging Face folder)."""
    return (folder / MANIFEST).is_file()


def check_complete(folder: Path) -> None:
    """ValueError naming the first file that is missing or has not the size it was written with."""
    if not is_checkpoint(folder):
        raise ValueError(f"{folder} is not a Megatron checkpoint: it has no {MANIFEST}")
    for name, size in _sizes(folder).items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"checkpoint {folder} is incomplete: {name} is missing")
        if path.stat().st_size != size:
            raise ValueError(
                f"checkpoint {folder} is damaged: {name} has {path.stat().st_size} bytes instead of {size}"
            )


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

    The one that `best` points to stays. A damaged checkpoint counts for nothing and is left for people to look at. Not
    while a checkpoint is being written.
    """
    if keep:
        best = directory / BEST
        for folder in [folder for folder in _step_folders(directory) if is_whole(folder)][:-keep]:
            if not (best.is_symlink() and best.readlink().name == folder.name):
                _remove(folder)
    for partial in directory.glob(f"step_*{PARTIAL}"):
        shutil.rmtree(partial)


def _remove(folder: Path) -> None:
    """Renamed first: an interruption must not leave half a checkpoint under the name of a whole one."""
    leaving = folder.with_name(f"{folder.name}.old{PARTIAL}")
    shutil.rmtree(leaving, ignore_errors=True)
    folder.rename(leaving)
    shutil.rmtree(leaving)


def _sizes(folder: Path) -> dict[str, int]:
    try:
        return json.loads((folder / MANIFEST).read_text())["sizes"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged: {error}") from error


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
