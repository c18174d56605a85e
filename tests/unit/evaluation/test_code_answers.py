"""Right, wrong, crashing and slow answers to a task of each code benchmark, in the benchmark's own row format."""

from __future__ import annotations

import json

import pytest

from megatron_opdlm.evaluation import code_answers, sandbox
from megatron_opdlm.evaluation.code_answers import (
    check_codeforces,
    check_humaneval,
    check_livecodebench,
    check_mbpp,
    extract_program,
    run_checker,
    sanitize,
)
from megatron_opdlm.evaluation.sandbox import Isolation

HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def halves(xs):\n    """Half of each."""\n',
    "canonical_solution": "    return [x / 2 for x in xs]\n",
    "entry_point": "halves",
    "base_input": [[[1, 2]]],
    "plus_input": [[[]], [[-3, 0.1]]],
    "atol": 0,
}
MBPP = {  # 106: the second argument is a tuple, which the file has as a list
    "task_id": "Mbpp/106",
    "prompt": '"""\\nAdd the list to the tuple.\\n"""\n',
    "canonical_solution": "def add_lists(items, row):\n    return row + tuple(items)\n",
    "entry_point": "add_lists",
    "base_input": [[[5, 6, 7], [9, 10]]],
    "plus_input": [[[], [1]]],
    "atol": 0,
}
STDIN = {
    "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n"}]),
    "private_test_cases": json.dumps([{"input": "20 22\n", "output": "42"}]),
    "metadata": "{}",
}
FUNCTION = {
    "public_test_cases": json.dumps([{"input": "[1, 2]\n3", "output": "[4, 5]"}]),
    "private_test_cases": json.dumps([{"input": "[]\n1", "output": "[]"}]),
    "metadata": json.dumps({"func_name": "shift"}),
}
CODEFORCES = {"tests": [{"input": "6\n", "outputs": ["2 3", "3 2"]}], "time_limit": 1.0, "memory_limit": 256.0}
CHECKER = (
    "import sys\n"
    "n = int(open(sys.argv[1]).read())\n"
    "with open(sys.argv[3]) as file: a, b = map(int, file.read().split())\n"
    "print(1 if a * b == n else 0)\n"
)


@pytest.fixture(autouse=True)
def short_limits(monkeypatch):
    monkeypatch.setattr(code_answers, "TEST_SECONDS", 2.0)


def fenced(program: str) -> str:
    return f"First ```x = 1``` is not it.\n```python\nnot this one\n```\nBut\n```python\n{program}\n```\nis."


@pytest.fixture
def evalplus():
    return pytest.importorskip("evalplus")


@pytest.mark.parametrize(
    ("text", "base", "plus"),
    [
        ("def halves(xs):\n    return [x / 2 for x in xs]\n```\nDone.", True, True),
        ("Sure!\n```python\ndef halves(xs):\n    return [x * 0.5 for x in xs]\n```", True, True),
        ("def halves(xs):\n    return [0.5, 1.0]\n", True, False),
        ("def halves(xs):\n    return xs\n", False, False),
        ("def halves(xs):\n    return 1 / 0\n", False, False),
        ("def halves(xs):\n    while True: pass\n", False, False),
        ("import os\nx = os._exit(0)\ndef halves(xs):\n    return x\n", False, False),
        ("I do not know.", False, False),
        ("", False, False),
    ],
)
def test_humaneval_answers(evalplus, text, base, plus):
    assert check_humaneval(HUMANEVAL, text) == {"base": base, "plus": plus}


@pytest.mark.parametrize(
    ("program", "base", "plus"),
    [
        ("def add_lists(a, b):\n    return b + tuple(a)", True, True),
        ("def add_lists(a, b):\n    return b + (5, 6, 7)", True, False),
        ("def add_lists(a, b):\n    return list(b) + a", False, False),
        ("def add_lists(a, b):\n    return undefined", False, False),
        ("import time\ndef add_lists(a, b):\n    time.sleep(60)\n    return b + tuple(a)", False, False),
    ],
)
def test_mbpp_answers(evalplus, program, base, plus):
    assert check_mbpp(MBPP, f"```python\n{program}\n```") == {"base": base, "plus": plus}


