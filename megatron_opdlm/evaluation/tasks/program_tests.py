"""EvalPlus's tests for HumanEval and MBPP, joined to rows that come without them.

The files `HumanEval.json` and `MBPP.json` of `divelab/opdlm_eval_data` have a `task_id` and the prompt. The tests are
in EvalPlus's own files: `HumanEvalPlus.jsonl` and `MbppPlus.jsonl` in `evaluation.data_dir` (as released: a version in
the name and `.gz` are fine), or without that folder in EvalPlus's cache, which it fills from its releases.

    add_plus_tests([{"task_id": "HumanEval/0", "question": "..."}], "opdlm_humaneval", Path("data"))
    # [{"task_id": "HumanEval/0", "question": "...", "entry_point": ..., "base_input": [...], "plus_input": [...], ...}]
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]

PLUS_TESTS = {"opdlm_humaneval": "HumanEvalPlus", "opdlm_mbpp": "MbppPlus"}
"""Task -> name of EvalPlus's release."""


def add_plus_tests(rows: list[Row], task: str, folder: Path) -> list[Row]:
    """The rows with the fields of EvalPlus's rows of the same `task_id`; rows with `base_input` have them already.

    Raises:
        ValueError: if EvalPlus's tests are not there, or have no such task.
    """
    if all("base_input" in row for row in rows):
        return rows
    release = PLUS_TESTS[task]
    tests = _read_release(release, folder)
    absent = [row["task_id"] for row in rows if row["task_id"] not in tests]
    if absent:
        raise ValueError(f"{release} has no tests for {absent[0]} ({len(absent)} of {len(rows)} rows are without)")
    return [tests[row["task_id"]] | row for row in rows]


def _read_release(release: str, folder: Path) -> dict[str, Row]:
    files = sorted([*folder.glob(f"{release}*.jsonl"), *folder.glob(f"{release}*.jsonl.gz")])
    if not files:
        url = f"https://github.com/evalplus/{release.lower()}_release/releases"
        raise ValueError(f"evaluation.data_dir ({folder}) has no {release}.jsonl, EvalPlus's tests; get it from {url}")
    raw = files[-1].read_bytes()
    text = (gzip.decompress(raw) if files[-1].suffix == ".gz" else raw).decode()
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    return {row["task_id"]: row for row in rows}


def downloaded_rows(task: str) -> list[Row]:
    """The rows of EvalPlus's release for a task, from its cache or its site; the prompt is the question.

    Raises:
        ValueError: if EvalPlus is not installed, or the release is not to be had.
    """
    release = PLUS_TESTS[task]
    try:
        from evalplus.data import get_human_eval_plus, get_mbpp_plus
    except ImportError as error:
        raise ValueError(
            "HumanEval and MBPP need evalplus: pip install --no-deps -r requirements/evalplus.txt"
        ) from error
    try:
        rows = get_human_eval_plus() if release == "HumanEvalPlus" else get_mbpp_plus()
    except OSError as error:
        message = f"EvalPlus cannot get {release} ({error}); with the file in a folder: --evaluation.data_dir"
        raise ValueError(message) from error
    return [{**row, "question": row["prompt"]} for row in rows.values()]
