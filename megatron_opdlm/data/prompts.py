"""Prompts as token ids: reading JSON, JSONL and Parquet rows, and tokenizing their questions.

A row is an object with `question` (text, or a list of chat messages) and optionally `domain`, `source`,
`ground_truth_answer` and `entry`; other keys are ignored. Where responses are asked for, every row has a `response`
too, text, which the chat template puts into the assistant's turn (`data.responses`). A prompt's id is the number of its
row, counted from 0 through all files in their order. Rows that are too long keep their number and are left out, so what
is recorded about the other prompts stays with them.

Example: a file with the rows `{"question": "1+1=?", "domain": "math"}` and `{"question": [{"role": "user", ...}]}`.

    prompt_set = read_prompts(
        ["train.jsonl"], tokenizer, max_prompt_tokens=2048, apply_chat_template=True, enable_thinking=False
    )
    prompt_set.prompts[0].token_ids      # (151644, 872, 198, 16, 10, 16, 19884, 151645, 198, 151644, 77091, 198)
    prompt_set.num_too_long              # 0
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_opdlm.data.responses import chat_messages, check_characters, read_responses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = tuple[str, Any]
"""Where a row stands ("FILE:LINE"), and what was read there."""

_BETWEEN_ROWS = re.compile(r"[\s,]*")


@dataclass(frozen=True)
class Prompt:
    """One question, ready to be decoded after."""

    prompt_id: int
    """Number of its row, from 0, through all files and counting the rows that were left out."""
    token_ids: tuple[int, ...]
    """With the chat template around the question, up to where the response starts."""
    domain: str = ""
    """Kind of task, for the caps on the response's length; "" if the row names none."""
    source: str = ""
    """Data set the row comes from; "" if the row names none."""
    ground_truth_answer: Any = None
    """As the row has it."""
    entry: Any = None
    """What the verifier of `source` needs to score a response."""
    response_ids: tuple[int, ...] | None = None
    """The row's response, which ends with the end token; None where nobody asked for it."""


@dataclass(frozen=True)
class PromptSet:
    """The prompts of all files, and how many rows were left out."""

    prompts: list[Prompt]
    """In the order of the rows."""
    num_too_long: int
    """Rows with more than `data.max_prompt_tokens` tokens."""
    num_long_responses: int = 0
    """Other rows, with more than `data.max_response_tokens` tokens in the response."""


def read_prompts(
    files: Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    apply_chat_template: bool,
    enable_thinking: bool,
    max_response_tokens: int | None = None,
) -> PromptSet:
    """Read and tokenize the prompts of `files`; the settings are those of the `data` section.

    `max_response_tokens` asks for the rows' responses too; None leaves them alone.

    Raises:
        ValueError: names the file, the line (JSON and JSONL) or row (Parquet) and the reason: a missing or empty
            file, an undecodable line, a missing question or response, a value of the wrong type. Also if no row is
            short enough.
    """
    if apply_chat_template and not tokenizer.chat_template:
        raise ValueError("data.apply_chat_template (true) needs a tokenizer with a chat template; this one has none")
    rows = [check_row(where, row) for path in files for where, row in read_rows(path)]
    texts = [prompt_text(where, row, tokenizer, apply_chat_template, enable_thinking) for where, row in rows]
    for (where, _), text in zip(rows, texts, strict=True):
        check_characters(where, "question", text)
    # All at once: a fast tokenizer spreads the texts over the cores. A chat template writes special tokens itself.
    token_ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    prompts = [
        _build_prompt(prompt_id, ids, row)
        for prompt_id, (ids, (_, row)) in enumerate(zip(token_ids, rows, strict=True))
        if len(ids) <= max_prompt_tokens
    ]
    if not prompts:
        raise ValueError(f"data.max_prompt_tokens ({max_prompt_tokens}) leaves none of the {len(rows)} prompts")
    num_too_long = len(rows) - len(prompts)
    if max_response_tokens is None:
        return PromptSet(prompts, num_too_long)
    given = [(*rows[prompt.prompt_id], texts[prompt.prompt_id]) for prompt in prompts]
    responses = read_responses(given, tokenizer, apply_chat_template, enable_thinking)
    pairs = zip(prompts, responses, strict=True)
    answered = [replace(prompt, response_ids=ids) for prompt, ids in pairs if len(ids) <= max_response_tokens]
    if not answered:
        raise ValueError(f"data.max_response_tokens ({max_response_tokens}) leaves none of the {len(rows)} prompts")
    return PromptSet(answered, num_too_long, num_long_responses=len(prompts) - len(answered))


