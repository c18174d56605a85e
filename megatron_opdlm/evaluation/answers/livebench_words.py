"""LiveBench tasks whose answer is words, letters or numbers: where each looks for it, and what it gives.

A scorer takes a row and the response's text and gives 0 to 1. Most tasks ask for `<solution>...</solution>`, with a box
or bold print as a second choice.

    row = {"ground_truth_answer": "yes, no, yes"}
    web_of_lies(row, "Hence **yes, no, yes**.")      # 1.0
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Sequence
from typing import Any

from megatron_opdlm.evaluation.answers.math_answers import boxes

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TEENS = ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_NUMBERS = (*_DIGITS, *_TEENS, "twenty")


def solutions(text: str) -> list[str]:
    """What stands in `<solution>` tags, on one line each; an opening tag written as a closing one is forgiven."""
    return re.findall(r"<solution>(.*?)</solution>", text) or re.findall(r"</solution>(.*?)</solution>", text)


def last_box(text: str) -> str | None:
    """The last box, without `\\text{}` and backslashes; None if there is none."""
    found = boxes(text)
    return re.sub(r"\\(?:text|mathrm|textbf|mathbf)\{|[}\\]", "", found[-1][2]) if found else None


def math_competition(row: dict[str, Any], text: str) -> float:
    """A letter from A to E (AMC) or a number of three digits (AIME)."""
    right = str(row["ground_truth_answer"]).strip()
    return _letter_choice(right, row["question"], text) if right in set("ABCDE") else _three_digits(right, text)


def _letter_choice(right: str, question: str, text: str) -> float:
    """Tagged, four times in a row, in a box, by its value at the end, or on the last line alone or in parentheses."""
    tagged = solutions(text)
    if (tagged and set(tagged[-1].lower()) == {right.lower()}) or right * 4 in text:
        return 1.0
    if (last_box(text) or "").lower() == right.lower():
        return 1.0
    value = _value_of_choice(question, right)
    if value and value in text[-20 - len(value) :]:
        return 1.0
    last_line = text.strip().split("\n")[-1]
    parenthesised = re.search(r"\(([^)]*)\)", last_line)
    alone = last_line.strip().replace("*", "")
    return float(right.lower() in (alone.lower(), parenthesised[1].lower() if parenthesised else ""))


def _value_of_choice(question: str, letter: str) -> str:
    """What the question lists for a letter, as in `\\textbf{(A) } 12 \\qquad`; empty if it is not found."""
    listed = re.findall(r"\\textbf\{\(([A-E])\)\s?\}(.*?)(?:\\qquad|\$)", question)
    return dict(listed).get(letter, "").strip().strip("$").strip("~")


def _three_digits(right: str, text: str) -> float:
    """Tagged, or among the last 50 characters."""
    tagged = solutions(text)
    return float((bool(tagged) and tagged[-1].strip() == right) or right in text[-50:])


def olympiad(row: dict[str, Any], text: str) -> float:
    """The order of a proof's expressions: 1 minus the edit distance over the longer list's length."""
    right = [int(number) for number in str(row["ground_truth_answer"]).split(",")]
    said = _listed_numbers(text)
    return 1 - edit_distance(said, right) / max(len(said), len(right))


def _listed_numbers(text: str) -> list[int | None]:
    """Numbers separated by commas: after the last line's "answer:", in a box, or on the last line; None: no number."""
    lines = text.lower().strip().split("\n")
    marked = [index for index, line in enumerate(lines) if "answer:" in line]
    places = []
    if marked:
        after = lines[marked[-1]].partition("answer:")[2].strip(" *.")
        places.append(after or " ".join(lines[marked[-1] + 1 : marked[-1] + 2]))
    places += [box for box in [last_box(text)] if box] + lines[-1:]
    for place in places:
        numbers = [re.search(r"\d+", part.strip().rpartition(" ")[2]) for part in place.split(",")]
        if any(numbers):
            return [int(number[0]) if number else None for number in numbers]
    return []


def edit_distance(left: Sequence[object], right: Sequence[object]) -> int:
    """The fewest insertions, deletions and replacements that turn one sequence into the other."""
    costs = list(range(len(right) + 1))
    for row, item in enumerate(left, start=1):
        diagonal, costs[0] = costs[0], row
        for column, other in enumerate(right, start=1):
            cheapest = diagonal if item == other else 1 + min(diagonal, costs[column], costs[column - 1])
            diagonal, costs[column] = costs[column], cheapest
    return costs[-1]


def zebra_puzzle(row: dict[str, Any], text: str) -> float:
    """Half for all answers right, half for the share that is; before 2024-11-25 one word, all or nothing."""
    if str(row.get("livebench_release_date") or "")[:10] < "2024-11-25":
        return _one_zebra_word(row["ground_truth_answer"].lower(), text)
    right = [word.strip().lower().replace("-", " ") for word in row["ground_truth_answer"].split(",")]
    said = _zebra_words(text, len(right))
    num_right = sum(word in other.lower().replace("-", " ") for word, other in zip(right, said, strict=False))
    return ((num_right == len(right)) + num_right / len(right)) / 2


