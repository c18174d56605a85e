"""LiveBench tasks about tables: mapping the columns of one table to another's, and writing a table in another format.

row = {"ground_truth_answer": "{'id': 'key', 'name': 'title'}"}
table_join(row, "<solution>{'id': 'key', 'name': 'author'}</solution>")      # 0.5
"""

from __future__ import annotations

import ast
import csv
import itertools
import json
import math
import re
from html.parser import HTMLParser
from typing import Any

from megatron_opdlm.evaluation.answers.math_answers import boxes

Table = list[dict[str, Any]]
"""Rows, each a dictionary by column."""


def table_join(row: dict[str, Any], text: str) -> float:
    """F1 of the pairs of columns, rounded to two digits; 0 if no dictionary can be read."""
    right = row["ground_truth_answer"]
    right = right if isinstance(right, dict) else ast.literal_eval(right)
    said = _dictionary(text)
    num_right = sum(right.get(column) == other for column, other in said.items())
    num_wrong = len(said) - num_right
    num_missed = sum(not said.get(column) for column in right) + sum(
        column in right and right[column] != other for column, other in said.items()
    )
    return round(2 * num_right / (2 * num_right + num_wrong + num_missed), 2) if said else 0.0


def _dictionary(text: str) -> dict[str, str]:
    """The mapping in the last tags, fence or box, or the whole text as one; columns mapped to nothing are left out."""
    tagged = re.findall(r"<solution>(.*?)</solution>", text, re.DOTALL)
    text = tagged[-1].strip() if tagged else text
    fenced = re.findall(r"```(?:python|json)?(.*?)```", text, re.DOTALL)
    boxed = [re.sub(r"\\text\{['\"](.*?)['\"]\}", r"'\1'", box).replace("\\", "") for _, _, box in boxes(text)]
    for place in [text, *fenced[-1:], *boxed[-1:]]:
        try:
            found = ast.literal_eval(place.replace("\n", " ").replace("null", "None").strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(found, dict):
            return {key: value for key, value in found.items() if value is not None}
    return {}


def table_reformat(row: dict[str, Any], text: str) -> float:
    """1 if the table has the same columns, in any order, and the same cells; its format is named in the question."""
    target = _target_format(row["question"])
    right = _read_table(target, row["ground_truth_answer"].strip())
    assert right is not None, f"the right answer is a table in {target}"
    return float(any(_equal_tables(said, right) for said in _tables_in(target, text, list(right[0]))))


def _target_format(question: str) -> str:
    """`json`, `jsonl`, `html`, `csv`, `tsv` or `markdown`, in either wording of the benchmark's releases."""
    worded = re.search(r"Please convert the Input Table from .*? format to (\w+) format", question)
    listed = re.findall(r"Target Format:\s*(\w+)", question)
    if not worded and not listed:
        raise ValueError("a LiveBench tablereformat question must name the format of the table it wants")
    return (listed[-1] if listed else worded[1]).lower()


def _tables_in(target: str, text: str, columns: list[str]) -> list[Table]:
    """What could be the table in a response: all of it, cleaned, and the most that is a table from its header on."""
    text = _clean(text)
    tables = [_read_table(target, text)]
    if target in ("csv", "tsv"):
        header = {"csv": ",", "tsv": "\t"}[target].join(columns)
        lines = [line.strip() for line in text.split("\n")]
        if header in lines:
            after = lines[lines.index(header) :]
            parts = (_read_table(target, "\n".join(after[:end])) for end in range(len(after), 1, -1))
            tables.append(next(filter(None, parts), None))
    if target == "jsonl":
        tables.append(
            _read_table(target, "\n".join(line for line in text.split("\n") if re.match(r"\s*\{.*\}\s*$", line)))
        )
    return [table for table in tables if table is not None]


def _clean(text: str) -> str:
    """The last tags' content, in it the last JSON or HTML fence's, without other fences and an introducing phrase."""
    tagged = re.findall(r"<solution>(.*?)</solution>", text, re.DOTALL)
    text = tagged[-1].strip() if tagged else text
    fenced = re.findall(r"```(?:json|html)\n(.*?)```", text, re.DOTALL)
    text = fenced[-1] if fenced else re.sub(r"^```.*\n", "", text).replace("```", "").strip()
    text = re.sub(r"^\s*(?:Here|Input)\b.*?\b(?:format|table)\s*[:)]\s*", "", text, flags=re.IGNORECASE)
    return text.replace("&amp;", "&").strip()


def _read_table(target: str, text: str) -> Table | None:
    """The table in a text, None if the text is no table; a column that only numbers the rows, `index`, is left out."""
    reader = {"json": _read_json, "jsonl": _read_json_lines, "html": _read_html, "markdown": _read_markdown}.get(target)
    if reader is None:
        lines = list(csv.reader(text.splitlines(), delimiter={"csv": ",", "tsv": "\t"}[target]))
        rows = _with_header(lines)
    else:
        rows = reader(text)
    return [{str(key).strip(): cell for key, cell in row.items() if key != "index"} for row in rows] or None


def _with_header(lines: list[list[str]]) -> Table:
    """Rows by the names in the first line; cells that are missing at a line's end are empty, too many are no table."""
    lines = [line for line in lines if line]
    if not lines or any(len(line) > len(lines[0]) for line in lines):
        return []
    return [dict(itertools.zip_longest(lines[0], line, fillvalue="")) for line in lines[1:]]


def _read_json(text: str) -> Table:
    """A list of rows, rows by their number, or pandas' `{"schema": ..., "data": [...]}`."""
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return []
    if isinstance(found, dict):
        found = found["data"] if isinstance(found.get("data"), list) else list(found.values())
    return found if isinstance(found, list) and all(isinstance(row, dict) for row in found) else []


def _read_json_lines(text: str) -> Table:
    rows = [_read_json(f"[{line}]") for line in text.split("\n") if line.strip()]
    return [row[0] for row in rows] if all(rows) else []


def _read_markdown(text: str) -> Table:
    lines = [line.strip().strip("|").split("|") for line in text.split("\n") if "|" in line]
    rules = [line for line in lines[1:2] if all(re.fullmatch(r"\s*:?-+:?\s*", cell) for cell in line)]
    return _with_header([[cell.strip() for cell in line] for line in lines if line not in rules]) if rules else []


def _read_html(text: str) -> Table:
    reader = _HtmlRows()
    reader.feed(text)
    return _with_header(reader.rows)


class _HtmlRows(HTMLParser):
    """Collects the text of the cells of each row in `rows`."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._in_cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th", "tr")

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] += data


def _equal_tables(said: Table, right: Table) -> bool:
    return len(said) == len(right) and all(
        set(row) == set(other) and all(_equal_cells(row[key], other[key]) for key in other)
        for row, other in zip(said, right, strict=True)
    )


def _equal_cells(said: Any, right: Any) -> bool:
    """Numbers within 1e-6, whether written as text or not; no value in any spelling; otherwise text without space."""
    texts = ["" if cell is None else str(cell).strip() for cell in (said, right)]
    if all(text.lower() in ("", "nan", "null", "none") for text in texts):
        return True
    try:
        return math.isclose(float(texts[0]), float(texts[1]), rel_tol=0.0, abs_tol=1e-6)
    except ValueError:
        return texts[0] == texts[1]
