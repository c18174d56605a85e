"""The rows of one source, in our form: question, answer, domain, source.

Files are read by `data.prompts`, data sets of the hub and folders by the `datasets` library. A conversation loses its
closing answers, for a prompt ends with the user; one that then is a single question becomes text.

    rows = open_source(Source(name="own", path="questions.jsonl", domain="math"))
    rows.num_rows                             # 7500
    for place, row in rows.read(0, 1000):     # ("questions.jsonl:1", {"question": ..., "domain": "math", ...})
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_opdlm.data.preparation.codeforces import codeforces_row
from megatron_opdlm.data.preparation.mixes import Source
from megatron_opdlm.data.prompts import Row, read_rows

if TYPE_CHECKING:
    from datasets import Dataset


class SourceRows:
    """An opened source; rows are read in parts."""

    def __init__(self, source: Source, rows: list[Row] | Dataset, fingerprint: str) -> None:
        """`rows` as the source has them; `fingerprint` changes with their content."""
        self.source, self.fingerprint, self.num_rows = source, fingerprint, len(rows)
        self._rows = rows

    def read(self, start: int, stop: int) -> Iterator[Row]:
        """The rows from a number, counted from 0, up to another, each with its place; {} for one that has no prompt."""
        if isinstance(self._rows, list):
            numbered = iter(self._rows[start:stop])
        else:
            part = self._rows.select(range(start, min(stop, self.num_rows)))
            numbered = ((f"{self.source.path}: row {number}", row) for number, row in enumerate(part, start=start + 1))
        for place, row in numbered:
            yield place, our_form(row, self.source) if isinstance(row, dict) else {}


def open_source(source: Source) -> SourceRows:
    """Opens a file or a data set.

    Raises:
        ValueError: it is not there or cannot be read.
    """
    if source.is_file:
        rows = list(read_rows(source.path))
        return SourceRows(source, rows, hashlib.sha256(Path(source.path).read_bytes()).hexdigest())
    import datasets

    files = {"data_files": source.data_file} if source.data_file else {}
    try:
        dataset = datasets.load_dataset(source.path, source.config, split=source.split, **files)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"source {source.name}: the data set {source.path} cannot be read ({error}); without a network, give the "
            f"path of a file in a mix of your own"
        ) from error
    return SourceRows(source, dataset, dataset._fingerprint)


def our_form(row: dict[str, Any], source: Source) -> dict[str, Any]:
    """The row's question, answer, domain and source; {} for a problem that programs cannot be judged on.

    A question, domain or source of a wrong type is left to `data.prompts.check_row`.
    """
    if source.domain == "codeforces":
        row = codeforces_row(row)
        if not row:
            return {}
    answer = _field(row, source, "ground_truth_answer")
    return {
        "question": _prompt_of(_field(row, source, "question")),
        "ground_truth_answer": answer if answer is None or isinstance(answer, str) else json.dumps(answer, default=str),
        "domain": _field(row, source, "domain") or source.domain,
        "source": _field(row, source, "source") or source.name,
    }


def _field(row: dict[str, Any], source: Source, name: str) -> Any:
    value: Any = row
    for key in source.fields.get(name, name).split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _prompt_of(question: Any) -> Any:
    """A conversation up to the last turn of the user, as text if that is all there is besides empty messages."""
    if not isinstance(question, list) or not all(isinstance(message, dict) for message in question):
        return question
    turns = list(itertools.dropwhile(lambda message: message.get("role") == "assistant", reversed(question)))[::-1]
    said = [{"role": turn.get("role"), "content": turn.get("content")} for turn in turns if turn.get("content") != ""]
    return said[0]["content"] if len(said) == 1 and said[0]["role"] == "user" else said
