"""A user's mistake: one line that says what is wrong, exit code 2, and nothing written.

Every case goes through an entry point as a user would. `{folder}` and the like in arguments and messages stand for the
paths of a case, all of them in a directory of its own.
"""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_opdlm.train import main as train
from tests.tiny_qwen3 import make_tiny_qwen3, write_prompts
from tests.worlds import layout, remove_parallel_groups

ROOT = Path(__file__).parents[2]
WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.fixture(scope="module")
def originals(tmp_path_factory, world_of_one) -> Path:
    """A model, prompts, and a student's checkpoint, all of them good."""
    from megatron_opdlm.checkpointing.conversion import hf_to_megatron
    from megatron_opdlm.config.schema import ParallelConfig

    root = tmp_path_factory.mktemp("good")
    make_tiny_qwen3(root / "hf")
    write_prompts(root / "prompts.jsonl", 8)
    with layout(ParallelConfig()):
        hf_to_megatron(str(root / "hf"), root / "checkpoint", role="student", dtype=None, mask_token="<|MASK|>")
    return root


@pytest.fixture
def case(originals, tmp_path) -> Path:
    """A copy that may be spoilt; also leaves no trace of Megatron's groups behind."""
    root = tmp_path / "case"
    shutil.copytree(originals, root)
    yield root
    remove_parallel_groups()


