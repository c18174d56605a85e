"""The paper's benchmarks in one table: their tasks, data files and limits, and the scores that the paper reports.

The tasks themselves are YAML files in lm-eval's format in `evaluation/tasks`; loading their rows, the tables in README
files and results, and the tests all read this table.

Example:

    benchmark("opdlm_gsm8k").file                    # "GSM8K.json"
    benchmark("opdlm_gsm8k").scores["OPDLM-4B"]      # 87.6
    benchmark("gsm8k")                               # None: not one of ours
    python -m megatron_opdlm.evaluation.benchmarks   # the tables of the README, as Markdown

Source: arXiv 2606.06712, tables 1 (main), 2 (thinking), 3 (multilingual) and 5 (mathematics); scores in percent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TASKS_FOLDER = Path(__file__).with_name("tasks")
"""What lm-eval's `TaskManager(include_path=...)` and its command line's `--include_path` take."""

MODELS = ("SDAR-4B", "OPDLM-4B", "LLaDA-8B", "Dream-7B", "SDAR-8B", "Fast-dLLM-v2-7B", "OPDLM-8B")
MULTILINGUAL_MODELS = ("SDAR-4B", "OPDLM-4B", "Fast-dLLM-v2-7B", "SDAR-8B", "OPDLM-8B")
TRAINING_TOKENS = dict(zip(MODELS, (55e9, 0.076e9, 1500e9, 580e9, 55e9, 1e9, 0.066e9), strict=True))
TRAINING_FLOPS = dict(zip(MODELS, (1320e18, 2.4e18, 72000e18, 24360e18, 2640e18, 42e18, 4.2e18), strict=True))


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark. Example: `Benchmark(name="GSM8K", task="opdlm_gsm8k", file="GSM8K.json", domain="math")`."""

    name: str
    """As the paper spells it."""
    task: str
    """Name of the lm-eval task."""
    file: str
    """File of its rows in `evaluation.data_dir`, as in the data set `divelab/opdlm_eval_data`."""
    domain: str
    """What it asks for: knowledge, instructions, math, logic, code, multilingual, or mixed."""
    max_new_tokens: int = 16000
    """Most tokens of a response, as in the public launchers of the 4B and 8B models."""
    metric: str = "accuracy"
    """What the headline score `accuracy` is, in words."""
    letters: str = ""
    """The letters that may be chosen; empty where nothing is chosen."""
    parenthesised: bool = False
    """Options are written "(A) ..." in the rows and "A. ..." in the prompt."""
    runs_code: bool = False
    """Programs of the responses are run, in the sandbox."""
    category_field: str = "subdivision"
    """Field of the rows by which scores are broken down."""
    scores: dict[str, float] = field(default_factory=dict)
    """The paper's score of each model, in percent; models without a score are left out."""


def _row(models: Sequence[str], scores: Iterable[float | None]) -> dict[str, float]:
    return {model: score for model, score in zip(models, scores, strict=True) if score is not None}


def _main(*scores: float | None) -> dict[str, float]:
    return _row(MODELS, scores)


def _multilingual(*scores: float) -> dict[str, float]:
    return _row(MULTILINGUAL_MODELS, scores)


