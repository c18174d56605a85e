"""Is a response's mathematical answer the right one? Read and compared by math-verify.

The answer is the last `\\boxed{...}` of the response. Boxes that follow each other with no more than a comma, "and" or
"or" between them are one answer with several values. Without a box it is what math-verify finds in the text, as an
expression or as LaTeX. math-verify alone would take all boxes of a line for one set, so that a response which corrects
itself, "\\boxed{3}. Wait: \\boxed{4}", could never be right.

Example:

    check_math("\\\\frac{1}{2}", "Half of it, so \\\\boxed{0.5}.")      # MathVerdict(is_correct=True, answer="0.5")

sympy can take for ever, also where no signal interrupts it (`9^{9^{9}}`), and math-verify's own time limit works in the
main thread only. Evaluations therefore call `math_process.MathProcess`, which runs this file as a program of its own, a
line of JSON in and one out per check. So it imports nothing of this package, which would load torch.
"""

from __future__ import annotations

import json
import re
import resource
import sys
from dataclasses import asdict, dataclass
from typing import Any

MEMORY_LIMIT = 4 << 30
"""Bytes of address space that the program may have."""
_LONGEST_ANSWER = 1000
_BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
_BETWEEN_VALUES = re.compile(r"[\s$,;]*(?:and|or)?[\s$,;]*")


@dataclass(frozen=True)
class MathVerdict:
    """Example: `MathVerdict(is_correct=True, answer="1/2")`."""

    is_correct: bool
    """The answer equals the right one."""
    answer: str | None
    """The answer in sympy's notation, the same for equal numbers; None if there is none."""


def check_math(right_answer: str, text: str) -> MathVerdict:
    """Compares the answer in `text` with `right_answer`, a number or LaTeX without `\\boxed`."""
    from math_verify import verify

    right = _parse_box("\\boxed{" + str(right_answer) + "}")
    found = parse_answer(text)
    answer = str(found[0]) if found else None
    return MathVerdict(is_correct=bool(found) and bool(verify(right, found)), answer=answer)


def parse_answer(text: str) -> list[Any]:
    """What math-verify makes of the answer in `text`: an expression and the string it was read from; empty if none."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    boxed = last_boxes(text)
    if boxed:
        return _parse_box(boxed)
    return parse(text, extraction_config=[ExprExtractionConfig(), LatexExtractionConfig()])


def boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of each `\\boxed{...}` or `\\fbox{...}`, whose braces balance, in order."""
    found = []
    for match in _BOX.finditer(text):
        end = _closing_brace(text, match.end())
        if end is not None:
            found.append((match.start(), end + 1, text[match.end() : end]))
    return found


def _closing_brace(text: str, start: int) -> int | None:
    depth = 1
    for place in range(start, len(text)):
        if text[place] in "{}":
            depth += 1 if text[place] == "{" else -1
        if depth == 0:
            return place
    return None


def last_boxes(text: str) -> str:
    """The last box of a text with those that belong to it, as `\\boxed{3}, \\boxed{4}`; empty if there is none.

    Empty boxes do not count.
    """
    found = [box for box in boxes(text) if box[2].strip()]
    if not found:
        return ""
    values, start = [found[-1][2]], found[-1][0]
    for box_start, box_end, content in reversed(found[:-1]):
        if not _BETWEEN_VALUES.fullmatch(text[box_end:start]):
            break
        values.insert(0, content)
        start = box_start
    return ", ".join("\\boxed{" + value + "}" for value in values)


def _parse_box(boxed: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    return parse(boxed, extraction_config=[LatexExtractionConfig(boxed_match_priority=0)])


def serve() -> None:
    """Answers each line of standard input, `[right answer, text]`, with a verdict, until there are no more."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    for line in sys.stdin:
        verdict = asdict(check_math(*json.loads(line)))
        verdict["answer"] = verdict["answer"] and verdict["answer"][:_LONGEST_ANSWER]
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    serve()
