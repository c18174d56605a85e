"""The command that quantizes, as a user gives it, right and wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron_opdlm.checkpointing.hf_folder import SafetensorsReader
from megatron_opdlm.models.qwen3 import read_architecture
from tests.tiny_moe import make_tiny_moe
from tests.tiny_qwen3 import make_tiny_qwen3, write_prompts
from tools.quantize import main

ENTRY = {"metadata": {"expression": "1 + 2"}, "answer": "3"}
TASK = {"question": "1 + 2 =", "source": "reasoning_gym/chain_sum", "entry": ENTRY, "ground_truth_answer": "3"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("quantize")
    make_tiny_qwen3(root / "hf", seed=5)
    write_prompts(root / "prompts.jsonl", 3)
    (root / "heldout.jsonl").write_text(2 * (json.dumps(TASK) + "\n"))
    return root


def run(
    monkeypatch, folder: Path, output: Path, *further: str, quantization: str = "fp8", role: str = "student"
) -> None:
    arguments = [
        *("--format", quantization, "--output", str(output), "--num-prompts", "2"),
        *(f"--{role}.hf", str(folder / "hf"), "--data.train_files", str(folder / "prompts.jsonl")),
        *("--precision.dtype", "float32", "--rollout.max_new_tokens", "8", "--logging.progress_bar", "false"),
    ]
    monkeypatch.setattr(sys, "argv", ["quantize.py", *arguments, *further])
    main()


def test_a_student_becomes_a_folder_with_a_report(monkeypatch, folder, tmp_path, capsys):
    heldout = str(folder / "heldout.jsonl")
    run(monkeypatch, folder, tmp_path / "out", "--evaluation.files", heldout)
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert report["calibration"]["prompts"] == 2
    assert report["calibration"]["tokens"] > 0
    assert 0 < report["kl_to_unquantized"] < 1
    for which in ("unquantized", "quantized"):
        assert report["tasks"][heldout][which]["num_tasks"] == 2
    printed = capsys.readouterr().out
    assert "| heldout.jsonl | accuracy |" in printed
    assert "quantizers" not in printed
    names = SafetensorsReader(tmp_path / "out").names
    assert "model.layers.1.mlp.down_proj.weight_scale" in names
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mask_token_id"] is not None


def test_a_mixture_that_no_server_reads_is_warned_of(monkeypatch, tmp_path, capfd):
    make_tiny_moe(tmp_path / "hf", seed=5)
    write_prompts(tmp_path / "prompts.jsonl", 3)
    run(monkeypatch, tmp_path, tmp_path / "out", quantization="int8")
    assert "read no int8 mixture" in "".join(capfd.readouterr())
    run(monkeypatch, tmp_path, tmp_path / "fp8")
    assert "read no int8 mixture" not in "".join(capfd.readouterr())
    assert (
        "model.layers.1.mlp.gate"
        in json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]["ignore"]
    )


def test_a_teacher_is_quantized_alike_and_not_taken_for_whole_weights(monkeypatch, folder, tmp_path):
    run(monkeypatch, folder, tmp_path / "out", "--evaluation.role", "teacher", quantization="int8", role="teacher")
    assert json.loads((tmp_path / "out" / "quantization_report.json").read_text())["tasks"] == {}
    assert "mask_token_id" not in json.loads((tmp_path / "out" / "config.json").read_text())
    with pytest.raises(ValueError, match="quantization_config is set"):
        read_architecture(tmp_path / "out")


WRONG = {
    "no such setting": (["--rollout.blocksize", "4"], "--rollout.blocksize is not a setting"),
    "tasks of the harness": (["--evaluation.tasks", "gsm8k"], "evaluation.tasks must be left out"),
    "a layout": (["--parallel.tensor_model_parallel_size", "2"], "parallel."),
    "no prompts": (["--num-prompts", "0"], "--num-prompts (0) must be at least 1"),
    "other layers": (["--student.transformer", '{"transformer_impl": "transformer_engine"}'], "must be local"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_ends_in_one_line_and_leaves_nothing(monkeypatch, folder, tmp_path, capsys, name):
    further, message = WRONG[name]
    assert_refused(monkeypatch, folder, tmp_path / "out", capsys, message, *further)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_left_alone(monkeypatch, folder, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert_refused(monkeypatch, folder, tmp_path / "out", capsys, "must not exist")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_missing_modelopt_is_one_line_that_says_what_to_install(monkeypatch, folder, tmp_path, capsys):
    for name in ("modelopt", "modelopt.torch", "modelopt.torch.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    message = 'quantisation needs nvidia-modelopt, which is not installed; try pip install "megatron-opdlm[modelopt]"'
    assert_refused(monkeypatch, folder, tmp_path / "out", capsys, message)
    assert list(tmp_path.iterdir()) == []


def assert_refused(monkeypatch, folder: Path, output: Path, capsys, message: str, *further: str) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, folder, output, *further)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
