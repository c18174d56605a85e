"""Tasks with checkable answers, and disjoint sets of them for the teacher, the distillation and the evaluation.

A task is a `chain_sum` of reasoning-gym: two to four one-digit numbers, added and subtracted. Which of the three sets a
task belongs to follows from a hash of its expression, so no expression is in two of them, whatever the seeds. The
distillation reads only `question`; `response` is what the teacher was taught to write, one running sum a line, and the
number after the last `=` is the answer.

Example: python examples/quickstart/tasks.py --output tasks --num-train 2048 --num-heldout 256 --seed 0

    writes `train.jsonl` and `heldout.jsonl`, with rows such as
    {"question": "State the final answer to the following arithmetic problem: 8 + 7 - 9 =", "ground_truth_answer":
     "6", "domain": "math", "source": "reasoning_gym/chain_sum", "entry": {...}, "response": "8+7=15\\n15-9=6"}
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SOURCE = "reasoning_gym/chain_sum"
NUM_BUCKETS = 16
BUCKETS = {"heldout": range(0, 2), "train": range(2, 6), "teacher": range(6, 16)}
"""Which hash buckets of expressions make up each set."""
MAX_ROWS = 100_000
"""Most rows of one file: the held-out buckets have about 370,000 different expressions."""
SEED_STRIDE = 2**32
"""Task `i` of reasoning-gym's seed `s` depends on `s + i` alone, so two of our seeds are this far apart."""


def task_set_of(expression: str) -> str:
    """The one set an expression such as `23 + 45 - 7` belongs to: "heldout", "train" or "teacher"."""
    digest = hashlib.blake2b(expression.encode(), digest_size=8).digest()
    bucket = int.from_bytes(digest, "big") % NUM_BUCKETS
    return next(name for name, buckets in BUCKETS.items() if bucket in buckets)


def running_sums(expression: str) -> str:
    """The steps from left to right, one a line: `23 + 45 - 7` gives `23+45=68` and `68-7=61`."""
    first, *rest = expression.split()
    total, lines = int(first), []
    for operator, operand in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(operand) if operator == "+" else total - int(operand)
        lines.append(f"{total}{operator}{operand}={result}")
        total = result
    return "\n".join(lines)


def make_row(entry: dict[str, Any]) -> dict[str, Any]:
    """A prompt row from what reasoning-gym generated. `entry` has lists where it had tuples, as JSON has no tuples."""
    return {
        "question": entry["question"],
        "ground_truth_answer": entry["answer"],
        "domain": "math",
        "source": SOURCE,
        "entry": json.loads(json.dumps(entry)),
        "response": running_sums(entry["metadata"]["expression"]),
    }


def iterate_tasks(task_set: str, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of one set without end, in an order fixed by the seed. An expression can come again."""
    from reasoning_gym import create_dataset  # takes a second, which `--help` need not wait for

    generated = create_dataset(
        "chain_sum",
        min_terms=2,
        max_terms=4,
        min_digits=1,
        max_digits=1,
        seed=seed * SEED_STRIDE,
        size=SEED_STRIDE,
    )
    return (make_row(entry) for entry in generated if task_set_of(entry["metadata"]["expression"]) == task_set)


def draw_distinct(task_set: str, num_rows: int, seed: int) -> list[dict[str, Any]]:
    """The first `num_rows` different tasks of a set.

    Raises:
        ValueError: for a number of rows that is not between 1 and `MAX_ROWS`.
    """
    if not 1 <= num_rows <= MAX_ROWS:
        raise ValueError(f"number of {task_set} tasks ({num_rows}) must be between 1 and {MAX_ROWS}")
    by_question: dict[str, dict[str, Any]] = {}
    for row in iterate_tasks(task_set, seed):
        by_question.setdefault(row["question"], row)
        if len(by_question) == num_rows:
            break
    return list(by_question.values())


def write_tasks(directory: Path, num_train: int, num_heldout: int, seed: int) -> None:
    """Write `train.jsonl` and `heldout.jsonl`; the same arguments give the same bytes."""
    rows = {"train": draw_distinct("train", num_train, seed), "heldout": draw_distinct("heldout", num_heldout, seed)}
    directory.mkdir(parents=True, exist_ok=True)
    for task_set, task_rows in rows.items():
        lines = [json.dumps(row) + "\n" for row in task_rows]
        (directory / f"{task_set}.jsonl").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the quickstart's prompts and held-out tasks.")
    parser.add_argument("--output", type=Path, required=True, help="folder for train.jsonl and heldout.jsonl")
    parser.add_argument("--num-train", type=int, default=2048, help="prompts for the distillation")
    parser.add_argument("--num-heldout", type=int, default=256, help="tasks for the evaluation")
    parser.add_argument("--seed", type=int, default=0, help="of the tasks that are drawn")
    arguments = parser.parse_args()
    try:
        write_tasks(arguments.output, arguments.num_train, arguments.num_heldout, arguments.seed)
    except ValueError as error:
        parser.error(str(error))
    print(f"{arguments.num_train} prompts and {arguments.num_heldout} held-out tasks in {arguments.output}")


if __name__ == "__main__":
    main()