MAIN = (
    Benchmark(
        name="MMLU",
        task="opdlm_mmlu",
        file="MMLU.json",
        domain="knowledge",
        letters="ABCD",
        parenthesised=True,
        scores=_main(74.9, 65.5, 65.5, 67.0, 78.6, 66.6, 70.9),
    ),
    Benchmark(
        name="MMLU-Pro",
        task="opdlm_mmlu_pro",
        file="MMLU_Pro.json",
        domain="knowledge",
        letters="ABCDEFGHIJ",
        parenthesised=True,
        scores=_main(50.9, 46.3, 37.0, 43.3, 56.9, 41.5, 53.7),
    ),
    Benchmark(
        name="GPQA-Diamond",
        task="opdlm_gpqa_diamond",
        file="GPQA_Diamond_shuffled.json",
        domain="knowledge",
        letters="ABCD",
        parenthesised=True,
        scores=_main(33.0, 29.1, 31.8, 32.1, 40.2, 27.3, 36.1),
    ),
    Benchmark(
        name="IFEval",
        task="opdlm_ifeval",
        file="IFEval.json",
        domain="instructions",
        metric="prompts with every instruction followed, strict",
        scores=_main(56.6, 53.8, 59.9, 62.5, 61.4, 65.4, 50.1),
    ),
    Benchmark(
        name="C-Eval",
        task="opdlm_ceval",
        file="CEval.json",
        domain="knowledge",
        letters="ABCD",
        scores=_main(62.9, 66.9, None, None, 70.2, 70.3, 73.3),
    ),
    Benchmark(
        name="LiveBench",
        task="opdlm_livebench",
        file="LiveBench.json",
        domain="mixed",
        runs_code=True,
        metric="mean score, which may be a part of a point",
        category_field="livebench_category",
        scores=_main(25.3, 27.8, None, None, 28.6, 9.5, 25.8),
    ),
    Benchmark(
        name="GSM8K",
        task="opdlm_gsm8k",
        file="GSM8K.json",
        domain="math",
        scores=_main(89.9, 87.6, 78.6, 81.0, 91.3, 83.7, 87.1),
    ),
    Benchmark(
        name="MATH-500",
        task="opdlm_math500",
        file="MATH500.json",
        domain="math",
        scores=_main(72.8, 72.8, 26.6, 39.2, 78.6, 65.6, 71.2),
    ),
    Benchmark(
        name="AIME-24",
        task="opdlm_aime24",
        file="AIME2024.json",
        domain="math",
        scores=_main(10.0, 14.4, 2.1, 0.0, 10.0, 10.0, 14.7),
    ),
    Benchmark(
        name="AIME-25",
        task="opdlm_aime25",
        file="AIME2025.json",
        domain="math",
        scores=_main(7.5, 12.6, 0.4, 0.0, 10.0, 0.0, 12.4),
    ),
    Benchmark(
        name="LMB-Hard",
        task="opdlm_livemathbench_hard",
        file="LiveMathBench_Hard.json",
        domain="math",
        scores=_main(6.9, 11.1, None, None, 8.9, 8.9, 20.0),
    ),
    Benchmark(
        name="ZebraLogic",
        task="opdlm_zebralogic",
        file="ZebraLogic.json",
        domain="logic",
        metric="puzzles with every cell right",
        scores=_main(6.3, 10.5, None, None, 7.8, 3.5, 12.9),
    ),
    Benchmark(
        name="HumanEval (base)",
        task="opdlm_humaneval",
        file="HumanEval.json",
        domain="code",
        runs_code=True,
        metric="programs that pass the base tests; `plus_accuracy` those that pass EvalPlus's too",
        scores=_main(76.8, 56.1, 35.4, 57.9, 82.3, 63.4, 59.8),
    ),
    Benchmark(
        name="MBPP (base)",
        task="opdlm_mbpp",
        file="MBPP.json",
        domain="code",
        runs_code=True,
        metric="programs that pass the base tests; `plus_accuracy` those that pass EvalPlus's too",
        scores=_main(80.7, 57.7, 31.5, 68.3, 79.6, 63.0, 48.7),
    ),
    Benchmark(
        name="LCB-v6",
        task="opdlm_livecodebench_v6",
        file="LCB_v6.json",
        domain="code",
        runs_code=True,
        metric="programs that pass all tests",
        category_field="platform",
        scores=_main(12.6, 10.4, None, None, 14.5, 9.7, 9.7),
    ),
    Benchmark(
        name="Codeforces",
        task="opdlm_codeforces",
        file="Codeforces.json",
        domain="code",
        runs_code=True,
        metric="programs that pass all tests",
        category_field="platform",
        scores=_main(4.0, 5.0, None, None, 5.8, 5.0, 3.5),
    ),
)

MULTILINGUAL = (
    Benchmark(
        name="MMMLU-lite",
        task="opdlm_mmmlu_lite",
        file="MMMLU_Lite.json",
        domain="multilingual",
        letters="ABCD",
        scores=_multilingual(50.7, 51.6, 51.5, 60.8, 56.0),
    ),
    Benchmark(
        name="INCLUDE-lite",
        task="opdlm_include_lite",
        file="INCLUDE_Lite.json",
        domain="multilingual",
        letters="ABCD",
        scores=_multilingual(53.3, 49.6, 45.1, 57.8, 51.9),
    ),
    Benchmark(
        name="MT-AIME-24",
        task="opdlm_mt_aime24",
        file="MT_AIME2024.json",
        domain="multilingual",
        scores=_multilingual(3.0, 5.3, 4.3, 4.0, 7.9),
    ),
    Benchmark(
        name="MLogiQA",
        task="opdlm_mlogiqa",
        file="MLogiQA.json",
        domain="multilingual",
        letters="ABCD",
        scores=_multilingual(46.5, 46.5, 42.6, 46.3, 42.0),
    ),
)

