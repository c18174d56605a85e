"""The file of sequences that a run keeps."""

from __future__ import annotations

import json

import pytest

from megatron_opdlm.observability.trajectories import TrajectoryWriter, read_trajectories
from tests.kept_sequences import SEQUENCE, kept, replay


def states_by_order(sequence) -> list[list[int | None]]:
    order = sequence.commit_order
    return [
        [token if place <= step else None for token, place in zip(sequence.token_ids, order, strict=True)]
        for step in range(max(order) + 1)
    ]


def test_the_order_of_commitment_is_a_literal_replay():
    assert SEQUENCE.commit_order == [2, 1, 3, 5, 4, 4, 6, 7, 8, 9]
    assert states_by_order(SEQUENCE) == replay(SEQUENCE)


@pytest.mark.parametrize(
    ("prompt_ids", "step_map"),
    [
        ([1, 1, 1, 1], [1, 1, 1, 1]),
        ([1], [3, 1, 2]),
        ([1, 1, 1], [1, 2, 2, 3, 1]),
        ([1, 1, 1, 1, 1, 1, 1], [4, 4, 3, 2, 1, 1, 1, 1, 1]),
    ],
)
def test_prompts_of_any_length_share_their_last_block_with_the_response(prompt_ids, step_map):
    sequence = kept(prompt_ids=prompt_ids, step_map=step_map, token_ids=list(range(len(step_map))))
    assert states_by_order(sequence) == replay(sequence)


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "trajectories.jsonl"
    writer = TrajectoryWriter(path, step=0)
    writer.write([SEQUENCE, kept(step=75)])
    assert read_trajectories(path) == [SEQUENCE, kept(step=75)]
    assert json.loads(path.read_text().splitlines()[0])["texts"]["16"] == "né"


def test_a_line_is_whole_whatever_its_tokens_say(tmp_path):
    path = tmp_path / "trajectories.jsonl"
    said = "\u2028\u2029\u0085\x0b\x0c\x1c\x1d\x1e\r\n"  # where Python's `splitlines` cuts
    sequence = kept(texts=SEQUENCE.texts | {"16": said})
    TrajectoryWriter(path, step=0).write([sequence])
    assert read_trajectories(path) == [sequence]
    TrajectoryWriter(path, step=51).write([])  # which writes again what came before
    assert read_trajectories(path) == [sequence]


def test_a_run_that_goes_on_takes_back_what_it_kept_of_later_steps(tmp_path):
    path = tmp_path / "trajectories.jsonl"
    TrajectoryWriter(path, step=0).write([kept(step=0), kept(step=50), kept(step=75)])
    with path.open("a") as file:
        file.write('{"step": 76, "prompt')
    TrajectoryWriter(path, step=75).write([kept(step=75, prompt_id=8)])
    assert [(one.step, one.prompt_id) for one in read_trajectories(path)] == [(0, 7), (50, 7), (75, 8)]


def test_a_disk_that_fails_is_a_warning(tmp_path, caplog):
    TrajectoryWriter(tmp_path / "absent" / "trajectories.jsonl", step=0).write([SEQUENCE])
    assert "trajectories.jsonl lacks a sequence or more" in caplog.text


def test_no_file_has_no_sequences_and_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "trajectories.jsonl"
    assert read_trajectories(path) == []
    path.write_text('{"step": 0, "train/loss": 1.0}\n')
    with pytest.raises(ValueError, match=r"trajectories\.jsonl: a kept trajectory has exactly the fields"):
        read_trajectories(path)
