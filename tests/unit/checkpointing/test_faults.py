"""A save in which any one operation of the disk goes wrong: the newest good checkpoint is found, the reason said."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from megatron_opdlm.checkpointing.distributed import load_checkpoint, save_checkpoint
from megatron_opdlm.checkpointing.folders import newest_checkpoint, step_folder
from megatron_opdlm.checkpointing.hf_folder import copy_assets
from megatron_opdlm.config.load import save_config
from megatron_opdlm.config.schema import Config
from tests.faulty_disk import Fault, FaultyDisk, Killed

pytestmark = [
    pytest.mark.usefixtures("world_of_one"),
    # PyTorch's second writing thread ends with the error that the first one then reports
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]
SEVERAL_WRITES = 2
"""Tensors, one for each writing thread."""
SOMETIMES = 10
"""Each so manieth fault is followed by another save, which must be good."""


def state_of(step: int) -> dict:
    """As after `step` training steps."""
    from megatron.core.dist_checkpointing import ShardedTensor

    tensors = {f"t{index}": torch.full((4,), float(10 * step + index)) for index in range(SEVERAL_WRITES)}
    return {key: ShardedTensor.from_rank_offsets(key, data) for key, data in tensors.items()} | {"step": step}


def save(directory: Path, step: int) -> None:
    def write_assets(partial: Path) -> None:
        copy_assets(directory / "model", partial / "hf")
        save_config(Config(), partial / "config.yaml")

    save_checkpoint(step_folder(directory, step), state_of(step), write_assets)


def saved_steps(directory: Path) -> list[str]:
    return sorted(path.name.removeprefix("step_0000000") for path in directory.glob("step_*"))


def assert_newest(directory: Path, steps: tuple[int, ...]) -> int:
    """The newest good checkpoint is one of these steps', and holds that step's state, every bit of it."""
    newest = newest_checkpoint(directory, "hashes")
    assert newest in [step_folder(directory, step) for step in steps]
    loaded = load_checkpoint(newest, state_of(0))
    step = loaded.pop("step")
    assert newest == step_folder(directory, step)
    for index in range(SEVERAL_WRITES):
        assert loaded[f"t{index}"].tolist() == [10.0 * step + index] * 4
    return step


@pytest.fixture
def directory(tmp_path) -> Path:
    """Of a run with one checkpoint."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen3"}')
    save(tmp_path, 1)
    return tmp_path


def num_operations(directory: Path) -> int:
    """Of a save of step 2 in which nothing goes wrong; it is gone again afterwards."""
    disk = FaultyDisk(directory)
    assert save_through(disk, directory) is None and assert_newest(directory, (2,)) == 2
    shutil.rmtree(step_folder(directory, 2))
    return disk.num_operations


def save_through(disk: FaultyDisk, directory: Path) -> str | None:
    """What a save of step 2 through this disk says if it fails."""
    with disk.in_place():
        try:
            save(directory, 2)
        except (ValueError, Killed) as error:
            return str(error)
    return None


def assert_the_next_save_is_good(directory: Path) -> None:
    save(directory, 2)
    assert assert_newest(directory, (2,)) and saved_steps(directory) == ["1", "2"]


def test_a_save_is_more_than_thirty_operations_that_can_go_wrong(directory):
    assert num_operations(directory) > 30


@pytest.mark.parametrize("fault", [Fault.FAILS, Fault.FULL])
def test_whichever_operation_fails_there_is_nothing_of_the_checkpoint_and_the_reason_is_said(directory, fault):
    reason = "Input/output error" if fault is Fault.FAILS else "No space left on device"
    for at in range(num_operations(directory)):
        said = save_through(FaultyDisk(directory, fault, at), directory)
        step = assert_newest(directory, (1, 2))
        if step == 1:
            assert re.search(rf"checkpoint \S+step_00000002 could not be written: .*{reason}", said or ""), (at, said)
        assert saved_steps(directory) == ["1", "2"][:step], at
        if at % SOMETIMES == 0:
            assert_the_next_save_is_good(directory)
        shutil.rmtree(step_folder(directory, 2), ignore_errors=True)


def test_whichever_operation_a_kill_meets_the_newest_good_checkpoint_is_found_and_what_is_left_is_named(
    directory, caplog
):
    steps = []
    for at in range(num_operations(directory)):
        caplog.clear()
        save_through(FaultyDisk(directory, Fault.KILLED, at), directory)
        steps.append(assert_newest(directory, (1, 2)))
        if (directory / "step_00000002.partial").exists():
            assert "step_00000002.partial is not finished" in caplog.text
        if at % SOMETIMES == 0:
            assert_the_next_save_is_good(directory)
        shutil.rmtree(step_folder(directory, 2), ignore_errors=True)
    assert steps == sorted(steps) and set(steps) == {1, 2}, "once a checkpoint has its name nothing takes it away"


def test_a_shard_or_index_that_the_disk_cuts_without_a_word_is_found_before_the_checkpoint_has_its_name(directory):
    files = set()
    for at in range(num_operations(directory)):
        disk = FaultyDisk(directory, Fault.CUT, at)
        said = save_through(disk, directory)
        name = disk.cut.name if disk.cut else ""
        if name.endswith((".distcp", ".metadata.tmp")):
            assert said and name.removesuffix(".tmp") in said and "bytes instead of" in said
            assert_newest(directory, (1,))
            files.add(name)
        shutil.rmtree(step_folder(directory, 2), ignore_errors=True)
    assert files == {"__0_0.distcp", "__0_1.distcp", ".metadata.tmp"}