def read_rows(path: str | Path) -> Iterator[Row]:
    """The rows of one file with the places they stand at. Raises ValueError as `read_prompts` does."""
    path = Path(path)
    if path.suffix not in READERS:
        raise ValueError(f"{path}: a prompt file must end in one of {', '.join(READERS)}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    num_rows = 0
    for row in READERS[path.suffix](path):
        yield row
        num_rows += 1
    if num_rows == 0:
        raise ValueError(f"{path}:1: the file has no rows")


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{number}", _decode_json(path, _decode_utf8(path, line.strip(), number), number)


def _read_json(path: Path) -> Iterator[Row]:
    text = _decode_utf8(path, path.read_bytes())
    rows = _decode_json(path, text) if text.strip() else []
    if not isinstance(rows, list):
        raise ValueError(f"{path}:1: a .json file must hold a list of rows (.jsonl has one row a line)")
    # The text is a list; walking over it once more tells which line each row starts at.
    decoder, position, line = json.JSONDecoder(), text.find("[") + 1, 1
    line += text.count("\n", 0, position)
    for row in rows:
        start = _BETWEEN_ROWS.match(text, position).end()
        line += text.count("\n", position, start)
        yield f"{path}:{line}", row
        _, position = decoder.raw_decode(text, start)
        line += text.count("\n", start, position)


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not Parquet: {error}") from error
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"{path}: row {number}", row


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}


def _decode_utf8(path: Path, data: bytes, first_line: int = 1) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise ValueError(f"{path}:{line}: not UTF-8: {error.reason}") from error


def _decode_json(path: Path, text: str, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{path}:{line}: not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists in lists in lists
        raise ValueError(f"{path}:{first_line}: not JSON that can be read: {error}") from error


def check_row(where: str, row: Any) -> Row:
    """The row itself, once its values have the types that `Prompt` and the chat template need; else ValueError."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be an object, not {type(row).__name__}")
    question = row.get("question")
    if question is None:
        raise ValueError(f"{where}: the row has no question")
    if isinstance(question, list):
        _check_messages(where, question)
    elif not isinstance(question, str):
        raise ValueError(f"{where}: question must be text or a list of messages, not {type(question).__name__}")
    elif not question.strip():
        raise ValueError(f"{where}: question is empty")
    for key in ("domain", "source"):
        if not isinstance(row.get(key), str | None):
            raise ValueError(f"{where}: {key} must be text, not {type(row[key]).__name__}")
    return where, row


def _check_messages(where: str, messages: list) -> None:
    if not messages:
        raise ValueError(f"{where}: question is an empty list of messages")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f"{where}: each message of question must have a role and a content, both text")


def prompt_text(
    where: str, row: dict, tokenizer: PreTrainedTokenizerBase, apply_chat_template: bool, enable_thinking: bool
) -> str:
    """What the model reads before its response. Raises ValueError, with `where`, if the chat template refuses."""
    from jinja2 import TemplateError

    question = row["question"]
    if not apply_chat_template:
        if isinstance(question, list):
            raise ValueError(f"{where}: question is a list of messages, which needs data.apply_chat_template: true")
        return question
    try:
        return tokenizer.apply_chat_template(
            chat_messages(question), tokenize=False, add_generation_prompt=True, enable_thinking=enable_thinking
        )
    except TemplateError as error:
        raise ValueError(f"{where}: the chat template refuses the question: {error}") from error


def _build_prompt(prompt_id: int, token_ids: list[int], row: dict) -> Prompt:
    return Prompt(
        prompt_id=prompt_id,
        token_ids=tuple(token_ids),
        domain=row.get("domain") or "",
        source=row.get("source") or "",
        ground_truth_answer=row.get("ground_truth_answer"),
        entry=row.get("entry"),
    )
