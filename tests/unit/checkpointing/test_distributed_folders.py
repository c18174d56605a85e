"""Checkpoint folders: whole or not there, the newest good one, retention. No tensors needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_opdlm.checkpointing import distributed


def make_folder(directory: Path, step: int) -> Path:
    folder = distributed.step_folder(directory, step)
    folder.mkdir(parents=True)
    (folder / "shard").write_bytes(b"12345")
    (folder / distributed.MANIFEST).write_text(json.dumps({"sizes": {"shard": 5}}))
    return folder


def test_the_newest_whole_checkpoint_is_taken(tmp_path):
    make_folder(tmp_path, 2)
    newest = make_folder(tmp_path, 10)
    assert distributed.newest_checkpoint(tmp_path) == newest


def test_a_truncated_checkpoint_falls_back_to_the_one_before_and_says_why(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(distributed.logger, "warning", lambda text, *values: warnings.append(text % values))
    good = make_folder(tmp_path, 2)
    (make_folder(tmp_path, 3) / "shard").write_bytes(b"123")
    assert distributed.newest_checkpoint(tmp_path) == good
    assert "shard has 3 bytes instead of 5; falling back" in warnings[0]


def test_a_folder_that_an_interrupted_save_left_is_no_checkpoint(tmp_path):
    folder = make_folder(tmp_path, 4)
    folder.rename(folder.with_name(folder.name + distributed.PARTIAL))
    assert distributed.newest_checkpoint(tmp_path) is None


def test_a_missing_file_is_named(tmp_path):
    folder = make_folder(tmp_path, 1)
    (folder / "shard").unlink()
    with pytest.raises(ValueError, match="is incomplete: shard is missing"):
        distributed.check_complete(folder)


def test_a_damaged_manifest_is_named(tmp_path):
    folder = make_folder(tmp_path, 1)
    (folder / distributed.MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        distributed.check_complete(folder)


def test_old_checkpoints_and_leftovers_are_removed_and_the_newest_kept(tmp_path):
    for step in (1, 2, 3):
        make_folder(tmp_path, step)
    (tmp_path / f"step_00000004{distributed.PARTIAL}").mkdir()
    distributed.remove_old_checkpoints(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]


def test_keep_zero_keeps_all(tmp_path):
    for step in (1, 2, 3):
        make_folder(tmp_path, step)
    distributed.remove_old_checkpoints(tmp_path, keep=0)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_damaged_checkpoint_of_a_later_step_does_not_push_out_a_good_one(tmp_path):
    (make_folder(tmp_path, 100) / "shard").write_bytes(b"1")
    good = make_folder(tmp_path, 50)
    distributed.remove_old_checkpoints(tmp_path, keep=1)
    assert distributed.newest_checkpoint(tmp_path) == good
