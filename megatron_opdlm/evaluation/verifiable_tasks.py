"""Tasks whose answers a program can check: reading them, and scoring responses with reasoning-gym's verifiers.

A task is a prompt row with `source`, which names a reasoning-gym data set, and `entry`, which is what that data set's
verifier needs. A response shows its working, and the number after its last `=` counts as its answer.

Example: one held-out task and a response to it.

    task = read_tasks("heldout.jsonl")[0]                # {"question": "... 23 + 45 - 7 =", "source": ...}
    extract_answer("23+45=68\\n68-7=61")                  # "61"
    score_response(task, "23+45=68\\n68-7=61")            # 1.0
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

SOURCE_PREFIX = "reasoning_gym/"

_NUMBER_AFTER_EQUALS = re.compile(r"=[ \t]*([-+]?\d+(?:,\d{3})*(?:\.\d+)?)")


def read_tasks(path: str | Path) -> list[dict[str, Any]]:
    """The tasks of a JSONL file, in its order; empty lines are skipped.

    Raises:
        ValueError: for a row that is not a task, with the file, the line number and the reason.
    """
    if Path(path).suffix != ".jsonl":
        raise ValueError(f"{path}: a task file must end in .jsonl")
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [_parse_task(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]


def _parse_task(line: str, place: str) -> dict[str, Any]:
    """One row; `place` is the "FILE:LINE" that a message names."""
    try:
        task = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error})") from error
    if not isinstance(task, dict):
        raise ValueError(f"{place}: a task must be a JSON object, not {type(task).__name__}")
    missing = [key for key in ("question", "source", "entry") if key not in task]
    if missing:
        raise ValueError(f"{place}: a task must have {', '.join(missing)}")
    if not isinstance(task["source"], str):
        raise ValueError(f"{place}: `source` must be text, not {type(task['source']).__name__}")
    if not isinstance(task["entry"], dict):
        raise ValueError(f"{place}: `entry` must be a JSON object, not {type(task['entry']).__name__}")
    return task


def extract_answer(response_text: str) -> str | None:
    """The last number that directly follows a `=`, as written; None if there is none."""
    numbers = _NUMBER_AFTER_EQUALS.findall(response_text)
    return numbers[-1] if numbers else None


def score_response(task: dict[str, Any], response_text: str) -> float:
    """What the verifier of the task's data set gives for the response's answer, from 0 to 1.

    Only 1.0 means correct: verifiers give part of a point to an answer that merely contains the right one, such as
    0.67 to 143 where 43 is right. A response without an answer has 0.

    Raises:
        ValueError: if the task's `source` is not a reasoning-gym data set.
        ValueError: if reasoning-gym is not installed.
    """
    answer = extract_answer(response_text)
    verifier = load_verifier(task["source"])
    return 0.0 if answer is None else float(verifier(answer, task["entry"]))


@cache
def load_verifier(source: str) -> Callable[[str, dict[str, Any]], float]:
    """The `score_answer` of the data set that `source` names, e.g. `reasoning_gym/chain_sum`."""
    if not source.startswith(SOURCE_PREFIX):
        raise ValueError(f"source ({source}) of a task must start with {SOURCE_PREFIX}")
    try:
        from reasoning_gym import get_score_answer_fn
    except ImportError as error:
        message = 'scoring these tasks needs reasoning-gym: pip install "megatron-opdlm[evaluation]"'
        raise ValueError(message) from error
    try:
        return get_score_answer_fn(source.removeprefix(SOURCE_PREFIX))
    except ValueError as error:
        raise ValueError(f"source ({source}) of a task must name a reasoning-gym data set: {error}") from error
