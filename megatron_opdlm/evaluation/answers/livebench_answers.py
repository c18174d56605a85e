"""LiveBench: the score of a response, from 0 to 1, by the rules of its task.

Each row names its category and task; a task's scorer is a function in `livebench_words` (mathematics, reasoning,
language), `livebench_tables` (data analysis), or here. They follow the rules of the official scorers (the LiveBench
repository, `livebench/process_results`) of the release of 2024-11-25, whose package is not on a package index. Where
the rules differ:

- `AMPS_Hard` is compared by math-verify; the official scorer asks sympy, and a language model where sympy cannot tell;
- instructions are checked by lm-eval's IFEval checkers, of which the official ones are a copy;
- code runs in this package's sandbox.

Several tasks give a part of a point. The score of LiveBench is the mean of these; the public OPDLM scorer counts a row
as passed above 0.5, which is kept beside it as `passed`.

    row = {"livebench_category": "language", "livebench_task": "typos", "ground_truth_answer": "It is so.", ...}
    score_livebench(row, "<solution>It is so.</solution>")      # 1.0
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from megatron_opdlm.evaluation.answers import livebench_tables, livebench_words
from megatron_opdlm.evaluation.answers.instruction_answers import follow_instructions
from megatron_opdlm.evaluation.answers.math_process import shared_math_process

Scorer = Callable[[dict[str, Any], str], float]


def score_livebench(row: dict[str, Any], text: str) -> float:
    """The score of a response to a row.

    Raises:
        ValueError: for a task that has no scorer here, with its name.
    """
    scorer = _scorer(row)
    if scorer is None:
        known = ", ".join(sorted("/".join(names) for names in SCORERS))
        names = f"{row['livebench_category']}/{row['livebench_task']}"
        raise ValueError(f"LiveBench task {names} has no scorer (there are: {known})")
    return scorer(row, text.strip())


def has_scorer(row: dict[str, Any]) -> bool:
    """Whether a row's task is one of those below; later releases of LiveBench have others."""
    return _scorer(row) is not None


def _scorer(row: dict[str, Any]) -> Scorer | None:
    category, task = row["livebench_category"], row["livebench_task"]
    return SCORERS.get((category, task)) or SCORERS.get((category, "*"))


def amps_hard(row: dict[str, Any], text: str) -> float:
    """Equal as mathematics; a constant of integration does not count."""
    right = row["ground_truth_answer"]
    right = right[-1] if isinstance(right, list) else right
    for constant in ("+C", "+ C", "+c", "+ c"):
        text = text.replace(constant, "")
    return float(shared_math_process().check(right, text).is_correct)


def instructions(row: dict[str, Any], text: str) -> float:
    """The mean of two: whether every instruction is followed, and the share that is."""
    followed = follow_instructions(row, text)
    return (all(followed) + sum(followed) / len(followed)) / 2


def code(row: dict[str, Any], text: str) -> float:
    """All tests of the problem pass; a program may be given from its start or from where `partial_solution` ends."""
    from megatron_opdlm.evaluation.code_answers import check_livecodebench, extract_program

    original = row["original_json"]
    original = json.loads(original) if isinstance(original, str) else original
    start, program = row.get("partial_solution") or "", extract_program(text)
    if program is not None and not program.startswith(start):
        text = f"```python\n{start}\n{program}\n```"
    return float(check_livecodebench(row | {"metadata": original["metadata"]}, text))


SCORERS: dict[tuple[str, str], Scorer] = {
    ("math", "AMPS_Hard"): amps_hard,
    ("math", "math_comp"): livebench_words.math_competition,
    ("math", "olympiad"): livebench_words.olympiad,
    ("reasoning", "zebra_puzzle"): livebench_words.zebra_puzzle,
    ("reasoning", "web_of_lies_v2"): livebench_words.web_of_lies,
    ("reasoning", "spatial"): livebench_words.spatial,
    ("language", "connections"): livebench_words.connections,
    ("language", "plot_unscrambling"): livebench_words.plot_unscrambling,
    ("language", "typos"): livebench_words.typos,
    ("data_analysis", "cta"): livebench_words.column_type,
    ("data_analysis", "tablejoin"): livebench_tables.table_join,
    ("data_analysis", "tablereformat"): livebench_tables.table_reformat,
    ("instruction_following", "*"): instructions,
    ("coding", "*"): code,
}
"""(category, task) -> scorer; "*" serves every task of a category."""
