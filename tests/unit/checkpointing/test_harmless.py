"""Nothing that a checkpoint or a model's folder brings along is run, and no name in it leads out of it."""

from __future__ import annotations

import builtins
import collections
import contextlib
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemWriter, save

from megatron_opdlm.checkpointing.harmless import INDEX, check_harmless, file_inside

ENDLESS = [b"\x80\x04\x8e" + bytes(4) + b"\x00\x00\xff\x7f.", b"\x80\x04\x95" + b"\xff" * 8 + b"."]
"""Pickles that say they go on for longer than memory."""


class Evil:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "checkpoint"
    values = {"weight": torch.arange(6.0).view(2, 3), "counts": {"step": 3, "lr": 0.5}}
    save(values, storage_writer=FileSystemWriter(folder), no_dist=True)
    return folder


def test_a_checkpoint_of_pytorch_is_harmless(checkpoint):
    check_harmless(checkpoint)


def test_code_in_the_index_is_refused_and_not_run(checkpoint, tmp_path):
    (checkpoint / INDEX).write_bytes(pickle.dumps(Evil(tmp_path / "trace")))
    with pytest.raises(ValueError, match=r"\.metadata cannot be read: it names posix\.mkdir"):
        check_harmless(checkpoint)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", ["eval", "exec", "getattr", "__import__"])
def test_no_builtin_gets_through(checkpoint, name):
    class Call:
        def __reduce__(self):
            return getattr(builtins, name), ("1",)

    (checkpoint / INDEX).write_bytes(pickle.dumps(Call()))
    with pytest.raises(ValueError, match="which no index does"):
        check_harmless(checkpoint)


@pytest.mark.parametrize("dotted", ["os.system", "Metadata.__init__", "__builtins__"])
def test_no_name_leads_out_of_an_allowed_module(checkpoint, dotted):
    module = "torch.distributed.checkpoint.metadata"
    content = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, dotted))
    (checkpoint / INDEX).write_bytes(content + b"\x93.")
    with pytest.raises(ValueError, match="which no index does"):
        check_harmless(checkpoint)


def test_code_in_a_value_beside_the_tensors_is_refused_and_not_run(tmp_path):
    folder = tmp_path / "checkpoint"
    save({"value": Evil(tmp_path / "trace")}, storage_writer=FileSystemWriter(folder), no_dist=True)
    with pytest.raises(ValueError, match="holds something else than data"):
        check_harmless(folder)
    assert not (tmp_path / "trace").exists()


class Disguised:
    """Unpickled as a dictionary with these items and attributes of its own."""

    def __init__(self, items: dict, /, **attributes: object) -> None:
        self.items, self.attributes = items, attributes

    def __reduce__(self):
        return collections.OrderedDict, (), self.attributes, None, iter(list(self.items.items()))


def spoil_index(folder: Path, spoil: Callable[[object], object]) -> None:
    """Writes another index; `spoil` changes it in place."""
    index = pickle.loads((folder / INDEX).read_bytes())
    spoil(index)
    (folder / INDEX).write_bytes(pickle.dumps(index))


def no_items(index) -> None:
    index.storage_data = Disguised(index.storage_data, items=collections.OrderedDict)


def no_values(index) -> None:
    index.state_dict_metadata = Disguised(index.state_dict_metadata, get=PurePosixPath)


def set_in_each_place(index, **values: object) -> None:
    for stored in index.storage_data.values():
        vars(stored).update(values)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (no_items, "holds no index"),
        (no_values, "holds no index"),
        (lambda index: set_in_each_place(index, transform_descriptors=["stream.zstd"]), "does not say where"),
        (lambda index: set_in_each_place(index, length=-1), "does not say where"),
        (lambda index: set_in_each_place(index, offset=0.0), "does not say where"),
        (lambda index: [vars(stored).pop("offset") for stored in index.storage_data.values()], "does not say where"),
        (lambda index: set_in_each_place(index, relative_path=3), "leads out of the folder"),
        (lambda index: set_in_each_place(index, relative_path="gone"), "gone cannot be read: No such file"),
    ],
)
def test_an_index_that_shows_itself_otherwise_to_pytorch_is_refused(checkpoint, spoil, reason):
    spoil_index(checkpoint, spoil)
    with pytest.raises(ValueError, match=reason):
        check_harmless(checkpoint)


def test_an_index_that_changes_the_classes_it_names_is_refused_and_they_are_as_they_were(checkpoint):
    before = dict(vars(PurePosixPath))
    for name in ("parts", "another"):  # GLOBAL PurePosixPath; BUILD (None, {name: ()}), which sets it on the class
        size = bytes([len(name), 0, 0, 0])
        code = b"\x80\x04cpathlib\nPurePosixPath\n(N}X" + size + name.encode() + b")stb."
        (checkpoint / INDEX).write_bytes(code)
        with pytest.raises(ValueError, match="it changes classes, which no index does"):
            check_harmless(checkpoint)
    assert dict(vars(PurePosixPath)) == before


@pytest.mark.parametrize("content", [b"", b"\x00" * 500, pickle.dumps([1, 2]), pickle.dumps({}), b"text", *ENDLESS])
def test_a_damaged_index_is_said_to_be_damaged(checkpoint, content):
    (checkpoint / INDEX).write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged: \.metadata"):
        check_harmless(checkpoint)


def test_every_cut_of_an_index_is_refused(checkpoint):
    content = (checkpoint / INDEX).read_bytes()
    for length in range(len(content)):
        (checkpoint / INDEX).write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"is damaged: \.metadata"):
            check_harmless(checkpoint)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=3))
def test_whatever_bytes_of_an_index_are_changed_it_is_read_or_refused(checkpoint, changes):
    index = bytearray((checkpoint / INDEX).read_bytes())
    for place, value in changes:
        index[place % len(index)] = value
    folder = Path(tempfile.mkdtemp(dir=checkpoint.parent))
    (folder / INDEX).write_bytes(index)
    with contextlib.suppress(ValueError):
        check_harmless(folder)


def test_an_index_that_names_files_elsewhere_is_refused(checkpoint):
    spoil_index(checkpoint, lambda index: set_in_each_place(index, relative_path="../outside.distcp"))
    with pytest.raises(ValueError, match=r"'\.\./outside\.distcp' leads out of the folder"):
        check_harmless(checkpoint)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "..", "..\\x", "x\0y"])
def test_a_name_that_leads_out_of_the_folder_is_refused(name):
    with pytest.raises(ValueError, match="leads out of the folder"):
        file_inside(Path("folder"), name)


@pytest.mark.parametrize("name", ["x", "hf/config.json", "..x", "a..b"])
def test_other_names_are_those_of_files_inside(name):
    assert file_inside(Path("folder"), name) == Path("folder") / name
