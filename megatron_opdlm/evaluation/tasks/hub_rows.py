"""Rows from the hub, brought into the form of the files of `divelab/opdlm_eval_data`.

A benchmark that lm-eval has a task for is read from the data set of that task; the others are files of
`divelab/opdlm_eval_data` itself. Codeforces is made from `open-r1/codeforces`.

    CONVERTERS["openai/gsm8k"]({"question": "...", "answer": "6 * 3 = 18\\n#### 18"})
    # {"question": "...", "ground_truth_answer": "18"}
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from megatron_opdlm.data.preparation.codeforces import codeforces_row
from megatron_opdlm.evaluation.benchmarks import Benchmark

EVAL_DATA = "divelab/opdlm_eval_data"

Row = dict[str, Any]


def rows_from_hub(row_of_table: Benchmark, path: str, name: str | None, split: str) -> list[Row]:
    """The rows of a benchmark; `name` "*" reads every configuration, whose name is then the row's `subdivision`.

    Raises:
        ValueError: if the data set cannot be read, with what else can be done.
    """
    import datasets

    files = {"data_files": row_of_table.file} if path == EVAL_DATA else {}
    split = "train" if files else split
    try:
        names = datasets.get_dataset_config_names(path) if name == "*" else [name]
        parts = [(part, datasets.load_dataset(path, part, split=split, **files)) for part in names]
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"the rows of {row_of_table.name} cannot be read from the hub's {path} ({error}); on a machine with a "
            f"network: python -m megatron_opdlm.evaluation.tasks.rows {row_of_table.task} DIR, then "
            f"--evaluation.data_dir DIR"
        ) from error
    convert = CONVERTERS.get(path, dict)
    labelled = ((part if name == "*" else None, row) for part, rows in parts for row in rows)
    converted = ((part, convert(row)) for part, row in labelled)
    return [row | ({"subdivision": part} if part else {}) for part, row in converted if row]


def _choice(question: str, options: Sequence[str], answer: str | int, subject: str = "") -> Row:
    letters = "ABCDEFGHIJ"
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(letters, options, strict=False))
    right = letters[answer] if isinstance(answer, int) else answer
    return {"question": f"{question.strip()}\n{listed}", "ground_truth_answer": right, "subdivision": subject}


def _gsm8k(row: Row) -> Row:
    return {"question": row["question"], "ground_truth_answer": row["answer"].split("####")[-1].strip()}


def _gpqa(row: Row) -> Row:
    """Options are shuffled by a generator seeded with the question, so that every run sees the same order."""
    right = row["Correct Answer"].strip()
    options = [right, *(row[f"Incorrect Answer {number}"].strip() for number in (1, 2, 3))]
    random.Random(row["Question"]).shuffle(options)
    return _choice(row["Question"], options, options.index(right), row.get("High-level domain") or "")


def _four_options(row: Row) -> Row:
    options = [row[f"option_{letter}"] for letter in "abcd"]
    return _choice(row["question"], options, row["answer"], row.get("subject") or "")


CONVERTERS: dict[str, Callable[[Row], Row]] = {
    "openai/gsm8k": _gsm8k,
    "HuggingFaceH4/MATH-500": lambda row: {
        "question": row["problem"],
        "ground_truth_answer": row["answer"],
        "subdivision": row["subject"],
    },
    "Maxwell-Jia/AIME_2024": lambda row: {"question": row["Problem"], "ground_truth_answer": str(row["Answer"])},
    "math-ai/aime25": lambda row: {"question": row["problem"], "ground_truth_answer": str(row["answer"])},
    "cais/mmlu": lambda row: _choice(row["question"], row["choices"], row["answer"], row["subject"]),
    "TIGER-Lab/MMLU-Pro": lambda row: _choice(row["question"], row["options"], row["answer"], row["category"]),
    "Idavidrein/gpqa": _gpqa,
    "google/IFEval": lambda row: {**row, "question": row["prompt"]},
    "ceval/ceval-exam": lambda row: _choice(row["question"], [row[letter] for letter in "ABCD"], row["answer"]),
    "CohereLabs/Global-MMLU-Lite": _four_options,
    "CohereLabs/include-lite-44": _four_options,
    "open-r1/codeforces": codeforces_row,
}
"""Data set -> what makes its rows ours; an empty row is left out."""
