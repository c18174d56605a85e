"""Prompt files: what is read, what is left out, what is refused and where."""

from __future__ import annotations

import json

import pytest

from megatron_opdlm.data.prompts import Prompt, read_prompts

FULL_ROW = {
    "question": "1+1=?",
    "domain": "math",
    "source": "sums",
    "ground_truth_answer": "2",
    "entry": {"metadata": {"terms": [1, 1]}},
    "response": "2",
}


@pytest.fixture
def read(tokenizer):
    def read_files(*files, max_prompt_tokens=1000, apply_chat_template=False, enable_thinking=False):
        return read_prompts(
            files,
            tokenizer,
            max_prompt_tokens=max_prompt_tokens,
            apply_chat_template=apply_chat_template,
            enable_thinking=enable_thinking,
        )

    return read_files


def write(path, rows):
    """The rows in the format that the file's name asks for."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows, indent=1))
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_prompts(tmp_path, tokenizer, read, suffix):
    prompt_set = read(write(tmp_path / f"a{suffix}", [FULL_ROW, {"question": "2+2=é"}]))
    expected = [
        Prompt(0, tuple(tokenizer("1+1=?")["input_ids"]), "math", "sums", "2", {"metadata": {"terms": [1, 1]}}),
        Prompt(1, tuple(tokenizer("2+2=é")["input_ids"])),
    ]
    assert prompt_set.prompts == expected and prompt_set.num_too_long == 0


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_chat_messages_are_rendered_by_the_chat_template(tmp_path, tokenizer, read, suffix):
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1"}]
    prompt_set = read(write(tmp_path / f"a{suffix}", [{"question": messages}]), apply_chat_template=True)
    text = "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(prompt_set.prompts[0].token_ids) == text
    # The special tokens are single ids: system, user and assistant each start one message.
    assert prompt_set.prompts[0].token_ids.count(257) == 3


def test_a_question_in_text_is_one_user_message(tmp_path, tokenizer, read):
    path = write(tmp_path / "a.jsonl", [{"question": "1+1"}])
    prompt = read(path, apply_chat_template=True).prompts[0]
    assert tokenizer.decode(prompt.token_ids) == "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
    as_transformers_does = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1"}], add_generation_prompt=True, enable_thinking=False
    )
    assert list(prompt.token_ids) == as_transformers_does["input_ids"]


def test_thinking_is_passed_on_to_the_chat_template(tmp_path, tokenizer, read):
    path = write(tmp_path / "a.jsonl", [{"question": "1+1"}])
    prompt = read(path, apply_chat_template=True, enable_thinking=True).prompts[0]
    assert tokenizer.decode(prompt.token_ids).endswith("assistant\n<think>")


def test_defect_5_long_prompts_are_counted_and_never_shift_the_ids_of_the_others(tmp_path, tokenizer, read):
    first = write(tmp_path / "a.jsonl", [{"question": "x" * n} for n in (3, 6, 5)])
    second = write(tmp_path / "b.json", [{"question": "y" * n} for n in (9, 2, 8, 5)])
    prompt_set = read(first, second, max_prompt_tokens=5)
    kept = [(prompt.prompt_id, tokenizer.decode(prompt.token_ids)) for prompt in prompt_set.prompts]
    assert kept == [(0, "xxx"), (2, "xxxxx"), (4, "yy"), (6, "yyyyy")]
    assert prompt_set.num_too_long == 3
    # What is kept has the same id as when nothing is left out.
    everything = {prompt.prompt_id: prompt for prompt in read(first, second).prompts}
    assert all(everything[prompt.prompt_id] == prompt for prompt in prompt_set.prompts)


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path, read):
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"question": "a"}\n\n  \n{"question": "b"}')
    assert [prompt.prompt_id for prompt in read(path).prompts] == [0, 1]
    path.write_text('\n{"question": "a"}\n\n{"question": 1}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl:4: question must be text or a list of messages, not int"):
        read(path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"question": "a"', "2: not JSON"),
        ('{"question": "a"} x', "2: not JSON: Extra data at column 19"),
        ("[1]", "2: a row must be an object, not list"),
        ("{}", "2: the row has no question"),
        ('{"question": null}', "2: the row has no question"),
        ('{"question": 3}', "2: question must be text or a list of messages, not int"),
        ('{"question": " "}', "2: question is empty"),
        ('{"question": []}', "2: question is an empty list"),
        ('{"question": ["a"]}', "2: each message of question must have a role and a content"),
        ('{"question": [{"role": "user"}]}', "2: each message of question must have a role and a content"),
        ('{"question": [{"role": "user", "content": 1}]}', "2: each message of question"),
        ('{"question": [{"role": "user", "content": "a"}]}', "2: question is a list of messages, which needs data"),
        ('{"question": "a", "domain": 1}', "2: domain must be text, not int"),
        ('{"question": "a", "source": []}', "2: source must be text, not list"),
    ],
)
def test_a_bad_line_is_refused_with_file_line_and_reason(tmp_path, read, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "a"}\n' + line + '\n{"question": "c"}\n')
    with pytest.raises(ValueError) as raised:
        read(path)
    assert str(raised.value).startswith(f"{path}:{reason}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[\n{"question": "a"},\n\n{"question":\n 3}]', "4: question must be text or a list of messages, not int"),
        ('[{"question":\n"a\\n"},\n{"question":\n"b"}, 3]', "4: a row must be an object, not int"),
        ('\n[{"question": "a"}, {"question": "a\\n"},\n3]', "3: a row must be an object, not int"),
        ('[{"question": "a"},\n{"question": }]', "2: not JSON: Expecting value at column 14"),
        ('[{"question": "a"},]', "1: not JSON"),
        ('{"question": "a"}', "1: a .json file must hold a list"),
        ('{"question": "a"}\n{"question": "b"}', "2: not JSON: Extra data"),
        ("[]", "1: the file has no rows"),
        ("", "1: the file has no rows"),
    ],
)
def test_a_bad_row_of_a_json_list_is_refused_with_its_line(tmp_path, read, text, reason):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError) as raised:
        read(path)
    assert str(raised.value).startswith(f"{path}:{reason}")


@pytest.mark.parametrize(("name", "line"), [("a.jsonl", 3), ("a.json", 3)])
def test_bytes_that_are_not_utf8_are_refused_with_their_line(tmp_path, read, name, line):
    path = tmp_path / name
    path.write_bytes(b'{"question": "a"}\n\n{"question": "\xff"}\n')
    with pytest.raises(ValueError, match=f"{name}:{line}: not UTF-8"):
        read(path)


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path, read):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"question": "a"}\n')
    assert len(read(path).prompts) == 1


def test_a_bad_row_of_a_parquet_file_is_refused_with_its_number(tmp_path, read):
    path = write(tmp_path / "a.parquet", [{"question": "a"}, {"question": None}])
    with pytest.raises(ValueError, match=r"a\.parquet: row 2: the row has no question"):
        read(path)


def test_missing_empty_and_unreadable_files_are_refused_by_name(tmp_path, read):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.parquet").write_text("nothing")
    (tmp_path / "a.txt").write_text("a")
    for name, reason in [
        ("missing.jsonl", "missing.jsonl: no such file"),
        ("empty.jsonl", "empty.jsonl:1: the file has no rows"),
        ("bad.parquet", "bad.parquet: not Parquet"),
        ("a.txt", "a.txt: a prompt file must end in one of .jsonl, .json, .parquet"),
    ]:
        with pytest.raises(ValueError, match=reason):
            read(tmp_path / name)


def test_a_question_that_the_chat_template_refuses_is_named(tmp_path, read):
    path = write(tmp_path / "a.jsonl", [{"question": [{"role": "nobody", "content": "a"}]}])
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the chat template refuses the question: no such role"):
        read(path, apply_chat_template=True)


def test_a_tokenizer_without_a_chat_template_is_refused_if_one_is_asked_for(tmp_path, make_tokenizer):
    path = write(tmp_path / "a.jsonl", [{"question": "a"}])
    settings = {"max_prompt_tokens": 10, "enable_thinking": False}
    plain = make_tokenizer(chat_template=None)
    with pytest.raises(ValueError, match=r"data\.apply_chat_template \(true\) needs a tokenizer with a chat template"):
        read_prompts([path], plain, apply_chat_template=True, **settings)
    assert len(read_prompts([path], plain, apply_chat_template=False, **settings).prompts) == 1


def test_a_limit_that_leaves_no_prompt_is_refused(tmp_path, read):
    path = write(tmp_path / "a.jsonl", [{"question": "long"}, {"question": "longer"}])
    with pytest.raises(ValueError, match=r"data\.max_prompt_tokens \(3\) leaves none of the 2 prompts"):
        read(path, max_prompt_tokens=3)
