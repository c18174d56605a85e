"""Given responses: how they become ids, and which are refused or left out."""

from __future__ import annotations

import json

import pytest

from megatron_opdlm.data.prompts import read_prompts
from megatron_opdlm.data.tokenizer import add_mask_token
from tests.unit.data.test_prompts import write


@pytest.fixture
def read(tokenizer):
    def read_files(path, max_response_tokens=1000, apply_chat_template=False, tokenizer=tokenizer, **settings):
        return read_prompts(
            [path],
            tokenizer,
            max_prompt_tokens=settings.get("max_prompt_tokens", 1000),
            apply_chat_template=apply_chat_template,
            enable_thinking=settings.get("enable_thinking", False),
            max_response_tokens=max_response_tokens,
        )

    return read_files


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize("apply_chat_template", [False, True])
def test_a_response_is_its_text_and_the_end_token(tmp_path, tokenizer, read, suffix, apply_chat_template):
    path = write(tmp_path / f"a{suffix}", [{"question": "1+1=?", "response": "two, é"}])
    (prompt,) = read(path, apply_chat_template=apply_chat_template).prompts
    assert prompt.response_ids == (*tokenizer("two, é")["input_ids"], tokenizer.eos_token_id)
    whole = tokenizer.decode([*prompt.token_ids, *prompt.response_ids])
    turns = "<|im_start|>user\n1+1=?<|im_end|>\n<|im_start|>assistant\n"
    assert whole == (turns if apply_chat_template else "1+1=?") + "two, é<|im_end|>"


def test_a_response_that_has_its_end_token_gets_no_second_one_and_ends_there(tmp_path, tokenizer, read):
    path = write(tmp_path / "a.jsonl", [{"question": "a", "response": "b<|im_end|>c"}])
    assert read(path).prompts[0].response_ids == (*tokenizer("b")["input_ids"], tokenizer.eos_token_id)


def test_long_responses_are_left_out_and_counted_and_the_others_keep_their_numbers(tmp_path, read):
    rows = [{"question": "a" * n, "response": "b" * m} for n, m in [(1, 2), (1, 3), (9, 3), (2, 2)]]
    read_set = read(write(tmp_path / "a.jsonl", rows), max_response_tokens=3, max_prompt_tokens=5)
    assert [prompt.prompt_id for prompt in read_set.prompts] == [0, 3]
    assert (read_set.num_too_long, read_set.num_long_responses) == (1, 1)
    with pytest.raises(ValueError, match=r"data\.max_response_tokens \(2\) leaves none of the 4 prompts"):
        read(tmp_path / "a.jsonl", max_response_tokens=2)


def test_nobody_asking_for_responses_does_not_look_at_them(tmp_path, read):
    path = write(tmp_path / "a.jsonl", [{"question": "a", "response": 3}])
    assert read(path, max_response_tokens=None).prompts[0].response_ids is None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "the row has no response"),
        ({"response": None}, "the row has no response"),
        ({"response": ["b"]}, "response must be text, not list"),
        ({"response": " \n"}, "response is empty"),
        ({"response": "x<|MASK|>"}, "response holds the mask token <|MASK|>"),
    ],
)
@pytest.mark.parametrize("apply_chat_template", [False, True])
def test_a_bad_response_is_refused_with_file_line_and_reason(
    tmp_path, tokenizer, read, row, reason, apply_chat_template
):
    add_mask_token(tokenizer, "<|MASK|>")
    rows = [{"question": "a", "response": "b"}, {"question": "a"} | row]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError) as raised:
        read(path, apply_chat_template=apply_chat_template)
    assert str(raised.value) == f"{path}:2: {reason}"


def test_a_template_that_changes_the_prompt_before_a_response_is_refused(tmp_path, read):
    """The test tokenizer's opens a thought for the model to go on with, but not before a given response."""
    path = write(tmp_path / "a.jsonl", [{"question": "a", "response": "b"}])
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the chat template writes another prompt before a response"):
        read(path, apply_chat_template=True, enable_thinking=True)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path, make_tokenizer, read):
    path = write(tmp_path / "a.jsonl", [{"question": "a", "response": "b"}])
    with pytest.raises(ValueError, match="the tokenizer has no end token"):
        read(path, tokenizer=make_tokenizer(eos_token=None))
