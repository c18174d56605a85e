"""Tokenizers from folders, the mask token, the end tokens, and agreement between student and teacher."""

from __future__ import annotations

import json

import pytest

from megatron_opdlm.data.tokenizer import add_mask_token, check_same_tokenizer, end_token_ids, load_tokenizer

MASK = "<|MASK|>"


def test_a_saved_tokenizer_is_read_back(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    read = load_tokenizer(tmp_path)
    assert read.get_vocab() == tokenizer.get_vocab()
    assert read("1+1<|im_end|>")["input_ids"] == tokenizer("1+1<|im_end|>")["input_ids"]
    assert read.chat_template == tokenizer.chat_template


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"config.json": '{"model_type": "qwen3"}'},
        {"tokenizer.json": "{"},
        {"tokenizer.json": "{}"},
        {"tokenizer.json": '{"added_tokens": []}'},
        {"tokenizer.json": '{"added_tokens": [], "model": {"type": "BPE"}}'},
        {"tokenizer.json": "[]"},
        {"tokenizer.json": "{}", "tokenizer_config.json": "{"},
        {"vocab.json": "{"},
    ],
    ids=str,
)
def test_missing_or_malformed_tokenizer_files_are_refused_naming_the_folder(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


def test_a_missing_folder_is_refused_and_not_looked_for_elsewhere(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        load_tokenizer(tmp_path / "nowhere")


def test_code_in_the_folder_is_not_run(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["tokenizer_class"]
    settings["auto_map"] = {"AutoTokenizer": ["own.OwnTokenizer", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\nclass OwnTokenizer: pass\n")
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "was_run").exists()


def test_the_mask_token_takes_the_first_free_id_and_is_one_token(tokenizer):
    size = len(tokenizer)
    mask_token_id = add_mask_token(tokenizer, MASK)
    assert mask_token_id == size and len(tokenizer) == size + 1
    assert tokenizer(f"a{MASK}b")["input_ids"][1] == mask_token_id
    assert tokenizer.decode([mask_token_id], skip_special_tokens=True) == ""
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"


def test_a_mask_token_that_is_there_is_not_added_again(tmp_path, tokenizer):
    mask_token_id = add_mask_token(tokenizer, MASK)
    size = len(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    read = load_tokenizer(tmp_path)
    assert add_mask_token(read, MASK) == mask_token_id == read.mask_token_id and len(read) == size


def test_a_mask_token_with_another_meaning_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"student\.mask_token \(<\|im_end\|>\) must not be the tokenizer's end token"):
        add_mask_token(tokenizer, "<|im_end|>")
    with pytest.raises(ValueError, match=r"student\.mask_token \(a\) must not be an ordinary token"):
        add_mask_token(tokenizer, "a")


@pytest.mark.parametrize(
    ("generation_config", "expected"),
    [(None, (258,)), ({}, (258,)), ({"eos_token_id": [258, 256]}, (258, 256)), ({"eos_token_id": 256}, (258, 256))],
)
def test_end_tokens_are_the_tokenizers_and_those_of_the_generation_config(
    tmp_path, tokenizer, generation_config, expected
):
    if generation_config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation_config))
    assert end_token_ids(tokenizer, tmp_path) == expected


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": "end"}', '{"eos_token_id": [true]}'])
def test_a_malformed_generation_config_is_refused(tmp_path, tokenizer, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        end_token_ids(tokenizer, tmp_path)


def test_a_model_without_any_end_token_is_refused(tmp_path, make_tokenizer):
    with pytest.raises(ValueError, match="names an end token"):
        end_token_ids(make_tokenizer(eos_token=None), tmp_path)


@pytest.mark.parametrize("masked", [(), ("student",), ("teacher",), ("student", "teacher")])
def test_tokenizers_that_differ_by_the_mask_token_only_are_the_same(make_tokenizer, masked):
    tokenizers = {"student": make_tokenizer(), "teacher": make_tokenizer()}
    for name in masked:
        add_mask_token(tokenizers[name], MASK)
    check_same_tokenizer(tokenizers["student"], tokenizers["teacher"], MASK)


@pytest.mark.parametrize(
    ("teacher_tokens", "message"),
    [
        (["<|endoftext|>", "<|start|>", "<|im_end|>"], r"token 257 is '<\|im_start\|>' .* and '<\|start\|>' for the"),
        (["<|endoftext|>", "<|im_end|>", "<|im_start|>"], r"token 257 is '<\|im_start\|>' .* and '<\|im_end\|>'"),
        (["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<x>"], r"token 259 is missing .* '<x>' for the teacher"),
        (["<|endoftext|>", "<|im_end|>"], r"token 257 is '<\|im_start\|>' for the student and '<\|im_end\|>'"),
    ],
)
def test_tokenizers_that_differ_otherwise_are_refused_naming_the_first_difference(
    make_tokenizer, teacher_tokens, message
):
    student, teacher = make_tokenizer(), make_tokenizer(teacher_tokens)
    add_mask_token(student, MASK)
    with pytest.raises(ValueError, match=message):
        check_same_tokenizer(student, teacher, MASK)
