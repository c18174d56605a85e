"""Whether a response's program is right: HumanEval, MBPP, LiveCodeBench and Codeforces, run in the sandbox.

    check_humaneval(row, response_text)        # {"base": True, "plus": False}
    check_livecodebench(row, response_text)    # True

The program gets inputs and nothing else; what it returns or prints is compared here, outside. So it cannot pass by
ending early, by printing a verdict, or by changing what compares.
"""

from __future__ import annotations

import functools
import json
from typing import Any, Literal

from megatron_opdlm.evaluation.code_outputs import EvalPlusRule, same_lines, same_tokens, same_value
from megatron_opdlm.evaluation.code_rows import CodeTests, read_tests
from megatron_opdlm.evaluation.function_calls import Returned, call_function
from megatron_opdlm.evaluation.sandbox import Limits, run_program

EvalPlusSet = Literal["humaneval", "mbpp"]

# evalplus 0.3.1, config.py: a call may take this long, or so many times the reference's time, whichever is longer; all
# calls together a minute.
EVALPLUS_CALL_SECONDS, EVALPLUS_TIME_FACTOR, EVALPLUS_TASK_SECONDS = 1.0, 4.0, 60.0
SANITIZE_SECONDS = REFERENCE_SECONDS = 60.0
# LiveCodeBench's limit of one test.
TEST_SECONDS = 6.0

_STAR_MODULES = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random"),
    *("statistics", "itertools", "functools", "operator", "io", "sys", "json", "builtins", "typing"),
)


def check_humaneval(row: dict[str, Any], text: str) -> dict[str, bool]:
    """Whether the response passes HumanEval's tests, and with them those that evalplus adds.

    `row` is one of evalplus's HumanEvalPlus.jsonl: `task_id`, `prompt`, `entry_point`, `canonical_solution`,
    `base_input`, `plus_input`, `atol`. ValueError if its reference fails or evalplus is not installed.
    """
    return _check_evalplus("humaneval", row, text)


def check_mbpp(row: dict[str, Any], text: str) -> dict[str, bool]:
    """The same for a row of evalplus's MbppPlus.jsonl."""
    return _check_evalplus("mbpp", row, text)


def _check_evalplus(data_set: EvalPlusSet, row: dict[str, Any], text: str) -> dict[str, bool]:
    solution = sanitize(text, row["entry_point"])
    passes_base = solution is not None and _passes(data_set, row, solution, "base_input")
    return {"base": passes_base, "plus": passes_base and _passes(data_set, row, solution, "plus_input")}


def sanitize(text: str, entry: str) -> str | None:
    """evalplus's extraction of a program from a response: the longest run of lines that parse, less what is not needed.

    It parses what a model has written, which can take time or memory without end, so it runs in the sandbox. None if it
    fails there.
    """
    _import_evalplus()
    outcome = run_program(_SANITIZE, stdin=json.dumps([text, entry]), limits=Limits(seconds=SANITIZE_SECONDS))
    return json.loads(outcome.stdout) if outcome.verdict == "ok" else None


# evalplus imports datasets, which takes a second, for downloads alone.
_SANITIZE = """
import json, sys, types
sys.modules["datasets"] = types.SimpleNamespace(load_dataset=None)
from evalplus.sanitize import sanitize
print(json.dumps(sanitize(*json.load(sys.stdin))))
"""


def _import_evalplus() -> None:
    try:
        import evalplus.sanitize  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "HumanEval and MBPP need evalplus: pip install --no-deps -r requirements/evalplus.txt"
        ) from error


def _passes(data_set: EvalPlusSet, row: dict[str, Any], solution: str, inputs: str) -> bool:
    """Whether a program gives what the reference gives, for all of a row's `base_input` or `plus_input`."""
    rule = EvalPlusRule(data_set, row["entry_point"], row["atol"])
    calls = _calls(data_set, row, inputs)
    needed = {key: row[key] for key in ("task_id", "prompt", "canonical_solution", "entry_point", inputs)}
    references = _reference_results(data_set, json.dumps(needed), inputs)
    seconds = [max(EVALPLUS_CALL_SECONDS, EVALPLUS_TIME_FACTOR * reference.seconds) for reference in references]
    limits = Limits(seconds=min(EVALPLUS_TASK_SECONDS, sum(seconds)) + 2)
    results = call_function(solution, row["entry_point"], calls, seconds=seconds, limits=limits)
    return len(results) == len(calls) and all(
        rule.holds(arguments, result.value, rule.expected(reference.value))
        for arguments, result, reference in zip(calls, results, references, strict=True)
    )


def _calls(data_set: EvalPlusSet, row: dict[str, Any], inputs: str) -> list:
    """The arguments of each call; MBPP's file has lists where its functions take tuples, sets or complex numbers."""
    if data_set == "humaneval":
        return row[inputs]
    from evalplus.data.mbpp import mbpp_deserialize_inputs

    return mbpp_deserialize_inputs(row["task_id"], row[inputs])


