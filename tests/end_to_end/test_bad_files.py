"""More of a user's mistakes, in files: model folders, tokenizers, prompts, checkpoints. As in `test_bad_input`."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.end_to_end.test_bad_input import (  # noqa: F401  two of them are fixtures
    CONFIG,
    UP,
    WEIGHTS,
    assert_says,
    case,
    edit_config,
    edit_weights,
    originals,
    refusal,
    train_with,
)

INDEX = "model.safetensors.index.json"
Spoil = Callable[[Path], object]


def index(hf: Path, content: object, keep_weights: bool = True) -> None:
    """Makes the folder one of several files, as far as its index goes."""
    (hf / INDEX).write_text(content if isinstance(content, str) else json.dumps(content))
    if not keep_weights:
        (hf / WEIGHTS).unlink()


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def spoil_weight(value: float) -> Spoil:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP][3, 5] = value

    return lambda hf: edit_weights(hf, change)


def refuses_number(key: str, value: object, kind: str = "int") -> tuple[Spoil, str]:
    return lambda hf: edit_config(hf, **{key: value}), f"config.json: {key} must be a positive {kind}, not {value!r}"


CONFIGS: dict[str, tuple[Spoil, str]] = {
    "negative size": refuses_number("hidden_size", -32),
    "size in words": refuses_number("intermediate_size", "many"),
    "truth for a size": refuses_number("num_hidden_layers", True),
    "no rows": refuses_number("vocab_size", 0),
    "half a head": refuses_number("num_attention_heads", 2.5),
    "epsilon is no number": refuses_number("rms_norm_eps", float("nan"), "float"),
    "endless epsilon": refuses_number("rms_norm_eps", float("inf"), "float"),
    "theta in words": (
        lambda hf: edit_config(hf, rope_parameters={"rope_theta": "wide"}),
        "config.json: rope_theta must be a positive float, not 'wide'",
    ),
    "theta below zero": (
        lambda hf: edit_config(hf, rope_parameters={"rope_theta": -1.0}),
        "config.json: rope_theta must be a positive float, not -1.0",
    ),
    "no theta": (lambda hf: edit_config(hf, rope_parameters={}, rope_theta=None), "config.json: rope_theta is missing"),
    "RoPE as a list": (
        lambda hf: edit_config(hf, rope_parameters=[1, 2]),
        "config.json: rope_parameters must be an object, not [1, 2]",
    ),
    "head size in words": refuses_number("head_dim", "wide"),
    "odd heads": (lambda hf: edit_config(hf, head_dim=13), "config.json: head_dim (13) must be even for RoPE"),
    "groups that do not divide": (
        lambda hf: edit_config(hf, num_key_value_heads=3),
        "num_attention_heads (4) must be a multiple of num_key_value_heads (3)",
    ),
    "another activation": (lambda hf: edit_config(hf, hidden_act="gelu"), "hidden_act is 'gelu'; only 'silu' is"),
    "biases": (lambda hf: edit_config(hf, attention_bias=True), "attention_bias is True; only False is supported"),
    "unknown number format": (lambda hf: edit_config(hf, dtype="int4"), "dtype is 'int4'; it must be one of bfloat16"),
    "mask token without a row": (
        lambda hf: edit_config(hf, mask_token_id=4000),
        "mask_token_id (4000) must be an id below vocab_size (52)",
    ),
    "no family": (lambda hf: edit_config(hf, model_type=None), "config.json: model_type is None"),
    "not UTF-8": (lambda hf: (hf / CONFIG).write_bytes(b'{"a": "\xff"}'), "config.json is not valid JSON"),
    "nested without end": (lambda hf: (hf / CONFIG).write_text("[" * 10**5), "config.json is not valid JSON"),
    "config is a folder": (
        lambda hf: ((hf / CONFIG).unlink(), (hf / CONFIG).mkdir()),
        "it has no config.json",
    ),
    "empty config": (lambda hf: (hf / CONFIG).write_text(""), "config.json is not valid JSON"),
}

WEIGHT_FILES: dict[str, tuple[Spoil, str]] = {
    "a number that is none": (spoil_weight(float("nan")), "hold numbers that are not finite"),
    "an endless number": (spoil_weight(float("inf")), "hold numbers that are not finite"),
    "index not JSON": (lambda hf: index(hf, "{"), "model.safetensors.index.json is not a safetensors index"),
    "index without a map": (lambda hf: index(hf, {}), "model.safetensors.index.json is not a safetensors index"),
    "index of a list": (lambda hf: index(hf, {"weight_map": ["a"]}), "weight_map must name a file for each tensor"),
    "index of numbers": (lambda hf: index(hf, {"weight_map": {UP: 3}}), "weight_map must name a file for each tensor"),
    "index of a file that is not there": (
        lambda hf: index(hf, {"weight_map": {"model.norm.weight": "model-2.safetensors"}}),
        "lacks model-2.safetensors, which holds some of its weights",
    ),
    "index that leads out": (
        lambda hf: index(hf, {"weight_map": {"model.norm.weight": "../hf/model.safetensors"}}),
        "the file name '../hf/model.safetensors' leads out of the folder",
    ),
    "index with a path of its own": (
        lambda hf: index(hf, {"weight_map": {"model.norm.weight": "/etc/passwd"}}),
        "the file name '/etc/passwd' leads out of the folder",
    ),
    "weights are text": (lambda hf: (hf / WEIGHTS).write_text("weights"), "model.safetensors is damaged"),
    "weights are empty": (lambda hf: (hf / WEIGHTS).write_bytes(b""), "model.safetensors is damaged"),
    "weights are a pickle": (
        lambda hf: (torch.save({}, hf / "pytorch_model.bin"), (hf / WEIGHTS).unlink()),
        "has neither model.safetensors nor",
    ),
    "too few layers": (
        lambda hf: edit_config(hf, num_hidden_layers=5, layer_types=None),
        "has no tensor model.layers.2.",
    ),
    "layers that contradict each other": (
        lambda hf: edit_config(hf, num_hidden_layers=5),
        "`num_hidden_layers` (5) must be equal to the number of `layer_types` (2)",
    ),
    "another width": (lambda hf: edit_config(hf, intermediate_size=64), "has shape [48, 32], expected [64, 32]"),
}

TOKENIZERS: dict[str, tuple[Spoil, str]] = {
    "empty": (lambda hf: (hf / "tokenizer.json").write_text(""), "its tokenizer cannot be read"),
    "a list": (lambda hf: (hf / "tokenizer.json").write_text("[]"), "its tokenizer cannot be read"),
    "without a model": (
        lambda hf: edit_json(hf / "tokenizer.json", lambda t: t.pop("model")),
        "its tokenizer cannot be read",
    ),
    "settings not JSON": (
        lambda hf: (hf / "tokenizer_config.json").write_text("{"),
        "its tokenizer cannot be read",
    ),
    "no chat template": (
        lambda hf: remove_chat_template(hf, None),
        "data.apply_chat_template (true) needs a tokenizer with a chat template",
    ),
    "chat template with an error": (
        lambda hf: remove_chat_template(hf, "{% for %}"),
        "prompts.jsonl:1: the chat template refuses the question",
    ),
    "chat template that reaches for Python": (
        lambda hf: remove_chat_template(hf, "{{ messages.__class__.__mro__[1].__subclasses__() }}"),
        "prompts.jsonl:1: the chat template refuses the question",
    ),
    "more tokens than rows": (
        lambda hf: edit_config_and_weights_to(hf, 40),
        "tensor model.embed_tokens.weight has shape [40, 32], expected [50, 32]",
    ),
    "end token in words": (
        lambda hf: edit_json(hf / "generation_config.json", lambda t: t.update(eos_token_id="end")),
        "generation_config.json: eos_token_id (['end']) must be a token id or a list of them",
    ),
}


def remove_chat_template(hf: Path, template: str | None) -> None:
    """Or puts another in its place."""
    (hf / "chat_template.jinja").unlink(missing_ok=True)
    edit_json(hf / "tokenizer_config.json", lambda t: t.pop("chat_template", None))
    if template is not None:
        (hf / "chat_template.jinja").write_text(template)


def edit_config_and_weights_to(hf: Path, num_rows: int) -> None:
    edit_config(hf, vocab_size=num_rows)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    edit_weights(hf, lambda t: t.update({name: t[name][:num_rows].clone() for name in names if name in t}))


@pytest.mark.parametrize("name", CONFIGS | WEIGHT_FILES | TOKENIZERS)
def test_a_broken_model_folder_is_refused(case, capsys, name):  # noqa: F811
    spoil, expected = (CONFIGS | WEIGHT_FILES | TOKENIZERS)[name]
    spoil(case / "hf")
    assert_says(refusal(train_with(case, []), case, capsys), case, expected)


PROMPTS: dict[str, tuple[str, bytes, str]] = {
    "empty": ("p.jsonl", b"", "p.jsonl:1: the file has no rows"),
    "blank lines": ("p.jsonl", b"\n\n", "p.jsonl:1: the file has no rows"),
    "unknown ending": ("p.txt", b"1+1", "p.txt: a prompt file must end in one of .jsonl, .json, .parquet"),
    "blank question": ("p.jsonl", b'{"question": "  "}', "p.jsonl:1: question is empty"),
    "number": ("p.jsonl", b'{"question": 3}', "question must be text or a list of messages, not int"),
    "no messages": ("p.jsonl", b'{"question": []}', "question is an empty list of messages"),
    "message without role": ("p.jsonl", b'{"question": [{"content": "a"}]}', "must have a role and a content"),
    "domain of numbers": ("p.jsonl", b'{"question": "a", "domain": 3}', "domain must be text, not int"),
    "not UTF-8": ("p.jsonl", b'{"question": "a"}\n{"question": "\xff"}', "p.jsonl:2: not UTF-8"),
    "an object instead of a list": ("p.json", b'{"question": "a"}', "a .json file must hold a list of rows"),
    "list cut short": ("p.json", b'[{"question": "a"},\n{"question"', "p.json:2: not JSON"),
    "not Parquet": ("p.parquet", b"PAR1 or so", "p.parquet: not Parquet"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_broken_prompt_file_is_refused(case, capsys, name):  # noqa: F811
    file, content, expected = PROMPTS[name]
    (case / file).write_bytes(content)
    run = train_with(case, ["--data.train_files", "{root}/" + file])
    assert_says(refusal(run, case, capsys), case, expected)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("run-by-a-pickle",)


def sign(checkpoint: Path) -> None:
    """Whoever spoils a checkpoint can write its manifest too."""
    files = {path.relative_to(checkpoint).as_posix(): path for path in checkpoint.rglob("*") if path.is_file()}
    content = {name: path.read_bytes() for name, path in files.items() if name != "manifest.json"}
    sizes = {name: len(data) for name, data in content.items()}
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    (checkpoint / "manifest.json").write_text(json.dumps({"sizes": sizes, "sha256": hashes}))


def other_content(path: Path, content: bytes = b"") -> None:
    path.write_bytes(content + bytes(10))


CHECKPOINTS: dict[str, tuple[Spoil, str]] = {
    "index of zeros": (lambda folder: other_content(folder / ".metadata"), "damaged: .metadata cannot be read"),
    "index that runs code": (
        lambda folder: other_content(folder / ".metadata", pickle.dumps(Evil())),
        ".metadata cannot be read: it names posix.mkdir, which no index does",
    ),
    "architecture not JSON": (
        lambda folder: other_content(folder / "hf" / CONFIG, b"{"),
        "config.json is not valid JSON",
    ),
    "tokenizer of zeros": (
        lambda folder: other_content(folder / "hf" / "tokenizer.json"),
        "its tokenizer cannot be read",
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_spoilt_checkpoint_that_agrees_with_its_manifest_is_refused(case, capsys, name):  # noqa: F811
    spoil, expected = CHECKPOINTS[name]
    spoil(case / "checkpoint")
    sign(case / "checkpoint")
    line = refusal(train_with(case, [], student="checkpoint"), case, capsys)
    assert_says(line, case, expected)
    assert not Path("run-by-a-pickle").exists()
