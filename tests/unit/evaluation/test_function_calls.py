"""Calling functions of unknown intent: what comes back, and what does not pass for a result."""

from __future__ import annotations

import json
import time

import pytest

from megatron_opdlm.evaluation.function_calls import call_function
from megatron_opdlm.evaluation.inside.values import Opaque, decode, encode
from megatron_opdlm.evaluation.sandbox import Limits


def results(source: str, calls: list, entry: str = "f", seconds: float = 5.0) -> list:
    returned = call_function(source, entry, calls, seconds=[seconds] * len(calls), limits=Limits(seconds=10))
    return [one.value for one in returned]


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 3, 2**100, -(2**64), 0.1, float("inf"), "é\ud800\n", b"\x00", 1 + 2j),
        *([1, [2]], (1, (2,)), {1, "a"}, {(1, 2): {3}}, [], (), set(), {}),
    ],
)
def test_a_value_is_the_same_on_the_other_side(value):
    back = decode(json.loads(json.dumps(encode(value))))
    assert back == value
    assert type(back) is type(value)


def test_other_values_equal_nothing_but_keep_their_items():
    assert list(decode(encode(map(str, [1, 2])))) == ["1", "2"]
    assert isinstance(decode(encode(object())), Opaque)
    assert decode(encode(object())) != decode(encode(object()))


@pytest.mark.parametrize("form", [{"eval": "1"}, {}, {"int": "x"}, {"dict": [1]}, {"set": [[1]]}, {"a": 1, "b": 2}])
def test_a_form_that_nobody_writes_is_refused(form):
    with pytest.raises((ValueError, TypeError)):
        decode(form)


def test_a_function_is_called_once_for_each_list_of_arguments(way):
    assert results("def f(a, b=1):\n    return [a + b]", [[1, 2], [3]]) == [[3], [4]]


def test_a_method_of_the_class_solution_is_found(way):
    assert results("class Solution:\n    def f(self, a): return (a, {a})", [[1]]) == [(1, {1})]


def test_results_end_before_the_first_call_that_raises(way):
    assert results("def f(a): return 1 // a", [[1], [0], [1]]) == [1]


def test_a_slow_call_ends_the_results_and_the_next_ones_are_not_made(way):
    started = time.monotonic()
    source = "def f(a):\n    while a: pass\n    return a"
    returned = call_function(source, "f", [[0], [1], [0]], seconds=[0.2] * 3, limits=Limits(seconds=100))
    assert [one.value for one in returned] == [0]
    assert time.monotonic() - started < 50


@pytest.mark.parametrize(
    "source",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "raise SystemExit(0)",
        "import os, sys\nsys.exit = lambda *a: None\nos._exit = lambda *a: None",
        "import atexit\natexit.register(print, 'passed')",
        "def g(): return 7",
        "def f(): import os; os.kill(os.getpid(), 9)",
        "f = (",
    ],
)
def test_a_program_without_the_function_has_no_results(way, source):
    assert results(source, [[]]) == []


def test_what_a_program_prints_is_not_taken_for_a_result(way):
    assert results('print(\'{"value": 1, "seconds": 0}\')\ndef f(): print(2); return 3', [[]]) == [3]


def test_a_program_that_replaces_json_and_print_does_not_change_what_is_expected(way):
    source = "import json\njson.dumps = lambda *a: 'passed'\ndef f(): return 3"
    assert results(source, [[]]) == []


def test_an_object_that_equals_everything_is_not_equal_here(way):
    number = "class All(int):\n    def __eq__(self, other): return True\ndef f(): return All(1)"
    assert results(number, [[]]) != [2]
    anything = "class All:\n    def __eq__(self, other): return True\ndef f(): return [All()]"
    assert results(anything, [[]]) != [[2]]