def files_below(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def refusal(run: Callable[[], object], root: Path, capsys) -> str:
    """The one line of the error; checks the exit code and that no file came, went or changed."""
    before = files_below(root)
    with pytest.raises(SystemExit) as stop:
        run()
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert files_below(root) == before, "nothing may be written"
    lines = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in printed.err, printed.err
    return lines[0]


def arguments_of(root: Path, student: str = "hf") -> list[str]:
    """Of one small training step."""
    settings = {
        f"--student.{student}": root / student,
        "--teacher.hf": root / "hf",
        "--data.train_files": root / "prompts.jsonl",
        "--precision.dtype": "float32",
        "--rollout.max_new_tokens": 4,
        "--training.max_steps": 1,
        "--training.num_prompts_per_step": 4,
        "--training.global_batch_size": 4,
        "--training.pad_to_multiple": 8,
        "--logging.directory": root / "run",
        "--logging.tensorboard": "false",
        "--logging.progress_bar": "false",
    }
    return [str(part) for pair in settings.items() for part in pair]


def train_with(root: Path, arguments: list[str], student: str = "hf") -> Callable[[], None]:
    return lambda: train([*arguments_of(root, student), *(argument.format(root=root) for argument in arguments)])


def assert_says(line: str, root: Path, expected: str) -> None:
    pattern = ".*".join(re.escape(part.replace("{root}", str(root))) for part in expected.split("..."))
    assert re.search(pattern, line), f"{line!r} does not say {expected!r}"


FP8_FITS = ["--precision.dtype", "bfloat16", "--training.pad_to_multiple", "16"]
FLAGS = {
    "misspelt setting": (
        ["--rollout.blok_size", "4"],
        "--rollout.blok_size is not a setting; the nearest is rollout.block_size",
    ),
    "misspelt section": (
        ["--rolout.block_size", "4"],
        "--rolout.block_size is not a setting; the nearest is rollout.block_size",
    ),
    "value of a wrong type": (["--training.max_steps", "many"], "training.max_steps (many) must be"),
    "unknown backend": (["--attention.backend", "fast"], "attention.backend (fast) must be ... aten"),
    "kernel of another backend": (
        ["--attention.backend", "aten", "--attention.kernel", "triton"],
        "attention.kernel (triton) must be",
    ),
    "FP8 without a GPU": (
        [*FP8_FITS, "--precision.fp8", "delayed"],
        "precision.fp8 (delayed) needs a GPU",
    ),
    "FP8 teacher without a GPU": (
        [*FP8_FITS, "--precision.teacher_fp8", "blockwise"],
        "precision.teacher_fp8 (blockwise) needs a GPU",
    ),
    "FP8 attention without a GPU": (
        [*FP8_FITS, "--precision.fp8", "delayed", "--attention.fp8", "true"],
        "precision.fp8 (delayed) needs a GPU",
    ),
    "layers that are not installed": (
        ["--student.transformer", '{{"transformer_impl": "transformer_engine"}}'],
        "transformer.transformer_impl (transformer_engine) must be local, or",
    ),
    "unknown shift": (["--rollout.logit_shift", "next"], "rollout.logit_shift (next) must be"),
    "no responses": (["--objective.name", "sft"], "{root}/prompts.jsonl:1: the row has no response"),
    "preset of another objective": (
        ["--objective.preset", "sdar"],
        "objective.preset (sdar) must be left alone under objective.name (on_policy_distillation)",
    ),
    "unknown strategy": (["--rollout.remasking_strategy", "random"], "rollout.remasking_strategy (random) must be"),
    "tensor parallelism": (
        ["--parallel.tensor_model_parallel_size", "3"],
        "parallel.tensor_model_parallel_size (3) must divide the number of processes (1)",
    ),
    "global batch": (
        ["--training.micro_batch_size", "3"],
        "training.global_batch_size (4) must be a multiple of training.micro_batch_size (3)",
    ),
    "prompts per step": (
        ["--training.num_prompts_per_step", "6"],
        "training.num_prompts_per_step (6) must be a multiple of training.global_batch_size (4)",
    ),
    "block and padding": (
        ["--rollout.block_size", "16"],
        "training.pad_to_multiple (8) must be a multiple of rollout.block_size (16)",
    ),
    "block and steps": (
        ["--rollout.denoising_steps_per_block", "5"],
        "rollout.denoising_steps_per_block (5) must not exceed rollout.block_size (4)",
    ),
    "two students": (["--student.checkpoint", "{root}/checkpoint"], "student.hf ({root}/hf) and student.checkpoint"),
    "no such folder": (["--student.hf", "{root}/nowhere"], "student.hf: there is no folder {root}/nowhere"),
    "no such prompts": (
        ["--data.train_files", "{root}/no.jsonl"],
        "data.train_files: there is no file {root}/no.jsonl",
    ),
    "no such recipe": (["--config", "{root}/no.yaml"], "there is no file {root}/no.yaml"),
    "Megatron field": (
        ["--student.transformer", '{{"num_layer": 1}}'],
        "transformer.num_layer is not a field of Megatron's TransformerConfig",
    ),
    "stop token": (
        ["--rollout.stop_token_ids", "999"],
        "end token 999...rollout.stop_token_ids) must be a token that the student can write",
    ),
    "mask is the end token": (["--student.mask_token", "<|im_end|>"], "student.mask_token (<|im_end|>) must not be"),
    "prompts all too long": (
        ["--data.max_prompt_tokens", "3"],
        "data.max_prompt_tokens (3) leaves none of the 8 prompts",
    ),
}


@pytest.mark.parametrize("name", FLAGS)
def test_a_wrong_setting_is_refused(case, capsys, name):
    arguments, expected = FLAGS[name]
    assert_says(refusal(train_with(case, arguments), case, capsys), case, expected)


def edit_config(folder: Path, **values) -> None:
    path = folder / CONFIG
    kept = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in kept.items() if value is not None}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def cut_short(path: Path, num_bytes: int = 100) -> None:
    path.write_bytes(path.read_bytes()[:-num_bytes])


