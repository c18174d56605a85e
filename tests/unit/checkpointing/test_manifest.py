"""Manifests: what a changed, cut or strange one makes of a checkpoint. A ValueError that names it, and nothing else."""

from __future__ import annotations

import json
import os
import tempfile
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opdlm.checkpointing import folders
from megatron_opdlm.checkpointing.manifest import FileRecord, check_complete, write_manifest

FILES = {"__0_0.distcp": b"weights", "common.pt": b"small values", "hf/config.json": b"{}"}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=20), inner, max_size=3),
    max_leaves=8,
)


def make_folder(folder: Path) -> Path:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_manifest(folder, {})
    return folder


def edit(folder: Path, **values: object) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(content | values))


@pytest.fixture(scope="module")
def fuzzed() -> Path:
    with tempfile.TemporaryDirectory() as folder:
        yield make_folder(Path(folder) / "step_00000001")


def assert_refused_or_whole(folder: Path) -> None:
    """Whatever is in the manifest: what is taken for whole has in it only files that are there."""
    try:
        check_complete(folder, "hashes")
    except ValueError as error:
        assert str(folder) in str(error) and ("damaged" in str(error) or "incomplete" in str(error))
    else:
        listed = json.loads((folder / "manifest.json").read_text())["sha256"]
        assert listed.items() <= {name: sha256(content).hexdigest() for name, content in FILES.items()}.items()


@settings(max_examples=200)
@given(content=st.binary(max_size=80))
def test_any_bytes_for_a_manifest_are_refused(fuzzed, content):
    (fuzzed / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        check_complete(fuzzed)


@settings(max_examples=200)
@given(content=JSON | st.fixed_dictionaries({"sizes": JSON, "sha256": JSON}))
def test_any_json_for_a_manifest_is_refused_or_describes_what_is_there(fuzzed, content):
    (fuzzed / "manifest.json").write_text(json.dumps(content))
    assert_refused_or_whole(fuzzed)


@settings(max_examples=200)
@given(name=st.text() | st.sampled_from(["hf", ".", "", "a\0b", "x" * 300, "\ud800", "common.pt/x", *FILES]))
def test_any_name_of_a_file_is_refused_or_is_that_of_a_file_which_is_there(fuzzed, name):
    content = {"sizes": {name: 7}, "sha256": {name: sha256(b"weights").hexdigest()}}
    (fuzzed / "manifest.json").write_text(json.dumps(content))
    assert_refused_or_whole(fuzzed)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, '{"sizes": NaN, "sha256": Infinity}'])
def test_json_that_a_parser_cannot_bear_is_refused(tmp_path, text):
    make_folder(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        check_complete(tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "hf/../../secret"])
def test_a_name_that_leads_out_of_the_folder_is_refused_unread(tmp_path, name):
    folder = make_folder(tmp_path / "c")
    (tmp_path / "secret").write_bytes(b"weights")
    edit(folder, sizes={name: 7}, sha256={name: sha256(b"weights").hexdigest()})
    with pytest.raises(ValueError, match="lies outside the checkpoint"):
        check_complete(folder, "hashes")


@pytest.mark.parametrize("size", [-1, 7.0, "7", True, None, [7]])
def test_a_size_that_is_none_is_refused(tmp_path, size):
    edit(make_folder(tmp_path), sizes=dict.fromkeys(FILES, size))
    with pytest.raises(ValueError, match="is not the size of a file"):
        check_complete(tmp_path)


def test_a_changed_byte_of_a_shard_is_found_by_the_hashes_and_one_of_any_other_file_always(tmp_path):
    for name, content in FILES.items():
        folder = make_folder(tmp_path / name)
        (folder / name).write_bytes(content[:-1] + b"!")
        with pytest.raises(ValueError, match=rf"{name} is not what was written"):
            check_complete(folder, "hashes")
        if name.endswith(".distcp"):
            check_complete(folder, "sizes")
        else:
            with pytest.raises(ValueError, match=rf"{name} is not what was written"):
                check_complete(folder, "sizes")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    folder = make_folder(tmp_path)
    shard = folder / "__0_0.distcp"
    shard.unlink()
    shard.mkdir()
    with pytest.raises(ValueError, match=r"__0_0\.distcp is not a file"):
        check_complete(folder)
    shard.rmdir()
    os.mkfifo(shard)  # opening it would wait for ever
    with pytest.raises(ValueError, match=r"__0_0\.distcp is not a file"):
        check_complete(folder, "hashes")


def test_an_error_of_the_disk_while_a_shard_is_hashed_is_a_damaged_checkpoint(tmp_path, monkeypatch):
    folder = make_folder(tmp_path)
    path_open = Path.open

    def unreadable(path: Path, *arguments, **more):
        if path.name == "__0_0.distcp":
            raise OSError(5, "Input/output error")
        return path_open(path, *arguments, **more)

    monkeypatch.setattr(Path, "open", unreadable)
    with pytest.raises(ValueError, match=r"__0_0\.distcp cannot be read: Input/output error"):
        check_complete(folder, "hashes")


def test_what_was_recorded_while_it_was_written_must_be_there(tmp_path):
    folder = make_folder(tmp_path)
    for record in (FileRecord(8, "0" * 64), FileRecord(6, "0" * 64)):
        with pytest.raises(OSError, match=f"has 7 bytes instead of the {record.size} that were written"):
            write_manifest(folder, {"__0_0.distcp": record})
    with pytest.raises(OSError, match="has no bytes"):
        write_manifest(folder, {"__1_0.distcp": FileRecord(7, "0" * 64)})


def test_a_changed_shard_makes_a_run_fall_back_under_hashes(tmp_path):
    older, newer = (make_folder(folders.step_folder(tmp_path, step)) for step in (1, 2))
    (newer / "__0_0.distcp").write_bytes(b"WEIGHTS")
    assert folders.newest_checkpoint(tmp_path, "hashes") == older
    assert folders.newest_checkpoint(tmp_path, "sizes") == newer
