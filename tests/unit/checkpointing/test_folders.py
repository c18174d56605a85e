"""Checkpoint folders: whole or not there, the newest good one, retention. No tensors needed."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest

from megatron_opdlm.checkpointing import folders


def make_folder(directory: Path, step: int) -> Path:
    """As a save leaves it."""
    folder = folders.step_folder(directory, step)
    partial = folders.begin_folder(folder)
    (partial / "shard").write_bytes(b"12345")
    (partial / "hf").mkdir()
    (partial / "hf" / "config.json").write_text("{}")
    folders.publish(partial)
    return folder


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_published_folder_lists_size_and_hash_of_every_file(tmp_path):
    folder = make_folder(tmp_path, 2)
    hashes = {name: sha256(content).hexdigest() for name, content in (("hf/config.json", b"{}"), ("shard", b"12345"))}
    expected = {"sizes": {"hf/config.json": 2, "shard": 5}, "sha256": hashes}
    assert json.loads((folder / "manifest.json").read_text()) == expected
    assert names(tmp_path) == ["step_00000002"]


def test_a_folder_is_no_checkpoint_before_it_is_published(tmp_path):
    partial = folders.begin_folder(folders.step_folder(tmp_path, 4))
    (partial / "shard").write_bytes(b"12345")
    assert folders.newest_checkpoint(tmp_path) is None
    folders.publish(partial)
    assert folders.newest_checkpoint(tmp_path) == tmp_path / "step_00000004"


def test_what_an_interrupted_save_left_does_not_get_into_the_next_one(tmp_path):
    partial = folders.begin_folder(folders.step_folder(tmp_path, 4))
    (partial / "shard of another layout").write_bytes(b"1")
    folder = make_folder(tmp_path, 4)
    assert not (folder / "shard of another layout").exists()


def test_a_folder_that_is_there_already_is_replaced(tmp_path):
    folder = make_folder(tmp_path, 4)
    (folder / "more").write_bytes(b"1")
    make_folder(tmp_path, 4)
    assert not (folder / "more").exists() and names(tmp_path) == ["step_00000004"]


def test_the_newest_whole_checkpoint_is_taken(tmp_path):
    make_folder(tmp_path, 2)
    newest = make_folder(tmp_path, 10)
    assert folders.newest_checkpoint(tmp_path) == newest


def test_a_truncated_checkpoint_falls_back_to_the_one_before_and_says_why(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(folders.logger, "warning", lambda text, *values: warnings.append(text % values))
    good = make_folder(tmp_path, 2)
    (make_folder(tmp_path, 3) / "shard").write_bytes(b"123")
    assert folders.newest_checkpoint(tmp_path) == good
    assert "shard has 3 bytes instead of 5; falling back" in warnings[0]


def test_a_missing_file_is_named(tmp_path):
    folder = make_folder(tmp_path, 1)
    (folder / "shard").unlink()
    with pytest.raises(ValueError, match="is incomplete: shard is missing"):
        folders.check_complete(folder)


@pytest.mark.parametrize("text", [b"{", b"", b"[]", b"{}", b"\xff"])
def test_a_damaged_manifest_is_named(tmp_path, text):
    folder = make_folder(tmp_path, 1)
    (folder / "manifest.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        folders.check_complete(folder)


def test_old_checkpoints_and_leftovers_are_removed_and_the_newest_kept(tmp_path):
    for step in (1, 2, 3):
        make_folder(tmp_path, step)
    folders.begin_folder(folders.step_folder(tmp_path, 4))
    folders.remove_old_checkpoints(tmp_path, keep=2)
    assert names(tmp_path) == ["step_00000002", "step_00000003"]


def test_keep_zero_keeps_all(tmp_path):
    for step in (1, 2, 3):
        make_folder(tmp_path, step)
    folders.remove_old_checkpoints(tmp_path, keep=0)
    assert len(names(tmp_path)) == 3


def test_a_damaged_checkpoint_of_a_later_step_does_not_push_out_a_good_one(tmp_path):
    (make_folder(tmp_path, 100) / "shard").write_bytes(b"1")
    good = make_folder(tmp_path, 50)
    folders.remove_old_checkpoints(tmp_path, keep=1)
    assert folders.newest_checkpoint(tmp_path) == good


def test_an_interrupted_removal_leaves_no_half_checkpoint_under_a_good_name(tmp_path, monkeypatch):
    def interrupted(folder, **_):
        if folder.exists():
            (folder / "shard").unlink()
            raise KeyboardInterrupt

    for step in (1, 2):
        make_folder(tmp_path, step)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", interrupted)
        folders.remove_old_checkpoints(tmp_path, keep=1)
    assert names(tmp_path) == ["step_00000001.old.partial", "step_00000002"]
    folders.remove_old_checkpoints(tmp_path, keep=1)
    assert names(tmp_path) == ["step_00000002"]


def test_the_best_checkpoint_is_a_name_for_a_step_that_retention_leaves_alone(tmp_path):
    for step in (1, 2, 3, 4):
        make_folder(tmp_path, step)
    folders.point_to_best(tmp_path, 1)
    folders.remove_old_checkpoints(tmp_path, keep=2)
    assert names(tmp_path) == ["best", "step_00000001", "step_00000003", "step_00000004"]
    assert json.loads((tmp_path / "best" / "manifest.json").read_text())["sizes"]["shard"] == 5
    folders.point_to_best(tmp_path, 4)
    folders.remove_old_checkpoints(tmp_path, keep=1)
    assert names(tmp_path) == ["best", "step_00000004"]
    assert folders.newest_checkpoint(tmp_path) == tmp_path / "step_00000004"


@pytest.mark.parametrize("operation", ["unlink", "symlink_to", "replace"])
def test_an_interruption_leaves_the_best_checkpoint_at_the_one_before(tmp_path, monkeypatch, operation):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for step in (1, 2):
        make_folder(tmp_path, step)
    folders.point_to_best(tmp_path, 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, operation, interrupted)
        folders.point_to_best(tmp_path, 2)
    assert (tmp_path / "best").resolve() == tmp_path / "step_00000001"
    folders.point_to_best(tmp_path, 2)
    assert (tmp_path / "best").resolve() == tmp_path / "step_00000002"
    assert names(tmp_path) == ["best", "step_00000001", "step_00000002"]


def test_a_run_can_be_moved_or_copied_with_its_best_checkpoint(tmp_path):
    for step in (1, 2):
        make_folder(tmp_path / "run", step)
    folders.point_to_best(tmp_path / "run", 1)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    folders.check_complete(moved / "best")
    copied = shutil.copytree(moved, tmp_path / "copied")  # follows links: `best` is a folder of its own there
    assert not (copied / "best").is_symlink()
    folders.point_to_best(copied, 2)
    assert (copied / "best").resolve() == copied / "step_00000002"
