"""Reading the tests of code tasks: every form gives the same tests, and a pickle runs nothing."""

from __future__ import annotations

import base64
import json
import pickle
import zlib

import pytest

from megatron_opdlm.evaluation.code_rows import CodeTests, read_tests, unpack_private_tests

CASES = [{"input": "1\n", "output": "2\n", "testtype": "stdin"}, {"input": "5", "output": "6", "testtype": "stdin"}]
WANTED = CodeTests(inputs=["1\n", "5"], accepted=[["2\n"], ["6"]], function=None)


def packed(value) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


@pytest.mark.parametrize(
    "row",
    [
        {"public_test_cases": json.dumps(CASES[:1]), "private_test_cases": packed(json.dumps(CASES[1:]))},
        {"public_test_cases": CASES[:1], "private_test_cases": json.dumps(CASES[1:]), "metadata": "{}"},
        {"public_test_cases": json.dumps(CASES), "private_test_cases": ""},
        {"input_output": json.dumps({"inputs": ["1\n", "5"], "outputs": ["2\n", "6"], "fn_name": None})},
        {"test_input": ["1\n", "5"], "test_output": ["2\n", "6"]},
        {"official_tests": CASES},
        {"tests": [{"input": "1\n", "outputs": ["2\n"]}, CASES[1]]},
    ],
)
def test_every_form_of_a_row_gives_the_same_tests(row):
    assert read_tests(row) == WANTED


def test_the_function_comes_from_the_metadata():
    row = {"public_test_cases": CASES, "metadata": '{"func_name": "add"}'}
    assert read_tests(row).function == "add"


def test_several_outputs_of_a_test_are_all_accepted():
    assert read_tests({"tests": [{"input": "1", "outputs": ["a", "b"]}]}).accepted == [["a", "b"]]


class Evil:
    def __reduce__(self):
        return print, ("this ran",)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (packed(Evil()), "it would import builtins.print"),
        (packed({"a": Evil()}), "it would import builtins.print"),
        (packed(["a"]), "must hold a text, not list"),
        ("not base64!", "cannot be read"),
        (base64.b64encode(b"not zlib").decode(), "cannot be read"),
        (base64.b64encode(zlib.compress(b"not pickle")).decode(), "cannot be read"),
    ],
)
def test_tests_that_are_no_packed_text_are_refused_and_nothing_runs(text, reason, capsys):
    with pytest.raises(ValueError, match=reason):
        unpack_private_tests(text)
    assert capsys.readouterr().out == ""


def test_a_row_without_tests_is_refused():
    with pytest.raises(ValueError, match=r"must have tests, as many inputs \(0\) as outputs \(0\)"):
        read_tests({"question": "?"})
