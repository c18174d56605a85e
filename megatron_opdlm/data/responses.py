"""Given responses as token ids, for the objectives that learn from them.

A response is tokenized apart from its prompt, as a rolled-out one is made of ids that follow those of the prompt. Under
a chat template its text is what the template writes behind the prompt when the response is the assistant's turn. It
ends with the end token: what the template writes behind that (a line break) belongs to the next turn.

    rows = [("a.jsonl:1", {"question": "1+1=?", "response": "2"}, prompt_text)]
    read_responses(rows, tokenizer, apply_chat_template=True, enable_thinking=False)         # [(17, 151645)]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AnsweredRow = tuple[str, dict, str]
"""Where a row stands, the row, and the text of its prompt."""


def chat_messages(question: str | list[dict]) -> list[dict]:
    """The messages of a question."""
    return question if isinstance(question, list) else [{"role": "user", "content": question}]


def read_responses(
    rows: Sequence[AnsweredRow], tokenizer: PreTrainedTokenizerBase, apply_chat_template: bool, enable_thinking: bool
) -> list[tuple[int, ...]]:
    """The ids of each row's response, the end token last.

    Raises:
        ValueError: names where the row stands and the reason: no response, one that is empty, not text or holds the
            mask token, a chat template that writes something else behind the prompt. Also if there is no end token.
    """
    end_id = tokenizer.eos_token_id
    if end_id is None:
        raise ValueError("the tokenizer has no end token, with which a response would end")
    texts = [_response_text(*row, tokenizer, apply_chat_template, enable_thinking) for row in rows]
    for (where, _, _), text in zip(rows, texts, strict=True):
        check_characters(where, "response", text)
    all_ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    responses = [(*(ids[: ids.index(end_id)] if end_id in ids else ids), end_id) for ids in all_ids]
    for (where, _, _), ids in zip(rows, responses, strict=True):
        if tokenizer.mask_token_id in ids:
            raise ValueError(f"{where}: response holds the mask token {tokenizer.mask_token}")
    return responses


def check_characters(where: str, key: str, text: str) -> None:
    """ValueError if the text has half of a surrogate pair, which JSON can write and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {key} has {text[error.start]!r}, which is no character") from error


def _response_text(
    where: str,
    row: dict,
    prompt_text: str,
    tokenizer: PreTrainedTokenizerBase,
    apply_chat_template: bool,
    enable_thinking: bool,
) -> str:
    from jinja2 import TemplateError

    response = row.get("response")
    if response is None:
        raise ValueError(f"{where}: the row has no response")
    if not isinstance(response, str):
        raise ValueError(f"{where}: response must be text, not {type(response).__name__}")
    if not response.strip():
        raise ValueError(f"{where}: response is empty")
    if not apply_chat_template:
        return response
    turn = {"role": "assistant", "content": response}
    messages = [*chat_messages(row["question"]), turn]
    try:
        whole = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=enable_thinking)
    except TemplateError as error:
        raise ValueError(f"{where}: the chat template refuses the response: {error}") from error
    if not whole.startswith(prompt_text):
        raise ValueError(f"{where}: the chat template writes another prompt before a response than it does without one")
    return whole[len(prompt_text) :]