def test_a_row_whose_own_solution_fails_is_refused(evalplus):
    row = HUMANEVAL | {"canonical_solution": "    return 1 / 0\n"}
    with pytest.raises(ValueError, match="HumanEval/0: its canonical_solution fails for base_input 0"):
        check_humaneval(row, "def halves(xs):\n    return 1\n")


def test_the_program_is_what_evalplus_extracts(evalplus):
    from evalplus.sanitize import sanitize as theirs

    text = (
        "Here:\n```python\nimport os\ndef g(x):\n    return x\ndef f(x):\n    return g(x)\nprint(f(1))\n```\nIt works."
    )
    assert sanitize(text, "f") == theirs(text, "f")
    assert "print" not in sanitize(text, "f")


@pytest.mark.parametrize(
    ("program", "is_right"),
    [
        ("print(sum(map(int, input().split())))", True),
        ("if __name__ == '__main__':\n    print(reduce(add, map(int, sys.stdin.read().split())))", True),
        ("from __future__ import annotations\nprint(eval(input().replace(' ', '+')))\nexit()", True),
        ("print(3)", False),
        ("print(sum(map(int, input().split())))\n1 / 0", False),
        ("print(sum(map(int, input().split())), flush=True)\nwhile True: pass", False),
        ("import os\nos._exit(0)", False),
    ],
)
def test_livecodebench_programs(program, is_right):
    assert check_livecodebench(STDIN, fenced(program)) is is_right


@pytest.mark.parametrize(
    ("program", "is_right"),
    [
        ("class Solution:\n    def shift(self, xs: List[int], by: int):\n        return [x + by for x in xs]", True),
        ("def shift(xs, by): return tuple(x + by for x in xs)", True),
        ("def shift(xs, by): return [4, 5]", False),
        ("def shift(xs, by): raise ValueError", False),
        ("def shift(xs, by):\n    while True: pass", False),
        ("class All:\n    def __eq__(self, other): return True\ndef shift(xs, by): return All()", False),
    ],
)
def test_livecodebench_functions(program, is_right):
    assert check_livecodebench(FUNCTION, fenced(program)) is is_right


@pytest.mark.parametrize(
    ("program", "is_right"),
    [
        ("print(2, 3)", True),
        ("print('3   2')", True),
        ("print(1, 6)", False),
        ("print(2, 3)\nraise SystemExit(1)", False),
        ("import time\nprint(2, 3, flush=True)\ntime.sleep(60)", False),
    ],
)
def test_codeforces_answers(program, is_right):
    assert check_codeforces(CODEFORCES, fenced(program)) is is_right


@pytest.mark.parametrize(
    ("program", "is_right"), [("print(1, 6)", True), ("print(1, 5)", False), ("print('x')", False)]
)
def test_a_checker_decides_where_the_row_has_one(program, is_right):
    row = {"tests": [{"input": "6", "output": "2 3"}], "generated_checker": CHECKER}
    assert check_codeforces(row, fenced(program)) is is_right


def test_a_checker_that_says_nothing_accepts_nothing():
    assert not run_checker("pass", "1", "1", "1")
    assert not run_checker("print('ok')", "1", "1", "1")


def test_a_response_without_a_closed_block_has_no_program():
    assert extract_program("print(3)") is None
    assert extract_program("```python\nprint(3)") is None
    assert extract_program("```python\na\n```\n```\nb\nc\n```") == "b\nc"
    assert not check_livecodebench(STDIN, "print(sum(map(int, input().split())))")


def test_answers_are_judged_the_same_without_namespaces(monkeypatch):
    way = Isolation(namespaces=False, seccomp=True, landlock=True)
    monkeypatch.setattr(sandbox, "isolation", lambda: way)
    assert check_livecodebench(STDIN, fenced("print(sum(map(int, input().split())))"))
    assert check_livecodebench(FUNCTION, fenced("def shift(xs, by): return [x + by for x in xs]"))
    assert check_codeforces({"tests": CODEFORCES["tests"], "checker": CHECKER}, fenced("print(6, 1)"))
    assert not check_codeforces(CODEFORCES, fenced("print(6, 1)"))
