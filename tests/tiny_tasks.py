"""A task of lm-evaluation-harness in a few lines, written for a test: sums with their results.

    rows = [{"question": "8 + 7 =", "answer": "15"}]
    write_task(folder, "sums", rows)                # folder is what `evaluation.include_path` takes

The rows are read by a function beside the definition, so that no cache of data sets is written.
"""

from __future__ import annotations

import json
from pathlib import Path

TASK = """\
task: {name}
custom_dataset: !function rows_{name}.load
test_split: test
output_type: {output_type}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{generation}
filter_list:
  - name: last_number
    filter:
      - function: regex
        regex_pattern: '=\\s*(-?\\d+)\\s*$'
      - function: take_first
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
{further}
"""
ROWS = """\
import json
from pathlib import Path

from datasets import Dataset


def load(**_):
    return {{"test": Dataset.from_list(json.loads(Path(__file__).with_name("{name}.json").read_text()))}}
"""


def write_task(
    folder: Path,
    name: str,
    rows: list[dict],
    *,
    generation: str = "{until: ['<|im_end|>'], do_sample: false, max_gen_toks: 32}",
    output_type: str = "generate_until",
    further: str = "",
) -> Path:
    """Writes the definition of a task and its rows. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    kwargs = f"generation_kwargs: {generation}" if output_type == "generate_until" else ""
    task = TASK.format(name=name, output_type=output_type, generation=kwargs, further=further)
    (folder / f"{name}.yaml").write_text(task)
    (folder / f"rows_{name}.py").write_text(ROWS.format(name=name))
    (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder


def sum_rows(num: int) -> list[dict]:
    """Sums of one to four numbers, with a category."""
    terms = [[(7 * i + 3 * j) % 10 for j in range(1 + i % 4)] for i in range(num)]
    return [
        {"question": "+".join(map(str, row)) + "=", "answer": str(sum(row)), "category": f"{len(row)} terms"}
        for row in terms
    ]