BENCHMARKS = MAIN + MULTILINGUAL

GROUPS = {
    "opdlm": tuple(row.task for row in MAIN),
    "opdlm_multilingual": tuple(row.task for row in MULTILINGUAL),
    "opdlm_math": ("opdlm_gsm8k", "opdlm_math500", "opdlm_aime24"),
}
"""The groups of tasks: the paper's tables 1, 3 and 5."""

MATH_MODELS = {
    "OPDLM-MATH-4B": (83.8, 75.8, 10.0),
    "OPDLM-MATH-4B-Thinking": (91.7, 90.2, 43.3),
    "OPDLM-MATH-8B": (86.2, 76.6, 23.3),
    "OPDLM-MATH-8B-Thinking": (93.8, 92.4, 50.0),
    "TraDo-4B": (91.2, 75.6, 8.3),
    "TraDo-8B": (92.3, 78.5, 13.3),
    "TraDo-8B-Thinking": (94.2, 87.4, 35.5),
    "SDAR-4B-Chat": (90.2, 70.2, 5.0),
    "SDAR-8B-Chat": (91.1, 74.3, 11.8),
}
"""Scores on the tasks of the group `opdlm_math`, in its order."""

THINKING = {
    "opdlm_aime24": {"OPDLM-4B": 11.2, "OPDLM-8B": 18.6},
    "opdlm_aime25": {"OPDLM-4B": 13.6, "OPDLM-8B": 19.4},
}
"""Scores with `data.enable_thinking`, of models trained without."""


def benchmark(task: str) -> Benchmark | None:
    """The row of a task, None for a task that is not the paper's."""
    return next((row for row in BENCHMARKS if row.task == task), None)


def category_field(task: str) -> str:
    """The field of a task's rows that names their category; `category` for tasks that are not in the table."""
    row = benchmark(task)
    return row.category_field if row else "category"


def runs_code(task: str) -> bool:
    """Whether the task runs programs that responses hold, or parts of them."""
    row = benchmark(task)
    return row is not None and row.runs_code


def paper_scores(task: str, *, thinking: bool = False) -> dict[str, float]:
    """Every score that the paper reports for a task, in percent, by model; empty for a task that is not the paper's."""
    if thinking:
        return THINKING.get(task, {})
    row = benchmark(task)
    scores = dict(row.scores) if row else {}
    if task in GROUPS["opdlm_math"]:
        column = GROUPS["opdlm_math"].index(task)
        scores |= {model: figures[column] for model, figures in MATH_MODELS.items()}
    return scores


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; None in a cell is shown as a dash."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join("-" if cell is None else str(cell) for cell in line) + " |" for line in lines)


def task_table() -> str:
    """What each task reads and reports."""
    rows = [
        [row.name, f"`{row.task}`", f"`{row.file}`", row.domain, row.max_new_tokens, row.metric] for row in BENCHMARKS
    ]
    return markdown_table(["benchmark", "task", "file", "domain", "new tokens", "`accuracy` is"], rows)


def score_table(rows: Sequence[Benchmark], models: Sequence[str]) -> str:
    """The paper's scores of some benchmarks for some models, in percent."""
    return markdown_table(["benchmark", *models], [[row.name, *map(row.scores.get, models)] for row in rows])


def math_table() -> str:
    """The paper's scores of models trained on mathematics, in percent."""
    names = [row.name for task in GROUPS["opdlm_math"] if (row := benchmark(task))]
    return markdown_table(["model", *names], [[model, *figures] for model, figures in MATH_MODELS.items()])


def thinking_table() -> str:
    """The paper's scores without and with thinking, in percent."""
    pairs = [(row, THINKING[row.task]) for row in MAIN if row.task in THINKING]
    rows = [[row.name, model, row.scores[model], score] for row, table in pairs for model, score in table.items()]
    return markdown_table(["benchmark", "model", "without", "with thinking"], rows)


def readme_tables() -> str:
    """The generated part of `evaluation/README.md`."""
    parts = [
        task_table(),
        "The paper's scores, in percent:",
        score_table(MAIN, MODELS),
        score_table(MULTILINGUAL, MULTILINGUAL_MODELS),
        thinking_table(),
        math_table(),
    ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(readme_tables())
