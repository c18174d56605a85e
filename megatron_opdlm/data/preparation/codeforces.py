"""Codeforces problems of the hub's `open-r1/codeforces`, for training and for evaluation alike.

A row of its configuration `verifiable` becomes a statement and tests for programs that read standard input. Training
takes the split `train` and needs the statement alone; the benchmark takes the split `test`, with the tests.

    codeforces_row(row)["question"]       # "Half\\n\\nYou are given an even integer $n$. ...\\n\\nInput\\n..."
    codeforces_row({"input_mode": "file", ...})       # {}: not a problem of standard input and output
"""

from __future__ import annotations

import math
from typing import Any

Row = dict[str, Any]


def codeforces_row(row: Row) -> Row:
    """A problem with its tests; empty for one that standard input, output and exact comparison do not cover."""
    plain = row["input_mode"] == "stdio" and row["executable"] and row["official_tests"]
    if not plain or row.get("interaction_format") or row.get("generated_checker"):
        return {}
    return {
        "task_id": row["id"],
        "question": _statement(row),
        "test_input": [_unix_lines(test["input"]) for test in row["official_tests"]],
        "test_output": [_unix_lines(test["output"]) for test in row["official_tests"]],
        # three times the limit of the contest, as Codeforces gives Python, and a second to start
        "test_time_limit": math.ceil(float(row.get("time_limit") or 1.0) * 3) + 1,
        "test_method": "stdio",
        "rating": row.get("rating"),
        "platform": "codeforces",
    }


def _statement(row: Row) -> str:
    """Title, statement, input, output, examples and note, each under its heading; formulas in single dollars."""
    parts = [row.get("title"), row["description"]]
    for heading, field in (("Input", "input_format"), ("Output", "output_format")):
        parts += [f"{heading}\n{row[field].strip()}"] if row.get(field) else []
    examples = [f"Input\n{case['input'].rstrip()}\nOutput\n{case['output'].rstrip()}" for case in row["examples"] or []]
    parts += ["\n\n".join(["Examples", *examples])] if examples else []
    parts += [f"Note\n{row['note'].strip()}"] if row.get("note") else []
    return "\n\n".join(part.strip() for part in parts if part).replace("$$$", "$")


def _unix_lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")