def _zebra_words(text: str, num_words: int) -> list[str]:
    tagged = solutions(text)
    if len(tagged) > 1:
        return ",".join(tagged).split(",")[-num_words:]
    last_line = text.strip().split("\n")[-1]
    place = tagged[-1] if tagged else last_box(text)
    if place is None:
        place = last_line if last_line.count(",") == num_words - 1 else ""
    return place.split(",")


def _one_zebra_word(right: str, text: str) -> float:
    """The last word in `***bold***`, or else the last word; digits may be spelt out."""
    said = (re.findall(r"\*\*\*(\w+)\*\*\*", text) or re.findall(r"\b\w+\b", text) or [""])[-1].lower()
    return float(right in (said, f"{said} movies", _NUMBERS[int(said)] if re.fullmatch("[1-9]", said) else said))


def web_of_lies(row: dict[str, Any], text: str) -> float:
    """Three of yes, no and unknown: tagged, the last three in bold, in a box, or the last such triple."""
    right, said = row["ground_truth_answer"].lower(), _three_verdicts(text)
    num_verdicts = sum(said.count(word) for word in ("yes", "no", "unknown")) - said.count("unknown")
    return float(said == right or (num_verdicts == 3 and right in said))


def _three_verdicts(text: str) -> str:
    tagged = solutions(text)
    if tagged and tagged[-1].strip():
        return tagged[-1]
    bold = [re.sub("[.,]", "", word.lower()) for part in re.findall(r"\*\*(.*?)\*\*", text) for word in part.split()]
    verdicts = [word for word in bold if word in ("yes", "no", "unknown")]
    if verdicts:
        return ", ".join(verdicts[-3:])
    box = last_box(text)
    if box:
        return box
    triples = (", ".join(words) for words in itertools.product(["yes", "no", "unknown"], repeat=3))
    place, triple = max((text.lower().find(triple), triple) for triple in triples)
    return triple if place >= 0 else ""


def spatial(row: dict[str, Any], text: str) -> float:
    """One of the last three bold words, digits or spelt out, with some slack for names of solids; or the box."""
    right = row["ground_truth_answer"].strip().lower()
    bold = [word.strip().lower() for word in re.findall(r"\*\*([^*]+)\*\*", text)[-3:]]
    figures = [str(_NUMBERS.index(word)) for word in bold if word in _NUMBERS]
    slack = right in ("tetrahedra", "tetrahedron", "triangle", "square") and any(
        right in word and len(word) < 2 * len(right) + 5 for word in bold
    )
    found = text.strip().lower() == right or right in bold + figures or slack
    return float(found or (last_box(text) or "").strip().lower() == right)


def connections(row: dict[str, Any], text: str) -> float:
    """The share of groups of four that are right, in any order; before 2024-11-25 the best of the bold lists."""
    right = _groups_of_four(row["ground_truth_answer"].split(","))
    if str(row.get("livebench_release_date") or "")[:10] < "2024-11-25":
        lists = [bold.split(",") for bold in re.findall(r"\*\*(.*?)\*\*", text.replace("\n", ""))]
    else:
        lists = [_tagged_words(text, num_words=len(row["ground_truth_answer"].split(",")))]
    return max((sum(group in _groups_of_four(words) for group in right) / len(right) for words in lists), default=0.0)


def _groups_of_four(words: list[str]) -> list[set[str]]:
    plain = [word.strip().lower() for word in words]
    return [set(plain[start : start + 4]) for start in range(0, len(plain), 4)]


def _tagged_words(text: str, num_words: int) -> list[str]:
    tagged = solutions(text) or solutions(text.replace("\n", "")) or [box for box in [last_box(text)] if box]
    words = [word for part in tagged for word in part.replace("\n", "").split(",")]
    return words[-num_words:] if len(tagged) > 1 else words


def plot_unscrambling(row: dict[str, Any], text: str) -> float:
    """1 minus the edit distance between the right order of sentences and the response's, over their number."""
    tagged = re.search(r"<PLOT_SUMMARY>(.*?)(?:</PLOT_SUMMARY>|$)", text, re.DOTALL)
    right = _sentences(row["ground_truth_answer"])
    said = _sentences(tagged[1] if tagged else text)
    closest = [difflib.get_close_matches(sentence, said, n=1, cutoff=0.0) for sentence in right]
    order = [said.index(match[0]) for match in closest if match]
    return 1 - edit_distance(range(len(right)), order) / len(right)


def _sentences(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(".")]
    return [part for part in parts if part and part != "**End of Plot Summary**"]


def typos(row: dict[str, Any], text: str) -> float:
    """The corrected text, word for word, somewhere in the answer."""
    tagged = solutions(text)
    said = tagged[-1] if tagged else re.sub(r"</?solution>", "", text)
    return float(row["ground_truth_answer"] in " ".join(line for line in said.strip().split("\n") if line))


def column_type(row: dict[str, Any], text: str) -> float:
    """The last words of the box, or else of the text, are the column's type; letters and digits alone count."""
    right, said = (re.sub(r"\W", "", part.lower()) for part in (row["ground_truth_answer"], last_box(text) or text))
    return float(said.endswith(right))