@functools.lru_cache(maxsize=1024)
def _reference_results(data_set: EvalPlusSet, row_json: str, inputs: str) -> list[Returned]:
    """What the row's own solution returns, run once for all responses to it."""
    row = json.loads(row_json)
    calls = _calls(data_set, row, inputs)
    solution = row["prompt"] + row["canonical_solution"]
    seconds = [REFERENCE_SECONDS] * len(calls)
    results = call_function(
        solution, row["entry_point"], calls, seconds=seconds, limits=Limits(seconds=2 * REFERENCE_SECONDS)
    )
    if len(results) != len(calls):
        raise ValueError(f"{row['task_id']}: its canonical_solution fails for {inputs} {len(results)}")
    return results


def check_livecodebench(row: dict[str, Any], text: str) -> bool:
    """Whether the response's last fenced block passes all of a row's tests, public and private, 6 s each.

    `row`: see `code_rows.read_tests`. A function, or a method of the class `Solution`, gets the JSON values of an
    input's lines; any other program gets the input on standard input. Both find the modules imported that
    LiveCodeBench imports for them.
    """
    program = extract_program(text)
    tests = read_tests(row)
    if program is None:
        return False
    if tests.function is not None:
        return _passes_calls(program, tests)
    source = f"{_PRELUDE}\nexec(compile({program!r}, 'solution.py', 'exec', dont_inherit=True), globals())\n"
    return all(
        any(same_lines(output, expected) for expected in accepted)
        for output, accepted in _outputs(source, tests, Limits(seconds=TEST_SECONDS))
    )


# Source: LiveCodeBench, lcb_runner/evaluation/testing_util.py, which puts these before a program.
_PRELUDE = "\n".join(
    [f"from {name} import *" for name in _STAR_MODULES]
    + [f"import {name}" for name in _STAR_MODULES if name not in ("builtins", "typing")]
    + ["sys.setrecursionlimit(50000)"]
)


def extract_program(text: str) -> str | None:
    """What stands between the last two lines with ``` in a response, as LiveCodeBench takes it; None without them."""
    lines = text.split("\n")
    fences = [index for index, line in enumerate(lines) if "```" in line]
    return "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) > 1 else None


def _passes_calls(program: str, tests: CodeTests) -> bool:
    calls = [[json.loads(line) for line in value.split("\n") if line.strip()] for value in tests.inputs]
    source = f"{_PRELUDE}\nexec(compile({program!r}, 'solution.py', 'exec', dont_inherit=True), globals())\n"
    results = call_function(source, tests.function, calls, seconds=[TEST_SECONDS] * len(calls))
    return len(results) == len(calls) and all(
        any(same_value(result.value, json.loads(expected)) for expected in accepted)
        for result, accepted in zip(results, tests.accepted, strict=True)
    )


def _outputs(source: str, tests: CodeTests, limits: Limits):
    """(standard output, accepted outputs) of each test; one that does not end well gives an output nobody accepts."""
    for value, accepted in zip(tests.inputs, tests.accepted, strict=True):
        outcome = run_program(source, stdin=value, limits=limits)
        yield outcome.stdout, accepted if outcome.verdict == "ok" else []


def check_codeforces(row: dict[str, Any], text: str) -> bool:
    """Whether the response's last fenced block passes all of a row's tests, as a program of standard input and output.

    `row`: see `code_rows.read_tests`; besides `time_limit` in seconds, of which no test gets less than 6, and
    `memory_limit` in MB, which an interpreter's start raises by 256. Where the row has a `generated_checker` (Python;
    its arguments are the files with the input, the expected and the program's output, and it prints 1 for a right one),
    that decides; otherwise one of the accepted outputs must match word for word (`code_outputs.same_tokens`).
    """
    program = extract_program(text)
    tests = read_tests(row)
    if program is None:
        return False
    limits = Limits(
        seconds=max(TEST_SECONDS, float(row.get("time_limit") or 0)),
        memory_mib=256 + int(row.get("memory_limit") or 1024),
    )
    checker = row.get("generated_checker") or row.get("checker")
    return all(
        _is_accepted(checker, value, output, accepted)
        for value, (output, accepted) in zip(tests.inputs, _outputs(program, tests, limits), strict=True)
    )


def _is_accepted(checker: str | None, value: str, output: str, accepted: list[str]) -> bool:
    if checker is None:
        return any(same_tokens(output, expected) for expected in accepted)
    return any(run_checker(checker, value, expected, output) for expected in accepted)


def run_checker(checker: str, value: str, expected: str, output: str) -> bool:
    """Whether a row's checker accepts an output: whether the last word it prints is a number that is at least 1.

    It runs in the sandbox too, since it reads what a program of unknown intent has written. It finds its files by
    name, in memory.
    """
    files = {"input.txt": value, "correct_output.txt": expected, "solution_output.txt": output}
    outcome = run_program(_CHECKER.format(files=files, checker=checker), limits=Limits(seconds=2 * TEST_SECONDS))
    words = outcome.stdout.split()
    try:
        return outcome.verdict == "ok" and bool(words) and float(words[-1]) >= 1
    except ValueError:
        return False


_CHECKER = """
import builtins, io, sys
_files, _open = {files!r}, builtins.open
def _open_in_memory(file, mode="r", *rest, **options):
    if file not in _files:
        return _open(file, mode, *rest, **options)
    return io.BytesIO(_files[file].encode()) if "b" in mode else io.StringIO(_files[file])
builtins.open = io.open = _open_in_memory
sys.argv = ["checker.py", *_files]
exec(compile({checker!r}, "checker.py", "exec", dont_inherit=True), globals())
"""
