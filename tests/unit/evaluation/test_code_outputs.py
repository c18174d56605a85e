"""When an output counts as right: each rule on pairs judged by hand, and evalplus's against evalplus."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_opdlm.evaluation.code_outputs import EvalPlusRule, same_lines, same_tokens, same_value
from megatron_opdlm.evaluation.inside.values import Opaque, Series


@pytest.mark.parametrize(
    ("output", "expected", "is_same"),
    [
        ("1\n2\n", "1\n2", True),
        (" 1 \n2\n\n", "1\n2", True),
        ("1.0 2", "1 2.00", True),
        ("a b", "a b", True),
        ("1 2", "1\n2", False),
        ("1\n\n2", "1\n2", False),
        ("a  b", "a b", False),
        ("0.3333333", "0.333333", False),
        ("Yes", "YES", False),
        ("", "1", False),
    ],
)
def test_lines_are_the_same_as_text_or_as_numbers(output, expected, is_same):
    assert same_lines(output, expected) is is_same


@pytest.mark.parametrize(
    ("output", "expected", "is_same"),
    [
        ("1 2\n\n3", "1\n2 3\n", True),
        ("0.3333333", "0.333333", True),
        ("1000000.5", "1000001.0", True),
        ("0.33", "0.333333", False),
        ("1.0", "1", False),
        ("1000001", "1000000", False),
        ("nan", "1.0", False),
        ("YES", "yes", False),
        ("1 2", "1 2 3", False),
    ],
)
def test_tokens_are_the_same_up_to_spacing_and_rounding(output, expected, is_same):
    assert same_tokens(output, expected) is is_same


def test_a_function_may_return_a_tuple_for_a_list():
    assert same_value((1, 2), [1, 2])
    assert not same_value([(1, 2)], [[1, 2]])
    assert not same_value(0.1 + 0.2, 0.3)


EVALPLUS_CASES = [
    # data set, function, tolerance, arguments, value, expected, is right
    ("humaneval", "f", 0, [1], [1, 2], [1, 2], True),
    ("humaneval", "f", 0, [1], (1, 2), [1, 2], False),
    ("humaneval", "f", 0, [1], 0.3, 0.1 + 0.2, True),
    ("humaneval", "f", 0, [1], 0.3001, 0.3, False),
    ("humaneval", "f", 0, [1], 1, 1.0, True),
    ("humaneval", "f", 0, [1], 1, 1.0000001, False),
    ("humaneval", "f", 0.01, [1], [0.301, 1.0], [0.3, 1.0], True),
    ("humaneval", "f", 0.01, [1], [0.3], [0.3, 1.0], False),
    ("humaneval", "f", 0, [1], None, 1, False),
    ("humaneval", "f", 0, [1], "a", 0.5, False),
    ("humaneval", "f", 0, [1], True, 1, True),
    ("humaneval", "find_zero", 1e-4, [[-2, 1]], 2.00001, 2.0, True),
    ("humaneval", "find_zero", 1e-4, [[-2, 1]], 2.1, 2.0, False),
    ("humaneval", "find_zero", 1e-4, [[-2, 1]], None, 2.0, False),
    ("mbpp", "Diff", 0, [[1], [2]], [2, 1], [1, 2], True),
    ("mbpp", "Diff", 0, [[1], [2]], [2], [1, 2], False),
    ("mbpp", "Diff", 0, [[1], [2]], 3, [1, 2], False),
    ("mbpp", "check_str", 0, ["a"], "anything", True, True),
    ("mbpp", "check_str", 0, ["a"], None, True, False),
    ("mbpp", "check_str", 0, ["a"], False, True, False),
    ("mbpp", "are_equivalent", 0, [1, 2], 7, True, True),
    ("mbpp", "sum_div", 0, [8], 0, 7, True),
    ("mbpp", "sum_div", 0, [8], 6, 7, False),
    ("mbpp", "surface_Area", 0, [4, 3], 44, 33, False),
    ("mbpp", "surface_Area", 0, [4, 3], 45, 33, True),
    ("mbpp", "digit_distance_nums", 0, [1, 23], 4, 1, True),
    ("mbpp", "digit_distance_nums", 0, [1, 23], 5, 1, False),
]


@pytest.mark.parametrize(("data_set", "entry", "atol", "arguments", "value", "expected", "is_right"), EVALPLUS_CASES)
def test_values_are_right_by_evalplus_rules(data_set, entry, atol, arguments, value, expected, is_right):
    pytest.importorskip("evalplus")
    assert EvalPlusRule(data_set, entry, atol).holds(arguments, value, expected) is is_right


@pytest.mark.parametrize(("data_set", "entry", "atol", "arguments", "value", "expected", "is_right"), EVALPLUS_CASES)
def test_evalplus_itself_judges_the_same(data_set, entry, atol, arguments, value, expected, is_right, monkeypatch):
    evaluation = pytest.importorskip("evalplus.eval")
    monkeypatch.setattr(evaluation, "reliability_guard", lambda **options: None)  # it would disarm this process

    def execute(code, scope):
        scope[entry] = lambda *arguments: value

    monkeypatch.setattr(evaluation, "exec", execute, raising=False)
    status, progress = SimpleNamespace(value=None), SimpleNamespace(value=0)
    evaluation.unsafe_execute(data_set, entry, "", [arguments], [expected], [5.0], atol, True, status, [0], progress)
    assert (status.value == evaluation._SUCCESS) is is_right


def test_the_tolerance_stays_once_floats_were_expected():
    pytest.importorskip("evalplus")
    rule = EvalPlusRule("humaneval", "f", 0)
    big = 10**9
    assert not rule.holds([], big + 1, big)
    assert rule.holds([], 0.5, 0.5)
    assert rule.holds([], big + 1, big)


def test_what_has_no_plain_form_counts_as_something_but_equals_nothing():
    pytest.importorskip("evalplus")
    assert EvalPlusRule("mbpp", "check_str", 0).holds(["a"], Opaque("Match"), True)
    assert not EvalPlusRule("mbpp", "f", 0).holds(["a"], Opaque("Match"), Opaque("Match"))
    assert EvalPlusRule("mbpp", "Diff", 0).holds([[1], [2]], Series([1, 2]), [2, 1])