NORM = "model.layers.1.self_attn.q_norm.weight"
UP = "model.layers.0.mlp.up_proj.weight"
HF_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (
        lambda hf: (hf / CONFIG).unlink(),
        "student.hf ({root}/hf) is neither a Hugging Face folder (it has no config.json) nor",
    ),
    "malformed config": (lambda hf: cut_short(hf / CONFIG, 3), "{root}/hf/config.json is not valid JSON"),
    "config is a list": (lambda hf: (hf / CONFIG).write_text("[]"), "{root}/hf/config.json must hold a JSON object"),
    "key missing": (lambda hf: edit_config(hf, hidden_size=None), "config.json: hidden_size is missing"),
    "another model": (lambda hf: edit_config(hf, model_type="llama"), "config.json: model_type is 'llama'"),
    "RoPE scaling": (
        lambda hf: edit_config(hf, rope_parameters={"rope_type": "yarn", "rope_theta": 1e6}),
        "config.json: rope_type is 'yarn'",
    ),
    "sliding windows": (
        lambda hf: edit_config(hf, use_sliding_window=True),
        "config.json: use_sliding_window is True; only False is supported",
    ),
    "SDAR without its mask token": (
        lambda hf: edit_config(hf, model_type="sdar"),
        "student.mask_token (<|MASK|>) must be the mask token that {root}/hf was trained with",
    ),
    "no weights": (lambda hf: (hf / WEIGHTS).unlink(), "{root}/hf has neither model.safetensors nor"),
    "damaged weights": (lambda hf: cut_short(hf / WEIGHTS), "{root}/hf/model.safetensors is damaged"),
    "tensor missing": (lambda hf: edit_weights(hf, lambda t: t.pop(NORM)), f"{{root}}/hf has no tensor {NORM}"),
    "wrong shape": (
        lambda hf: edit_weights(hf, lambda t: t.update({UP: torch.zeros(48, 30)})),
        f"tensor {UP} has shape [48, 30], expected [48, 32]",
    ),
    "wrong vocabulary": (
        lambda hf: edit_config(hf, vocab_size=50),
        "tensor model.embed_tokens.weight has shape [52, 32]",
    ),
    "no tokenizer": (lambda hf: (hf / "tokenizer.json").unlink(), "{root}/hf: no tokenizer there"),
    "malformed tokenizer": (lambda hf: cut_short(hf / "tokenizer.json"), "{root}/hf: its tokenizer cannot be read"),
    "malformed generation config": (
        lambda hf: (hf / "generation_config.json").write_text("{"),
        "generation_config.json: not JSON",
    ),
}


def test_a_block_diffusion_teacher_is_refused(case, capsys):
    shutil.copytree(case / "hf", case / "sdar")
    edit_config(case / "sdar", model_type="sdar")
    expected = "teacher.hf ({root}/sdar) is a block-diffusion model...a teacher must be autoregressive"
    assert_says(refusal(train_with(case, ["--teacher.hf", "{root}/sdar"]), case, capsys), case, expected)


@pytest.mark.parametrize("name", HF_FOLDERS)
def test_a_broken_hugging_face_folder_is_refused(case, capsys, name):
    spoil, expected = HF_FOLDERS[name]
    spoil(case / "hf")
    assert_says(refusal(train_with(case, []), case, capsys), case, expected)


def test_a_teacher_with_another_tokenizer_is_refused(case, capsys):
    shutil.copytree(case / "hf", case / "teacher")
    path = case / "teacher" / "tokenizer.json"
    path.write_text(path.read_text().replace('"q"', '"Q"'))
    line = refusal(train_with(case, ["--teacher.hf", "{root}/teacher"]), case, capsys)
    assert_says(
        line, case, "student and teacher must have the same tokenizer...'q' for the student...'Q' for the teacher"
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [('{"question": "1+1="', "not JSON"), ('{"answer": "2"}', "the row has no question"), ("[1]", "must be an object")],
)
def test_a_bad_line_of_a_prompt_file_is_named(case, capsys, line, reason):
    prompts = case / "prompts.jsonl"
    rows = prompts.read_text().splitlines()
    prompts.write_text("\n".join([*rows[:2], line, *rows[2:]]))
    assert_says(refusal(train_with(case, []), case, capsys), case, f"{{root}}/prompts.jsonl:3: ...{reason}")


