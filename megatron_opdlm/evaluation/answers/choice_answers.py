"""Which letter does a response choose? The first rule that finds one decides; within a rule the last find counts.

1. a letter in a box: `\\boxed{C}`, `\\boxed{\\text{(c)}}`;
2. an answer field: `"answer": "C"`, `**Answer:** (C)`, `answer = c`;
3. a sentence: `the answer is C`, `the correct answer is option **C**`, capitals only;
4. the last capital that stands alone: `So C fits best.`

Only letters that the benchmark offers count, so that "I" is not taken for an answer among A to D.

    choice_answer('A looks right, but "answer": "C"', "ABCD")     # "C"
    choice_answer("I do not know", "ABCD")                        # None
"""

from __future__ import annotations

import re
from functools import cache


def choice_answer(text: str, letters: str) -> str | None:
    """The chosen one of `letters`, None if there is none."""
    for rule in _rules(letters):
        found = rule.findall(text)
        if found:
            return found[-1].upper()
    return None


def right_letter(answer: str) -> str:
    """The letter of a row's `ground_truth_answer`, which may be written "C", "c" or "(C)"."""
    return answer.strip().strip("().").upper()


@cache
def _rules(letters: str) -> tuple[re.Pattern[str], ...]:
    either, capital = f"[{letters.upper()}{letters.lower()}]", f"[{letters.upper()}]"
    alone, marks = r"(?![A-Za-z0-9_'’])", r"[\s*\"'`$(\[]*"
    return (
        re.compile(rf"\\boxed\s*\{{\s*(?:\\(?:text|math)[a-z]*\s*\{{)?\s*\(?({either}){alone}"),
        re.compile(rf"(?i:\banswer\b)[\s*\"'`)\]]*[:=：]{marks}(?i:option|choice|letter)?{marks}({either}){alone}"),
        re.compile(rf"(?i:\banswer\s+is\b)[\s:.]*{marks}(?i:option|choice|letter)?{marks}({capital}){alone}"),
        re.compile(rf"(?<![A-Za-z0-9_'’])({capital}){alone}"),
    )
