"""The tests of a code task's row, from the forms that data sets have them in.

read_tests({"input_output": '{"inputs": ["1"], "outputs": ["2"], "fn_name": null}'})
# CodeTests(inputs=["1"], accepted=[["2"]], function=None)
unpack_private_tests("eJxr...")        # LiveCodeBench's compressed tests, without running what a pickle may hold
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import pickle
import zlib
from dataclasses import dataclass
from typing import Any

# More than any task has; a stream that unpacks to more is not one of tests.
LARGEST_TESTS = 1 << 30


@dataclass(frozen=True)
class CodeTests:
    """Tests of one task.

    Example: CodeTests(inputs=["3\\n"], accepted=[["6", "7"]], function=None) reads standard input, and two outputs are
    accepted. With `function="add"`, an input has a JSON value per line, one for each argument.
    """

    inputs: list[str]
    accepted: list[list[str]]
    function: str | None


def read_tests(row: dict[str, Any]) -> CodeTests:
    """The tests of a row of LiveCodeBench, of Codeforces or of the public evaluation data.

    | fields | as in |
    | --- | --- |
    | `public_test_cases`, `private_test_cases`, `metadata.func_name` | livecodebench/code_generation_lite |
    | `input_output`: `inputs`, `outputs`, `fn_name` | LiveCodeBench's own samples |
    | `test_input`, `test_output`, `function` | divelab/opdlm_eval_data |
    | `official_tests` or `tests`: `input`, `output` or `outputs` | open-r1/codeforces |

    ValueError for a row without tests, or whose tests cannot be read.
    """
    if "public_test_cases" in row:
        return _livecodebench_tests(row)
    if "input_output" in row:
        table = _parsed(row["input_output"])
        return _tests(table["inputs"], table["outputs"], table.get("fn_name"))
    if "test_input" in row:
        return _tests(row["test_input"], row["test_output"], row.get("function"))
    cases = _parsed(row.get("official_tests") or row.get("tests") or [])
    return _tests([case["input"] for case in cases], [case.get("outputs", case.get("output")) for case in cases], None)


def _tests(inputs: list, outputs: list, function: str | None) -> CodeTests:
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(f"a code task must have tests, as many inputs ({len(inputs)}) as outputs ({len(outputs)})")
    return CodeTests(
        inputs=[_text(value) for value in inputs],
        accepted=[[_text(item) for item in value] if isinstance(value, list) else [_text(value)] for value in outputs],
        function=function,
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _parsed(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _livecodebench_tests(row: dict[str, Any]) -> CodeTests:
    private = row.get("private_test_cases") or []
    cases = [*_parsed(row["public_test_cases"]), *(unpack_private_tests(private) if private else [])]
    function = _parsed(row.get("metadata") or {}).get("func_name")
    return _tests([case["input"] for case in cases], [case["output"] for case in cases], function)


def unpack_private_tests(packed: str | list) -> list[dict[str, Any]]:
    """LiveCodeBench's `private_test_cases`: a list, JSON of it, or base64 of zlib of a pickle of JSON.

    The pickle may hold one text and nothing else: ValueError if it names anything to import, which is how a pickle runs
    code.
    """
    if isinstance(packed, list):
        return packed
    if packed.lstrip().startswith("["):
        return json.loads(packed)
    try:
        stream = zlib.decompressobj().decompress(base64.b64decode(packed, validate=True), LARGEST_TESTS)
        text = _TextUnpickler(io.BytesIO(stream)).load()
    except (binascii.Error, zlib.error, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"private_test_cases cannot be read: {error}") from error
    if not isinstance(text, str):
        raise ValueError(f"private_test_cases must hold a text, not {type(text).__name__}")
    return json.loads(text)


class _TextUnpickler(pickle.Unpickler):
    """Builds texts, numbers, lists and the like, which need no import."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it would import {module}.{name}, and tests are a text")
