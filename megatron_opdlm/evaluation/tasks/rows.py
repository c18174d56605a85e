"""The rows of a benchmark: from a file in `evaluation.data_dir`, or from the hub.

lm-eval calls `load_rows` for every task of this folder (`custom_dataset` in the YAML files), with the task's
`dataset_kwargs` and the metadata of the `TaskManager`, where `data_dir` stands. Files are those of the data set
`divelab/opdlm_eval_data`: a JSON list of rows with `question`, `ground_truth_answer` and what the benchmark needs
besides. Rows from the hub are brought into the same form (`hub_rows.py`), so prompts and scores do not depend on
where rows come from.

Example:

    load_rows(task="opdlm_gsm8k", path="openai/gsm8k", name="main", data_dir="data")["test"][0]
    # {"question": "...", "ground_truth_answer": "18", "category": ""}

    python -m megatron_opdlm.evaluation.tasks.rows opdlm_codeforces data      # writes data/Codeforces.json from the hub
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_opdlm.evaluation.answers.livebench_answers import has_scorer
from megatron_opdlm.evaluation.benchmarks import BENCHMARKS, Benchmark, benchmark
from megatron_opdlm.evaluation.tasks.hub_rows import EVAL_DATA, rows_from_hub
from megatron_opdlm.evaluation.tasks.program_tests import PLUS_TESTS, add_plus_tests, downloaded_rows

Row = dict[str, Any]

FIELDS = {
    "opdlm_ifeval": ("question", "instruction_id_list", "kwargs"),
    "opdlm_livebench": ("question", "livebench_category", "livebench_task"),
    "opdlm_humaneval": ("question", "task_id"),
    "opdlm_mbpp": ("question", "task_id"),
    "opdlm_livecodebench_v6": ("question", "input_output"),
    "opdlm_codeforces": ("question", "test_input", "test_output"),
}
"""What a row must have, where it is not the default, a question and the right answer."""


class Rows(list[Row]):
    """Rows as lm-eval wants them: a list that knows the names of its fields."""

    @property
    def features(self) -> Row:
        """The fields of the first row; lm-eval reads the names alone."""
        return self[0]


def load_rows(
    *,
    task: str,
    path: str,
    name: str | None = None,
    split: str = "test",
    data_dir: str | Path | None = None,
    **_metadata: object,
) -> dict[str, Rows]:
    """The rows of a task of this folder, as the split `test`.

    Args:
        task: a task of the table in `benchmarks.py`.
        path: the data set on the hub that is read without `data_dir`.
        name: its configuration; `*` reads all of them.
        split: its split.
        data_dir: folder of JSON files.

    Raises:
        ValueError: for rows that are not there, with the command that gets them, and for malformed ones.
    """
    row_of_table = benchmark(task)
    assert row_of_table is not None, f"{task} is in the table of benchmarks"
    if data_dir:
        place, rows = read_file(Path(data_dir), row_of_table)
    elif task in PLUS_TESTS:
        place, rows = path, downloaded_rows(task)
    else:
        place, rows = path, rows_from_hub(row_of_table, path, name, split)
    check_rows(rows, task, place)
    if data_dir and task in PLUS_TESTS:
        rows = add_plus_tests(rows, task, Path(data_dir))
    return {"test": Rows(_prepare(row, row_of_table) for row in rows)}


def read_file(folder: Path, row_of_table: Benchmark) -> tuple[str, list[Row]]:
    """(path, rows) of a benchmark's file."""
    file = folder / row_of_table.file
    if not file.is_file():
        raise ValueError(
            f"evaluation.data_dir ({folder}) has no {row_of_table.file}, the rows of {row_of_table.name}; "
            f"get it with: {_command(row_of_table, folder)}"
        )
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{file}: must be a JSON list of rows")
    return str(file), rows


def _command(row_of_table: Benchmark, folder: Path) -> str:
    if row_of_table.task == "opdlm_codeforces":  # not in the collection; made from its source
        return f"python -m megatron_opdlm.evaluation.tasks.rows {row_of_table.task} {folder}"
    return f"hf download {EVAL_DATA} {row_of_table.file} --repo-type dataset --local-dir {folder}"


def check_rows(rows: list[Row], task: str, place: str) -> None:
    """Raises ValueError, with the place and number of the row, for a row that the task cannot use."""
    wanted = FIELDS.get(task, ("question", "ground_truth_answer"))
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{place}: row {number} must be a JSON object, not {type(row).__name__}")
        missing = [field for field in wanted if field not in row]
        if missing:
            raise ValueError(f"{place}: row {number} has no {', '.join(missing)}")
        if task == "opdlm_livebench" and not has_scorer(row):
            names = f"{row['livebench_category']}/{row['livebench_task']}"
            raise ValueError(f"{place}: row {number} is of the LiveBench task {names}, which has no scorer here")


def _prepare(row: Row, row_of_table: Benchmark) -> Row:
    """The row with its category, options as in the prompt, letters that may be chosen, seconds a program may take."""
    prepared = row | {"category": str(row.get("category") or row.get(row_of_table.category_field) or "")}
    if row_of_table.parenthesised:
        prepared["question"] = re.sub(r"\(([A-J])\)\s*", r"\1. ", row["question"])
    if row_of_table.letters:
        prepared["letters"] = row_of_table.letters
    if "test_time_limit" in row:
        prepared.setdefault("time_limit", row["test_time_limit"])
    return prepared


def main(arguments: list[str]) -> None:
    """Writes the rows of a task from the hub into a folder, for machines without a network."""
    from lm_eval.tasks import TaskManager

    from megatron_opdlm.config.errors import user_errors

    with user_errors():
        tasks = {row.task: row for row in BENCHMARKS}
        if len(arguments) != 2 or arguments[0] not in tasks:
            raise ValueError(f"usage: TASK FOLDER, where TASK is one of {', '.join(tasks)}")
        row_of_table, folder = tasks[arguments[0]], Path(arguments[1])
        config = _yaml_of(TaskManager, row_of_table.task)
        rows = load_rows(**config["dataset_kwargs"])["test"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / row_of_table.file).write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
        print(f"{folder / row_of_table.file}: {len(rows)} rows")


def _yaml_of(manager: Callable[..., Any], task: str) -> Row:
    from megatron_opdlm.evaluation.benchmarks import TASKS_FOLDER

    return manager(include_path=str(TASKS_FOLDER), include_defaults=False).task_index[task].cfg


if __name__ == "__main__":
    main(sys.argv[1:])
