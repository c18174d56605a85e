"""The audit of a run: what a restart takes back, what a kill cuts off, and how a prompt used twice is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_opdlm.observability.audit import AuditWriter, epochs, read_audit


def write(path, step, *records):
    writer = AuditWriter(path, step)
    for number, prompt_ids in records:
        writer.record(number, prompt_ids)
    writer.close()


def test_a_restart_takes_back_the_steps_that_its_checkpoint_does_not_have(tmp_path):
    path = tmp_path / "audit.jsonl"
    write(path, 0, (0, [3, 1]), (1, [2, 0]), (2, [1, 3]))
    write(path, 1, (1, [2, 0]), (2, [0, 2]))
    assert read_audit(path) == {0: [3, 1], 1: [2, 0], 2: [0, 2]}
    assert len(path.read_text().splitlines()) == 7, "nothing is deleted"


def test_a_line_that_a_kill_cut_off_does_not_spoil_the_next_one(tmp_path):
    path = tmp_path / "audit.jsonl"
    write(path, 0, (0, [3, 1]), (1, [2, 0]))
    path.write_text(path.read_text()[:-5])
    assert read_audit(path) == {0: [3, 1]}
    write(path, 1, (1, [2, 0]))
    assert read_audit(path) == {0: [3, 1], 1: [2, 0]}


def test_a_step_taken_twice_without_a_restart_is_an_error(tmp_path):
    path = tmp_path / "audit.jsonl"
    write(path, 0, (0, [3, 1]), (0, [3, 1]))
    with pytest.raises(AssertionError, match="step 0 was taken twice"):
        read_audit(path)


def test_epochs_are_cut_from_the_order_of_use_and_may_end_within_a_step():
    assert epochs({0: [2, 0], 1: [1, 1], 2: [0, 2], 3: [2]}, num_prompts=3) == [[2, 0, 1], [1, 0, 2], [2]]


def test_a_prompt_twice_in_an_epoch_and_a_missing_step_are_found():
    with pytest.raises(ValueError, match=r"epoch 1 has the prompts \[0\] more than once"):
        epochs({0: [2, 0, 1], 1: [0, 0, 2]}, num_prompts=3)
    with pytest.raises(ValueError, match="not all from the first to the last"):
        epochs({0: [2, 0, 1], 2: [0, 1, 2]}, num_prompts=3)


def test_a_disk_that_takes_no_more_is_a_warning_to_the_last(tmp_path, caplog):
    writer = AuditWriter(tmp_path / "audit.jsonl", 0)
    with Path("/dev/full").open("w") as writer._file:
        writer.record(0, [3, 1])
        writer.close()
    first, last = caplog.messages
    assert first.startswith("/dev/full lacks {'step': 0") and last.startswith("/dev/full lacks its last lines")


def test_a_line_is_on_the_disk_before_a_checkpoint_can_follow(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda _: synced.append((tmp_path / "audit.jsonl").read_text()))
    write(tmp_path / "audit.jsonl", 0, (0, [3, 1]))
    assert synced[-1] == (tmp_path / "audit.jsonl").read_text() and len(synced) == 2
