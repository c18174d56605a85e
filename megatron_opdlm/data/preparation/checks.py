"""What is done with each row of a source: form, template, length, comparison with the evaluation sets.

    checks = RowChecks(tokenizer, questions, max_prompt_tokens=2048, apply_chat_template=True, enable_thinking=False)
    table = checks.examine(rows.read(0, 10000))     # one line per row, with the reason why it is dropped, or none

The table of a part of a source is all that the next stage needs of it, so it is what a stopped preparation finds again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow

from megatron_opdlm.data.preparation.overlap import EvaluationQuestions, same_key
from megatron_opdlm.data.preparation.templates import plain_text, with_template
from megatron_opdlm.data.prompts import Row, check_row, prompt_text
from megatron_opdlm.data.responses import check_characters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REASONS = {
    "malformed": "no question, or one that is no text or conversation",
    "unfit": "a program cannot be judged by its output",
    "in_evaluation": "stands in an evaluation set",
    "too_long": "more tokens than `max_prompt_tokens`",
    "duplicate": "the same question came before",
    "over_max_rows": "not drawn, where the source has `max_rows`",
}
"""Why a row is dropped; of several reasons the first one in this order."""

SCHEMA = pyarrow.schema(
    {
        "question": pyarrow.string(),  # JSON: text or messages, in the template
        "ground_truth_answer": pyarrow.string(),
        "domain": pyarrow.string(),
        "source": pyarrow.string(),
        "num_tokens": pyarrow.int64(),
        "key": pyarrow.binary(),
        "reason": pyarrow.string(),  # "" for a row that is kept
    }
)


@dataclass(frozen=True)
class RowChecks:
    """The checks that look at one row at a time."""

    tokenizer: PreTrainedTokenizerBase
    """Of the model that is trained."""
    questions: EvaluationQuestions
    """Those that no prompt may come from."""
    max_prompt_tokens: int
    """Longest prompt, in the chat template."""
    apply_chat_template: bool
    """As `data.apply_chat_template`."""
    enable_thinking: bool
    """As `data.enable_thinking`."""

    def examine(self, rows: Iterable[Row]) -> pyarrow.Table:
        """One line per row, of `SCHEMA`."""
        lines = [self._line(place, row) for place, row in rows]
        texts = [line.pop("text") for line in lines]
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        for line, token_ids in zip(lines, encoded, strict=True):
            line["num_tokens"] = len(token_ids)
            if not line["reason"] and len(token_ids) > self.max_prompt_tokens:
                line["reason"] = "too_long"
        return pyarrow.Table.from_pylist(lines, SCHEMA)

    def _line(self, place: str, row: dict[str, Any]) -> dict[str, Any]:
        """The line of a row, with the `text` whose tokens are still to be counted."""
        dropped = dict.fromkeys(("question", "ground_truth_answer", "domain", "source", "key")) | {"text": ""}
        if not row:
            return dropped | {"reason": "unfit"}
        try:
            check_row(place, row)
            asked = with_template(row["question"], row["domain"])
            text = prompt_text(
                place, row | {"question": asked}, self.tokenizer, self.apply_chat_template, self.enable_thinking
            )
            check_characters(place, "question", text + (row["ground_truth_answer"] or ""))
        except ValueError:
            return dropped | {"reason": "malformed"}
        bare = plain_text(row["question"])
        if self.questions.holds(bare):
            return dropped | {"reason": "in_evaluation"}
        domain = "code" if row["domain"] == "codeforces" else row["domain"]
        written = {"question": json.dumps(asked, ensure_ascii=False), "domain": domain, "key": same_key(bare)}
        return row | written | {"reason": "", "text": text}
