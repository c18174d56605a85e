"""launch/stage_data.sh: whole and checked copies, or none; what is there is used again while it is what was copied."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SHORT_CP = """#!/bin/bash
# A copy that loses the end of a file without saying so.
/bin/cp "$@" && truncate --size=-1 "${@: -1}/model.safetensors"
"""
WRONG_CP = """#!/bin/bash
# A copy of the right size with another byte in it.
/bin/cp "$@" && printf X | dd of="${@: -1}/model.safetensors" conv=notrunc status=none
"""


def stage(*arguments: object, path: Path | None = None) -> subprocess.CompletedProcess:
    command = ["bash", "launch/stage_data.sh", *map(str, arguments)]
    environment = os.environ | {"PATH": f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"]}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def model(tmp_path) -> Path:
    """A folder as a hub's cache has it: links to files that lie elsewhere."""
    folder = tmp_path / "shared" / "my model"
    (folder / "inner").mkdir(parents=True)
    (tmp_path / "blob").write_bytes(b"weights")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    (folder / "inner" / "config.json").write_text("{}")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_folders_and_files_are_copied_with_what_their_links_lead_to(tmp_path, model):
    (tmp_path / "prompts.jsonl").write_text('{"question": "?"}\n')
    done = stage("--to", tmp_path / "local", model, tmp_path / "prompts.jsonl")
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "local" / "my model") == {"model.safetensors": b"weights", "inner/config.json": b"{}"}
    assert not (tmp_path / "local" / "my model" / "model.safetensors").is_symlink()
    assert (tmp_path / "local" / "prompts.jsonl").read_text() == '{"question": "?"}\n'


def test_a_copy_is_used_again_until_the_source_or_the_copy_changes(tmp_path, model):
    copy = tmp_path / "local" / "my model"
    assert "copied from" in stage("--to", tmp_path / "local", model).stdout
    assert "is there already" in stage("--to", tmp_path / "local", model).stdout
    (model / "inner" / "config.json").write_text("[]")  # the same size, at another time
    assert "copied from" in stage("--to", tmp_path / "local", model).stdout
    assert (copy / "inner" / "config.json").read_text() == "[]"
    (copy / "model.safetensors").unlink()
    assert "copied from" in stage("--to", tmp_path / "local", model).stdout
    assert files(copy) == files(model) | {"model.safetensors": b"weights"}


@pytest.mark.parametrize(
    ("cp", "verify", "is_found"), [(SHORT_CP, "sizes", True), (WRONG_CP, "sizes", False), (WRONG_CP, "hashes", True)]
)
def test_a_copy_that_is_not_what_was_read_does_not_get_its_name(tmp_path, model, cp, verify, is_found):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "cp").write_text(cp)
    (tmp_path / "bin" / "cp").chmod(0o755)
    done = stage("--verify", verify, "--to", tmp_path / "local", model, path=tmp_path / "bin")
    assert (done.returncode == 1 and "is not what was read" in done.stderr) == is_found
    assert (tmp_path / "local" / "my model").exists() != is_found
    assert not list((tmp_path / "local").glob(".*.partial"))


@pytest.mark.parametrize("as_link", [False, True])
def test_a_source_is_never_taken_for_a_copy_of_itself(tmp_path, model, as_link):
    folder = model.parent
    if as_link:
        (tmp_path / "local").symlink_to(folder)
    before = files(model)
    done = stage("--to", tmp_path / "local" if as_link else folder, model)
    assert done.returncode == 2 and "is the folder in which" in done.stderr and files(model) == before


def test_what_is_there_and_is_no_copy_is_left_alone(tmp_path, model):
    own = tmp_path / "local" / "my model"
    own.mkdir(parents=True)
    (own / "weights").write_text("of months")
    done = stage("--to", tmp_path / "local", model)
    assert done.returncode == 2 and "no copy of this script's" in done.stderr
    assert files(own) == {"weights": b"of months"}


def test_a_copy_has_its_origin_beside_it_before_it_has_its_name(tmp_path, model):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mv").write_text("#!/bin/bash\nkill -KILL $PPID\n")
    (tmp_path / "bin" / "mv").chmod(0o755)
    assert stage("--to", tmp_path / "local", model, path=tmp_path / "bin").returncode == -9
    assert (tmp_path / "local" / ".my model.origin").exists()
    assert "copied from" in stage("--to", tmp_path / "local", model).stdout


def test_what_a_killed_job_left_is_replaced(tmp_path, model):
    half = tmp_path / "local" / ".my model.partial"
    half.mkdir(parents=True)
    (half / "left.bin").write_text("half")
    assert stage("--to", tmp_path / "local", model).returncode == 0
    assert "left.bin" not in files(tmp_path / "local" / "my model") and not half.exists()


def test_callers_on_one_node_wait_for_each_other_and_one_of_them_copies(tmp_path, model):
    command = ["bash", "launch/stage_data.sh", "--to", str(tmp_path / "local"), str(model)]
    callers = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = [caller.communicate(timeout=60)[0] for caller in callers]
    assert [caller.returncode for caller in callers] == [0] * 4
    assert sorted("copied from" in text for text in said) == [False, False, False, True]


def test_the_dry_run_prints_the_copies_and_makes_none(tmp_path, model):
    done = stage("--dry-run", "--to", tmp_path / "local", model)
    assert done.returncode == 0 and done.stdout.startswith("cp -rL ") and "my\\ model" in done.stdout
    assert not (tmp_path / "local").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a"], "--to must name a folder"),
        (["--to", "X"], "nothing to copy"),
        (["--to", "X", "no/such"], "no/such does not exist"),
        (["--to", "X", "launch/README.md", "README.md"], "two sources are named README.md"),
        (["--to", "X", "--verify", "luck", "README.md"], "--verify (luck) must be sizes or hashes"),
        (["--from", "X"], "--from is no setting of stage_data.sh"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2_before_anything_is_copied(tmp_path, arguments, message):
    done = stage(*[tmp_path / "X" if word == "X" else word for word in arguments])
    assert done.returncode == 2 and done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "X").exists()
