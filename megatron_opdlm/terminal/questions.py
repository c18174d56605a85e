"""What `generate` is asked, from a flag, a file or standard input, and as token ids.

    rows = read_questions(prompt=None, prompts="questions.jsonl")       # checked; no tokenizer needed
    prompts = tokenize_questions(rows, tokenizer, config.data)

Rows of JSON, JSONL and Parquet are those of training (`data.prompts`); a `.txt` file and standard input have a prompt a
line, empty lines aside.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opdlm.config.schema import DataConfig
from megatron_opdlm.data.prompts import Prompt, Row, check_row, prompt_text, read_rows
from megatron_opdlm.data.responses import check_characters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STANDARD_INPUT = "-"


def read_questions(prompt: str | None, prompts: str | None) -> list[Row]:
    """The rows, one where `prompt` is given. ValueError names file, line and reason, as `read_prompts` does."""
    if prompt is not None:
        return [check_row("--prompt", {"question": prompt})]
    if prompts == STANDARD_INPUT:
        return _rows_of_lines("standard input", sys.stdin.buffer.read())
    if Path(prompts).suffix == ".txt":
        if not Path(prompts).is_file():
            raise ValueError(f"{prompts}: no such file")
        return _rows_of_lines(prompts, Path(prompts).read_bytes())
    return [check_row(where, row) for where, row in read_rows(prompts)]


def tokenize_questions(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> list[Prompt]:
    """A prompt for each row, with its number. ValueError if the chat template is missing or refuses a row."""
    if data.apply_chat_template and not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: give --raw, which goes on from the prompt itself")
    prompts = []
    for number, (where, row) in enumerate(rows):
        text = prompt_text(where, row, tokenizer, data.apply_chat_template, data.enable_thinking)
        check_characters(where, "question", text)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        prompts.append(Prompt(number, tuple(ids), domain=row.get("domain") or ""))
    return prompts


def _rows_of_lines(where: str, data: bytes) -> list[Row]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8: {error.reason}") from error
    lines = text.replace("\r\n", "\n").split("\n")  # `splitlines` cuts at U+2028 and form feeds too
    rows = [
        check_row(f"{where}:{number}", {"question": line}) for number, line in enumerate(lines, start=1) if line.strip()
    ]
    if not rows:
        raise ValueError(f"{where}: there is no prompt in it")
    return rows
