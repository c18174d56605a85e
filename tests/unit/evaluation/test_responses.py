"""Responses on disk: what is found again, and what a kill leaves behind."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_opdlm.evaluation.responses import Response, ResponseStore, scored_text

RESPONSE = Response(
    task="group/sums",
    doc_id=3,
    repeat=0,
    fingerprint="f",
    text="1+1=2\u2028é",
    num_tokens=6,
    num_steps=3,
    stop_reason="end_token",
    call=1,
    seconds=0.5,
)
OTHER = dataclasses.replace(RESPONSE, doc_id=4, text="x")
WANTED = {RESPONSE.key: "f", OTHER.key: "f"}


def test_responses_of_all_writers_are_found(tmp_path):
    for writer, response in (("rank-0", RESPONSE), ("rank-1", OTHER)):
        with ResponseStore(tmp_path, writer) as store:
            store.append(response)
    assert ResponseStore(tmp_path, "").read(WANTED) == {RESPONSE.key: RESPONSE, OTHER.key: OTHER}


def test_a_response_is_on_disk_before_the_file_is_closed(tmp_path):
    with ResponseStore(tmp_path, "rank-0") as store:
        store.append(RESPONSE)
        assert ResponseStore(tmp_path, "").read(WANTED) == {RESPONSE.key: RESPONSE}


def test_a_response_counts_only_for_the_fingerprint_it_was_decoded_with(tmp_path):
    with ResponseStore(tmp_path, "rank-0") as store:
        store.append(RESPONSE)
        assert store.read({RESPONSE.key: "another"}) == {}
        assert store.read({}) == {}


@pytest.mark.parametrize("num_bytes", [1, 40, -1, -2, -3])
def test_a_torn_line_is_no_response_and_does_not_spoil_the_next_one(tmp_path, num_bytes):
    with ResponseStore(tmp_path, "rank-0") as store:
        store.append(RESPONSE)
        store.append(OTHER)
    path = next(tmp_path.rglob("*.jsonl"))
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:num_bytes])
    known = {RESPONSE.key} if num_bytes != -1 else set(WANTED)  # -1: only the end of the line is missing
    with ResponseStore(tmp_path, "rank-0") as store:
        assert set(store.read(WANTED)) == known
        store.append(OTHER)
        assert store.read(WANTED) == {RESPONSE.key: RESPONSE, OTHER.key: OTHER}


@pytest.mark.parametrize(
    ("text", "until", "enable_thinking", "expected"),
    [
        ("1\n2\n\n3", ("\n\n",), False, "1\n2"),
        ("1\n2\n\n3", ("\n\n", "2"), False, "1\n"),
        ("a\n\nb</think>\n\nc\n\nd", ("\n\n",), True, "c"),
        ("a\n\nb</think>\n\nc", ("\n\n",), False, "a"),
        ("cut short", (), True, "cut short"),
    ],
)
def test_what_counts_is_behind_the_thoughts_and_before_what_ends_it(text, until, enable_thinking, expected):
    assert scored_text(text, until, enable_thinking) == expected