def first_shard(checkpoint: Path) -> Path:
    return min(checkpoint.glob("*.distcp"))


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (
        lambda folder: (folder / "manifest.json").unlink(),
        "{root}/checkpoint...it has no manifest.json",
    ),
    "malformed manifest": (lambda folder: cut_short(folder / "manifest.json", 5), "manifest.json is damaged"),
    "shard missing": (
        lambda folder: first_shard(folder).unlink(),
        "checkpoint {root}/checkpoint is incomplete: __0_0.distcp",
    ),
    "shard cut short": (
        lambda folder: cut_short(first_shard(folder)),
        "checkpoint {root}/checkpoint is damaged: __0_0.distcp",
    ),
    "assets missing": (
        lambda folder: (folder / "hf" / CONFIG).unlink(),
        "{root}/checkpoint is incomplete: hf/config.json is missing",
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_broken_checkpoint_of_the_student_is_refused(case, capsys, name):
    spoil, expected = CHECKPOINTS[name]
    spoil(case / "checkpoint")
    assert_says(refusal(train_with(case, [], student="checkpoint"), case, capsys), case, expected)


def zero_content(folder: Path) -> None:
    """Files of the same size, but not what was written."""
    for shard in folder.glob("*.distcp"):
        shard.write_bytes(bytes(shard.stat().st_size))


def test_a_checkpoint_whose_content_is_damaged_is_refused(case, capsys):
    zero_content(case / "checkpoint")
    line = refusal(train_with(case, [], student="checkpoint"), case, capsys)
    assert_says(line, case, "checkpoint {root}/checkpoint is damaged or of another model")


def test_a_run_that_is_resumed_with_another_model_is_refused(case, capsys):
    from megatron_opdlm.config.load import load_config
    from megatron_opdlm.training.trainer import Trainer

    config = load_config(arguments_of(case))
    with layout(config.parallel):
        Trainer(config).run()
    make_tiny_qwen3(case / "wider", num_layers=3)
    line = refusal(train_with(case, ["--student.hf", "{root}/wider", "--training.max_steps", "2"]), case, capsys)
    assert_says(line, case, "step_00000001 is damaged or of another model...mismatch")


def run_tool(name: str, arguments: list[str], monkeypatch) -> Callable[[], object]:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    return lambda: runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_broken_checkpoint_is_not_exported(case, capsys, monkeypatch, name):
    spoil, expected = CHECKPOINTS[name]
    spoil(case / "checkpoint")
    arguments = ["--checkpoint", str(case / "checkpoint"), "--output", str(case / "out")]
    line = refusal(run_tool("convert_megatron_to_hf.py", arguments, monkeypatch), case, capsys)
    assert_says(line, case, expected)
    assert not (case / "out").exists() and not list(case.glob("*.partial"))


def test_no_tool_writes_over_an_output_that_exists(case, capsys, monkeypatch):
    (case / "out").mkdir()
    (case / "out" / "mine").write_text("keep")
    for name, source in (("convert_hf_to_megatron.py", "--hf"), ("convert_megatron_to_hf.py", "--checkpoint")):
        arguments = [source, str(case / source.lstrip("-")), "--output", str(case / "out")]
        line = refusal(run_tool(name, arguments, monkeypatch), case, capsys)
        assert_says(line, case, "--output ({root}/out) exists already")


@pytest.mark.parametrize("name", ["tensor missing", "wrong shape", "damaged weights", "malformed config"])
def test_a_broken_hugging_face_folder_is_not_converted(case, capsys, monkeypatch, name):
    spoil, expected = HF_FOLDERS[name]
    spoil(case / "hf")
    arguments = ["--hf", str(case / "hf"), "--output", str(case / "out")]
    line = refusal(run_tool("convert_hf_to_megatron.py", arguments, monkeypatch), case, capsys)
    assert_says(line, case, expected)
    assert not (case / "out").exists() and not list(case.glob("*.partial"))


def test_tensor_parallelism_that_does_not_divide_the_heads_is_refused(originals):
    from megatron_opdlm.config.schema import ParallelConfig
    from megatron_opdlm.models.build import transformer_config
    from megatron_opdlm.models.qwen3 import read_architecture

    with pytest.raises(ValueError, match=r"tensor_model_parallel_size \(3\) must divide num_attention_heads \(4\)"):
        transformer_config(
            read_architecture(originals / "hf"),
            parallel=ParallelConfig(tensor_model_parallel_size=3),
            dtype="float32",
            overrides={},
        )


def test_good_input_of_the_same_making_is_accepted(case):
    """So that the refusals above are not of something else."""
    from megatron_opdlm.config.load import load_config
    from megatron_opdlm.training.trainer import Trainer

    config = load_config(arguments_of(case))
    with layout(config.parallel):
        Trainer(config).run()
    assert (case / "run" / "metrics.jsonl").is_file()
