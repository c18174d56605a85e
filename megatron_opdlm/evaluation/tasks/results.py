"""What a response scores: a judge for each kind of benchmark, and lm-eval's `process_results` made of it.

A judge takes a row and a response and gives scores from 0 to 1, of which `accuracy` is what the paper reports. Where
there is something to vote on it also gives `answer`: the answer that was read, in a spelling that equal answers share,
or None. `process_results` of the tasks takes one response or a list of them; for a list every value is a list, in its
order. The tasks' aggregation of `answer` is the share of responses that have one.

Example:

    row = {"ground_truth_answer": "18", ...}
    math(row, ["It is \\\\boxed{18}."])                         # {"accuracy": 1.0, "answer": "18"}
    math(row, [["It is \\\\boxed{18}.", "I do not know."]])     # {"accuracy": [1.0, 0.0], "answer": ["18", None]}
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from megatron_opdlm.evaluation.answers.choice_answers import choice_answer, right_letter
from megatron_opdlm.evaluation.answers.final_text import final_text
from megatron_opdlm.evaluation.answers.instruction_answers import follow_instructions
from megatron_opdlm.evaluation.answers.livebench_answers import score_livebench
from megatron_opdlm.evaluation.answers.math_process import shared_math_process
from megatron_opdlm.evaluation.answers.zebra_answers import zebra_cells

Row = dict[str, Any]
Scores = dict[str, float | str | None]
Judge = Callable[[Row, str], Scores]


def judge_math(row: Row, response: str) -> Scores:
    """Equal as mathematics; see `math_answers.py`."""
    verdict = shared_math_process().check(row["ground_truth_answer"], final_text(response))
    return {"accuracy": float(verdict.is_correct), "answer": verdict.answer}


def judge_choice(row: Row, response: str) -> Scores:
    """The right letter; see `choice_answers.py`."""
    letter = choice_answer(final_text(response), row["letters"])
    return {"accuracy": float(letter == right_letter(row["ground_truth_answer"])), "answer": letter}


def judge_instructions(row: Row, response: str) -> Scores:
    """Whether all instructions are followed, and the share that is; see `instruction_answers.py`."""
    followed = follow_instructions(row, final_text(response))
    return {"accuracy": float(all(followed)), "instruction_accuracy": sum(followed) / len(followed)}


def judge_zebra(row: Row, response: str) -> Scores:
    """Whether all cells are right, and the share that is; see `zebra_answers.py`."""
    right = row["ground_truth_answer"]
    num_right, num_cells = zebra_cells(json.loads(right) if isinstance(right, str) else right, final_text(response))
    return {"accuracy": float(num_right == num_cells), "cell_accuracy": num_right / num_cells}


def judge_livebench(row: Row, response: str) -> Scores:
    """The mean score, which may be a part of a point, and whether it is above one half; see `livebench_answers.py`."""
    score = score_livebench(row, final_text(response))
    return {"accuracy": score, "passed": float(score > 0.5)}


def judge_humaneval(row: Row, response: str) -> Scores:
    """Whether the program passes the base tests, and EvalPlus's tests too; see `code_answers.py`."""
    from megatron_opdlm.evaluation.code_answers import check_humaneval

    return _base_and_plus(check_humaneval(row, final_text(response)))


def judge_mbpp(row: Row, response: str) -> Scores:
    """As `judge_humaneval`."""
    from megatron_opdlm.evaluation.code_answers import check_mbpp

    return _base_and_plus(check_mbpp(row, final_text(response)))


def _base_and_plus(passed: dict[str, bool]) -> Scores:
    return {"accuracy": float(passed["base"]), "plus_accuracy": float(passed["base"] and passed["plus"])}


def judge_livecodebench(row: Row, response: str) -> Scores:
    """Whether the program passes all tests; see `code_answers.py`."""
    from megatron_opdlm.evaluation.code_answers import check_livecodebench

    return {"accuracy": float(check_livecodebench(row, final_text(response)))}


def judge_codeforces(row: Row, response: str) -> Scores:
    """Whether the program passes all tests; see `code_answers.py`."""
    from megatron_opdlm.evaluation.code_answers import check_codeforces

    return {"accuracy": float(check_codeforces(row, final_text(response)))}


def share_answered(answers: list[str | None]) -> float:
    """The share of responses in which an answer was found."""
    return sum(answer is not None for answer in answers) / len(answers)


def _process_results(decide: Judge) -> Callable[[Row, list[Any]], dict[str, Any]]:
    def process_results(doc: Row, results: list[Any]) -> dict[str, Any]:
        if isinstance(results[0], str):
            return decide(doc, results[0])
        scores = [decide(doc, response) for response in results[0]]
        return {name: [score[name] for score in scores] for name in scores[0]}

    return process_results


math = _process_results(judge_math)
choice = _process_results(judge_choice)
instructions = _process_results(judge_instructions)
zebra = _process_results(judge_zebra)
livebench = _process_results(judge_livebench)
humaneval = _process_results(judge_humaneval)
mbpp = _process_results(judge_mbpp)
livecodebench = _process_results(judge_livecodebench)
codeforces = _process_results(judge_codeforces)
