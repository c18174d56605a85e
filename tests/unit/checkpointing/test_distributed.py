"""Saves of a small sharded state: what stands in the file, when it stands there, and what happens to a damaged one."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_opdlm.checkpointing import distributed
from megatron_opdlm.checkpointing.distributed import BackgroundSaves, load_checkpoint, read_tensor, save_checkpoint
from megatron_opdlm.checkpointing.folders import newest_checkpoint, publish, step_folder
from megatron_opdlm.checkpointing.manifest import check_complete

WEIGHT, MOMENT = torch.arange(6.0).view(2, 3), torch.tensor([0.5, -1.0])
pytestmark = pytest.mark.usefixtures("world_of_one")


def state_of(weight: torch.Tensor, moment: torch.Tensor) -> dict:
    """One tensor as the model holds it, and one that is part of a larger buffer, as the optimizer holds it."""
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

    tensors = {key: ShardedTensor.from_rank_offsets(key, data) for key, data in (("w", weight), ("m", moment))}
    return tensors | {"o": ShardedObject("o", [weight], (1,), (0,)), "step": 7}


def live_state() -> tuple[dict, list[torch.Tensor]]:
    """The state, and the tensors that training changes in place."""
    weight, buffer = WEIGHT.clone(), torch.cat([torch.zeros(3), MOMENT])
    return state_of(weight, buffer[3:]), [weight, buffer]


def write_assets(folder: Path) -> None:
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text("{}")


def loaded(folder: Path) -> dict:
    return load_checkpoint(folder, state_of(torch.zeros(2, 3), torch.zeros(2)))


def hold(saves: BackgroundSaves) -> threading.Event:
    """The writing thread waits for this event before it takes anything else."""
    gate = threading.Event()
    saves._thread.submit(gate.wait)
    return gate


def assert_holds_the_state(folder: Path) -> None:
    state = loaded(folder)
    assert state["w"].equal(WEIGHT) and state["m"].equal(MOMENT) and state["o"][0].equal(WEIGHT) and state["step"] == 7


def test_a_save_is_whole_when_it_returns(tmp_path):
    save_checkpoint(tmp_path / "c", live_state()[0], write_assets)
    check_complete(tmp_path / "c")
    assert_holds_the_state(tmp_path / "c")
    assert read_tensor(tmp_path / "c", "w", None).equal(WEIGHT) and read_tensor(tmp_path / "c", "w", 1).equal(WEIGHT[1])


def test_a_background_save_writes_the_state_at_the_call_whatever_training_does_to_it_after(tmp_path):
    state, tensors = live_state()
    with BackgroundSaves() as saves:
        gate = hold(saves)
        saves.save(tmp_path / "c", state, write_assets)
        for tensor in tensors:
            tensor.add_(100.0)
        gate.set()
    assert_holds_the_state(tmp_path / "c")


def test_a_background_save_is_no_checkpoint_until_it_is_written(tmp_path):
    with BackgroundSaves() as saves:
        gate = hold(saves)
        saves.save(step_folder(tmp_path, 1), live_state()[0], write_assets)
        assert newest_checkpoint(tmp_path) is None
        assert [path.name for path in tmp_path.iterdir()] == ["step_00000001.partial"]
        gate.set()
        saves.wait()
        assert newest_checkpoint(tmp_path) == step_folder(tmp_path, 1)


def test_a_save_under_way_shows_signs_of_life_until_it_is_written(tmp_path):
    with BackgroundSaves() as saves:
        gate = hold(saves)
        assert saves.sign_of_life() is None
        saves.save(tmp_path / "c", live_state()[0], write_assets)
        threading.Timer(0.1, gate.set).start()
        signs = [saves.sign_of_life()]
        with mock.patch.object(saves._pending, "result", lambda: signs.append(saves.sign_of_life())):
            saves.wait()  # during which the watchdog asks, too
        assert None not in signs and signs[0] < signs[1]
        gate.set()
    assert saves.sign_of_life() is None


def test_both_ways_of_saving_write_the_same_folder(tmp_path):
    save_checkpoint(tmp_path / "at once", live_state()[0], write_assets)
    with BackgroundSaves() as saves:
        saves.save(tmp_path / "beside", live_state()[0], write_assets)
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text())["sizes"] for name in ("at once", "beside")]
    for sizes in manifests:
        assert sizes.pop(".metadata") > 0  # its length varies with the random name of the save that it holds
    assert manifests[0] == manifests[1] and "hf/config.json" in manifests[0]


def test_a_second_save_waits_for_the_first(tmp_path):
    order = []
    with BackgroundSaves() as saves:
        gate = hold(saves)
        saves.save(tmp_path / "1", live_state()[0], write_assets, lambda: order.append("first published"))
        threading.Timer(0.1, gate.set).start()
        saves.save(tmp_path / "2", live_state()[0], lambda folder: order.append("second begun"))
    assert order == ["first published", "second begun"]


def test_what_comes_after_publication_sees_the_published_folder(tmp_path):
    seen = []
    with BackgroundSaves() as saves:
        saves.save(tmp_path / "c", live_state()[0], write_assets, lambda: seen.append(check_complete(tmp_path / "c")))
    assert seen == [None]


def test_a_save_that_fails_leaves_no_checkpoint_and_says_so_once(tmp_path):
    saves = BackgroundSaves()
    gate = hold(saves)
    saves.save(tmp_path / "c", live_state()[0], write_assets)
    shutil.rmtree(tmp_path / "c.partial")
    (tmp_path / "c.partial").write_text("in the way of the files")
    gate.set()
    with pytest.raises(ValueError, match=r"checkpoint \S*/c could not be written: rank 0: \S+ .*c\.partial"):
        saves.wait()
    saves.wait()
    assert not (tmp_path / "c").exists()


def test_training_that_fails_still_ends_the_save_that_was_begun(tmp_path):
    with pytest.raises(ZeroDivisionError), BackgroundSaves() as saves:
        gate = hold(saves)
        saves.save(tmp_path / "c", live_state()[0], write_assets)
        threading.Timer(0.1, gate.set).start()
        raise ZeroDivisionError
    assert_holds_the_state(tmp_path / "c")


@pytest.fixture(scope="module")
def run(tmp_path_factory, world_of_one) -> Path:
    """A folder with two checkpoints."""
    directory = tmp_path_factory.mktemp("run")
    for step in (1, 2):
        save_checkpoint(step_folder(directory, step), live_state()[0], write_assets)
    return directory


def names_of_files(run: Path) -> list[str]:
    """All files of the newer checkpoint. Small values lie in common.pt, or from Megatron-Core 0.19 on in a .distcp."""
    folder = step_folder(run, 2)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def assert_the_one_before_is_taken_without(run: Path, name: str, damage: Callable[[Path], object]) -> None:
    """While `damage` is done to this file of the newer checkpoint; afterwards it is as before."""
    path = step_folder(run, 2) / name
    whole = path.read_bytes()
    damage(path)
    try:
        with pytest.raises(ValueError, match=rf"step_00000002.*{name}"):
            load_checkpoint(step_folder(run, 2), {})
        assert newest_checkpoint(run) == step_folder(run, 1)
    finally:
        path.write_bytes(whole)
    assert newest_checkpoint(run) == step_folder(run, 2)


def test_a_checkpoint_has_the_files_of_two_writers_their_index_assets_and_a_manifest(run):
    files = {"__0_0.distcp", "__0_1.distcp", ".metadata", "metadata.json", "hf/config.json", "manifest.json"}
    assert set(names_of_files(run)) - {"common.pt"} == files


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), where=st.floats(0, 1, exclude_max=True))
def test_a_checkpoint_cut_off_at_any_byte_is_refused_by_the_files_name_and_the_one_before_is_taken(run, data, where):
    name = data.draw(st.sampled_from(names_of_files(run)))
    assert_the_one_before_is_taken_without(
        run, name, lambda path: path.write_bytes(path.read_bytes()[: int(where * path.stat().st_size)])
    )


def test_a_checkpoint_without_one_of_its_files_is_refused_by_the_files_name_and_the_one_before_is_taken(run):
    for name in names_of_files(run):
        assert_the_one_before_is_taken_without(run, name, Path.unlink)


def test_a_checkpoint_of_a_later_megatron_core_is_refused_as_such(run, tmp_path, monkeypatch):
    newer = shutil.copytree(step_folder(run, 2), tmp_path / "newer.partial")
    for name in ("common.pt", "manifest.json"):
        (newer / name).unlink(missing_ok=True)
    publish(newer)
    monkeypatch.setattr(distributed, "megatron_version", "0.18.2")
    with pytest.raises(ValueError, match=r"newer was written under .* 0\.19 or later, which 0\.18\.2 cannot"):
        load_checkpoint(tmp_path / "newer", {})
