"""The command line of `generate`: what it takes, what it refuses, and what it takes over from the model's folder."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from megatron_opdlm.config.load import save_config
from megatron_opdlm.config.schema import Config, DataConfig, RolloutConfig, StudentConfig
from megatron_opdlm.generate import main
from megatron_opdlm.terminal.arguments import OFFERED, parse_arguments
from megatron_opdlm.terminal.model_defaults import INHERITED
from megatron_opdlm.terminal.questions import read_questions

WRONG = {
    "no model": ([], "give --checkpoint or --hf, the model that answers"),
    "two models": (["--hf", "a", "--checkpoint", "b"], "--checkpoint (b) and --hf (a) exclude each other: give one"),
    "no such folder": (["--hf", "absent"], "--hf (absent) is not a folder"),
    "no such checkpoint": (["--checkpoint", "absent"], "--checkpoint (absent) is not a folder"),
    "two kinds of prompts": (
        ["--hf", ".", "--prompt", "a", "--prompts", "b.txt"],
        "--prompt and --prompts (b.txt) exclude each other: give one",
    ),
    "an empty prompt": (["--hf", ".", "--prompt", " "], "--prompt () must not be empty"),
    "a flag without its value": (["--hf", ".", "--prompt"], "argument --prompt: expected one argument"),
    "a flag misspelt": (["--hf", ".", "--promts", "a"], "--promts is no flag; the nearest is --prompts"),
    "a flag cut short": (["--hf", ".", "--js"], "--js is no flag; the nearest is --json"),
    "a setting misspelt": (
        ["--hf", ".", "--rollout.blok_size", "4"],
        "--rollout.blok_size is no flag; the nearest is --rollout.block_size",
    ),
    "a setting of training": (
        ["--hf", ".", "--optimizer.lr", "1"],
        "--optimizer.lr is a setting that decoding has no use for",
    ),
    "a value of the wrong type": (
        ["--hf", ".", "--rollout.block_size", "four"],
        "rollout.block_size (four) must be an integer",
    ),
    "a value out of range": (
        ["--hf", ".", "--rollout.temperature", "-1"],
        "rollout.temperature (-1.0) must be at least 0",
    ),
    "more steps than places": (
        ["--hf", ".", "--rollout.block_size", "2"],
        "rollout.denoising_steps_per_block (4) must not exceed rollout.block_size (2)",
    ),
    "steps of a map of steps": (
        ["--hf", ".", "--json", "--show-steps"],
        "--show-steps and --json exclude each other: step_map says it already",
    ),
    "output into nowhere": (
        ["--hf", ".", "--output", "absent/a.jsonl"],
        "--output (absent/a.jsonl) must lie in a folder that exists",
    ),
    "output onto a folder": (["--hf", ".", "--output", "."], "--output (.) must be a file, and is a folder"),
    "several answers in a chat": (
        ["--hf", ".", "--rollout.num_responses_per_prompt", "2"],
        "rollout.num_responses_per_prompt (2) must be 1 in a chat",
    ),
    "a layout of more processes": (
        ["--hf", ".", "--prompt", "a", "--parallel.tensor_model_parallel_size", "2"],
        "parallel.tensor_model_parallel_size (2) must divide the number of processes (1)",
    ),
    "no such file": (["--hf", ".", "--prompts", "absent.jsonl"], "absent.jsonl: no such file"),
    "no such text": (["--hf", ".", "--prompts", "absent.txt"], "absent.txt: no such file"),
    "a file of another kind": (
        ["--hf", ".", "--prompts", "absent.csv"],
        "absent.csv: a prompt file must end in one of .jsonl, .json, .parquet",
    ),
    "a folder that is no model": (
        ["--hf", ".", "--prompt", "a"],
        "student.hf (.) is neither a Hugging Face folder (it has no config.json) nor a whole Megatron checkpoint (it "
        "has no manifest.json)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path, capsys, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    arguments, expected = WRONG[case]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", f"error: {expected}\n")
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_flag_and_setting_and_does_without_torch(capsys, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] in ("torch", "megatron", "transformers")]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it would raise
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    own = ("--checkpoint", "--hf", "--prompt", "--prompts", "--raw", "--json", "--output", "--show-steps")
    assert [flag for flag in (*own, *(f"--{name} " for name in OFFERED)) if flag not in text] == []


def test_a_checkpoint_says_how_it_decodes_and_a_flag_says_otherwise(tmp_path):
    config = Config(
        student=StudentConfig(hf="gone", mask_token="<gap>"),
        data=DataConfig(enable_thinking=True),
        rollout=RolloutConfig(block_size=8, denoising_steps_per_block=6, batch_size=3, num_responses_per_prompt=4),
    )
    folder = tmp_path / "run" / "checkpoints" / "best"
    folder.mkdir(parents=True)
    save_config(config, folder / "config.yaml")
    read = parse_arguments(["--checkpoint", str(folder), "--rollout.denoising_steps_per_block", "5"]).config
    assert (read.student.mask_token, read.student.hf) == ("<gap>", None)
    assert read.student.checkpoint == str(folder)
    assert read.data.enable_thinking and read.data.apply_chat_template
    assert (read.rollout.block_size, read.rollout.denoising_steps_per_block) == (8, 5)
    assert (read.rollout.batch_size, read.rollout.num_responses_per_prompt) == (128, 1), "of the run, not of the model"
    assert parse_arguments(["--checkpoint", str(tmp_path / "run")]).config.student.checkpoint == str(folder.parent)


def test_every_inherited_setting_can_be_given_too():
    assert set(INHERITED) - {"data.apply_chat_template"} <= set(OFFERED)  # --raw


def test_a_hugging_face_folder_says_how_it_decodes(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "float32", "block_size": 32, "mask_token_id": 3}))
    read = parse_arguments(["--hf", str(tmp_path), "--raw"]).config
    assert (read.precision.dtype, read.rollout.block_size, read.rollout.denoising_steps_per_block) == (
        "float32",
        32,
        32,
    )
    assert not read.data.apply_chat_template
    (tmp_path / "config.json").write_text(json.dumps({"torch_dtype": "float16"}))
    read = parse_arguments(["--hf", str(tmp_path)]).config
    assert read.precision == Config().precision and read.rollout == Config().rollout


def test_the_generation_config_of_an_exported_student_counts(tmp_path):
    keys = {"block_length": 8, "denoising_steps": 2, "dynamic_threshold": 1, "eb_threshold": 0.5}
    write = (tmp_path / "generation_config.json").write_text
    write(json.dumps(keys | {"remasking_strategy": "entropy_bounded", "eos_token_id": 3}))
    (tmp_path / "config.json").write_text(json.dumps({"block_size": 8, "logit_shift": "next_token"}))
    assert parse_arguments(["--hf", str(tmp_path)]).config.rollout == RolloutConfig(
        block_size=8,
        denoising_steps_per_block=2,
        remasking_strategy="entropy_bounded",
        dynamic_threshold=1,
        entropy_bound=0.5,
        logit_shift="next_token",
    )
    for key, value, rule in (("block_length", "8", "an integer"), ("dynamic_threshold", True, "a number")):
        write(json.dumps({key: value}))
        with pytest.raises(ValueError, match=rf"generation_config.json: {key} \({value}\) must be {rule}"):
            parse_arguments(["--hf", str(tmp_path)])
    write(json.dumps({"remasking_strategy": "none"}))
    with pytest.raises(ValueError, match=r"remasking_strategy \(none\) must be one of low_confidence_static, "):
        parse_arguments(["--hf", str(tmp_path)])


def test_block_sizes_that_no_row_of_training_could_have_are_fine(tmp_path):
    flags = ["--rollout.block_size", "5", "--parallel.tensor_model_parallel_size", "2"]
    rollout = parse_arguments(["--hf", str(tmp_path), *flags, "--parallel.sequence_parallel", "true"]).config.rollout
    assert rollout == dataclasses.replace(Config().rollout, block_size=5)


def test_text_files_and_standard_input_have_a_prompt_a_line(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\n  two\u2028\f \n".encode())
    assert [row["question"] for _, row in read_questions(None, str(tmp_path / "a.txt"))] == ["one", "  two\u2028\f "]
    with (tmp_path / "a.txt").open(encoding="utf-8-sig") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert [where for where, _ in read_questions(None, "-")] == ["standard input:1", "standard input:3"]
    Path(tmp_path / "b.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"b.txt: there is no prompt in it"):
        read_questions(None, str(tmp_path / "b.txt"))
    Path(tmp_path / "c.jsonl").write_text('{"question": "one"}\n{"question": 2}\n')
    with pytest.raises(ValueError, match=r"c.jsonl:2: question must be text or a list of messages, not int"):
        read_questions(None, str(tmp_path / "c.jsonl"))
