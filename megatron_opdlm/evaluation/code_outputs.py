"""When an output counts as the expected one: text of programs, and values of functions.

same_lines("1.0 2\\n", "1 2")                   # True: LiveCodeBench, the numbers are equal
same_tokens("0.3333333 YES", "0.333333 YES")   # True: Codeforces, up to 1e-6
EvalPlusRule("mbpp", "f", 0.0).holds([2], 0.30000000000000004, 0.3)   # True: evalplus
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

from megatron_opdlm.evaluation.inside.values import Opaque, Series

# What Codeforces' usual checkers of real numbers allow, relative or absolute.
TOKEN_TOLERANCE = 1e-6
# What the comparison of two values of any kinds may raise.
COMPARISON_ERRORS = (TypeError, ValueError, ArithmeticError, RecursionError, AttributeError)


def same_lines(output: str, expected: str) -> bool:
    """LiveCodeBench's rule: as many lines, and in each the same text or the same numbers.

    White space around the whole and around each line does not count. Numbers are compared as decimals, exactly.
    """
    lines, wanted = output.strip().split("\n"), expected.strip().split("\n")
    return len(lines) == len(wanted) and all(
        _same_line(line.strip(), other.strip()) for line, other in zip(lines, wanted, strict=True)
    )


def _same_line(line: str, wanted: str) -> bool:
    if line == wanted:
        return True
    try:
        return [Decimal(token) for token in line.split()] == [Decimal(token) for token in wanted.split()]
    except InvalidOperation:
        return False


def same_tokens(output: str, expected: str) -> bool:
    """The rule for Codeforces: the same words, however they are spaced.

    Where the expected word is a number with a decimal point or an exponent, another number within 1e-6, relative or
    absolute, is the same.
    """
    tokens, wanted = output.split(), expected.split()
    return len(tokens) == len(wanted) and all(map(_same_token, tokens, wanted))


def _same_token(token: str, wanted: str) -> bool:
    if token == wanted:
        return True
    if not any(sign in wanted for sign in ".eE"):
        return False
    try:
        return math.isclose(float(token), float(wanted), rel_tol=TOKEN_TOLERANCE, abs_tol=TOKEN_TOLERANCE)
    except ValueError:
        return False


def same_value(value: Any, expected: Any) -> bool:
    """LiveCodeBench's rule for functions: Python's equality; a tuple counts as the list of its items."""
    try:
        return bool((list(value) if isinstance(value, tuple) else value) == expected)
    except COMPARISON_ERRORS:
        return False


class EvalPlusRule:
    """evalplus's rule for the outputs of one function, with its special cases, whose tables are evalplus's own.

    Equal values pass. Otherwise, if the task has a tolerance (`atol`; 1e-6 as soon as floats are expected), values of
    the same type that `numpy.allclose` accepts. The tolerance, once there, stays for the calls that follow.

    Source: evalplus 0.3.1, evaluate.py and eval/__init__.py (`unsafe_execute`).
    """

    def __init__(self, data_set: Literal["humaneval", "mbpp"], entry: str, atol: float) -> None:
        from evalplus.eval import _special_oracle, is_floats

        self.data_set, self.entry, self.atol = data_set, entry, atol
        self.oracles, self.is_floats = _special_oracle, is_floats

    def expected(self, value: Any) -> Any:
        """What is compared with, of the reference's output: for some functions only whether there was one."""
        return value is not None if self._asks_for_any_value else value

    @property
    def _asks_for_any_value(self) -> bool:
        return self.data_set == "mbpp" and self.entry in self.oracles.MBPP_OUTPUT_NOT_NONE_TASKS

    def holds(self, arguments: Sequence[Any], value: Any, expected: Any) -> bool:
        """Whether `value` is right for these arguments. Calls must be given in their order."""
        try:
            if self.data_set == "humaneval" and self.entry == "find_zero":
                return bool(abs(self.oracles._poly(*arguments, value)) <= self.atol)
            is_equal = self._is_equal(arguments, value, expected)
            if self.atol == 0 and self.is_floats(expected):
                self.atol = 1e-6
            return is_equal or (self.atol != 0 and self._is_close(value, expected))
        except COMPARISON_ERRORS:
            return False

    def _is_equal(self, arguments: Sequence[Any], value: Any, expected: Any) -> bool:
        if self.data_set == "mbpp":
            if self.entry in self.oracles.MBPP_OUTPUT_SET_EQ_TASKS:
                return set(value) == set(expected)
            if self._asks_for_any_value:
                return value == expected if isinstance(value, bool) else expected == (value is not None)
            if self._is_right_by_its_oracle(arguments, value):
                return True
        return not isinstance(value, Opaque | Series) and bool(value == expected)

    def _is_right_by_its_oracle(self, arguments: Sequence[Any], value: Any) -> bool:
        """For the four MBPP tasks whose statement admits another reading than the reference's."""
        if self.entry == "are_equivalent":
            return True
        if self.entry == "sum_div":
            return value == 0
        if self.entry == "surface_Area":
            return abs(value - self.oracles._surface_Area(*arguments)) <= self.atol
        return self.entry == "digit_distance_nums" and value == self.oracles._digit_distance_nums(*arguments)

    def _is_close(self, value: Any, expected: Any) -> bool:
        import numpy as np

        if type(value) is not type(expected) or (isinstance(expected, list | tuple) and len(value) != len(expected)):
            return False
        return bool(np.allclose(value, expected, rtol=1e-7, atol=self.atol))
