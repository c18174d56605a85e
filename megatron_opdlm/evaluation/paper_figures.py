"""What is known of a task beyond its definition: the paper's scores, and the field that its categories stand in.

paper_scores("opdlm_gsm8k", thinking=False)         # {"OPDLM-4B": 87.6, ...}, in percent; {} for any other task
category_field("opdlm_gsm8k")                       # "subdivision"

Both come from the table `evaluation.benchmarks`; a task that is not in it has neither.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

BENCHMARKS = "megatron_opdlm.evaluation.benchmarks"
CATEGORY_FIELD = "category"
"""Of documents of tasks that are not in the table."""


def paper_scores(task: str, *, thinking: bool) -> dict[str, float]:
    """The paper's scores of a task, by model."""
    table = _table()
    return table.paper_scores(task, thinking=thinking) if table else {}


def category_field(task: str) -> str:
    """The field of a task's documents that names their category."""
    table = _table()
    row = table.benchmark(task) if table else None
    return row.category_field if row else CATEGORY_FIELD


def _table() -> ModuleType | None:
    return importlib.import_module(BENCHMARKS) if importlib.util.find_spec(BENCHMARKS) else None
