"""What ranks agree on before they load: which checkpoint is the newest sound one, and that each of them can read it."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch

from megatron_opdlm.checkpointing import folders
from tests.ranks import run_on_ranks

MANIFEST_CHECK = "megatron_opdlm.checkpointing.distributed.check_complete"


def state() -> dict:
    from megatron.core.dist_checkpointing import ShardedTensor

    return {"weight": ShardedTensor.from_rank_offsets("weight", torch.ones(4), replica_id=torch.distributed.get_rank())}


def load_where_a_rank_is_blind(rank: int, folder: Path, blind_rank: int) -> str:
    from megatron_opdlm.checkpointing.distributed import load_checkpoint, save_checkpoint

    save_checkpoint(folder, state(), lambda partial: None)
    cannot = ValueError("its disk is gone") if rank == blind_rank else None
    with mock.patch(MANIFEST_CHECK, side_effect=cannot):
        try:
            load_checkpoint(folder, state())
        except ValueError as error:
            return str(error)
    return "loaded"


def test_what_one_rank_cannot_read_no_rank_loads(tmp_path):
    reason = "rank 1: its disk is gone"
    assert run_on_ranks(load_where_a_rank_is_blind, 2, tmp_path / "c", 1, time_limit=100) == [reason, reason]


def find_newest(rank: int, directory: Path) -> tuple[Path | None, list[Path]]:
    """The checkpoint found, and the files that this rank has hashed."""
    from megatron_opdlm.checkpointing import manifest
    from megatron_opdlm.checkpointing.train_state import newest_sound_checkpoint

    hashed, check = [], manifest._check_hash
    with mock.patch.object(manifest, "_check_hash", lambda *file: (hashed.append(file[0] / file[1]), check(*file))):
        return newest_sound_checkpoint(directory, "hashes"), sorted(hashed)


def test_ranks_share_the_hashing_and_fall_back_together(tmp_path):
    for step in (1, 2):
        partial = folders.begin_folder(folders.step_folder(tmp_path, step))
        for name in "abcd":
            (partial / f"{name}.distcp").write_bytes(name.encode())
        folders.publish(partial)
    (tmp_path / "step_00000002" / "d.distcp").write_bytes(b"?")  # a file of the second rank's share
    (first, of_first), (second, of_second) = run_on_ranks(find_newest, 2, tmp_path)
    assert first == second == tmp_path / "step_00000001"
    files = [tmp_path / f"step_0000000{step}" / f"{name}.distcp" for step in (1, 2) for name in "abcd"]
    assert (of_first, of_second) == (files[0::2], files[1::2])


def save_on_a_full_disk(rank: int, folder: Path) -> str:
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy

    from megatron_opdlm.checkpointing.distributed import save_checkpoint

    full = OSError("No space left on device") if rank == 0 else None
    with mock.patch.object(TorchCommonSaveStrategy, "save_common", side_effect=full):
        try:
            save_checkpoint(folder, state(), lambda partial: None)
        except ValueError as error:
            return str(error)
    return "saved"


def test_all_ranks_hear_of_a_disk_that_is_full_before_the_first_shard(tmp_path):
    first, second = run_on_ranks(save_on_a_full_disk, 2, tmp_path / "c", time_limit=100)
    assert first == second and "could not be written: No space left on device" in first
    assert not list(tmp_path.iterdir())
