"""The commands for evaluation on tasks, as a user gives them, right and wrong ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opdlm.evaluate import main as evaluate
from megatron_opdlm.evaluation.lm_eval import with_our_tasks
from tests.tiny_qwen3 import make_tiny_qwen3
from tests.tiny_tasks import sum_rows, write_task

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("commands")
    make_tiny_qwen3(root / "hf", seed=5)
    write_task(root / "tasks", "sums", sum_rows(5), generation="{until: [], max_gen_toks: 8}")
    return root


def run(arguments: list[str], num_processes: int = 1) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    command = [sys.executable, *(launcher if num_processes > 1 else []), "-m", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def test_evaluate_prints_the_table_that_it_writes(folder, tmp_path):
    settings = {
        "student.hf": folder / "hf",
        "precision.dtype": "float32",
        "evaluation.tasks": "sums",
        "evaluation.include_path": folder / "tasks",
        "logging.directory": tmp_path,
    }
    ran = run(["megatron_opdlm.evaluate", *(f"--{name}={value}" for name, value in settings.items())], num_processes=2)
    assert ran.returncode == 0, ran.stderr
    table = (tmp_path / "evaluation" / "results.md").read_text()
    assert ran.stdout == table, "once, by rank 0"
    assert "| sums | exact_match,last_number |" in table
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert results["tasks"]["sums"]["decoding"]["dynamic_threshold"] == 0.9


def test_the_command_line_of_the_harness_knows_the_model(folder, tmp_path):
    model = f"student.hf={folder / 'hf'},precision.dtype=float32,rollout.block_size=4,logging.progress_bar=false"
    arguments = [
        "run",
        "--model",
        "megatron_opdlm",
        "--model_args",
        model,
        "--tasks",
        str(folder / "tasks" / "sums.yaml"),
    ]
    arguments += ["--apply_chat_template", "--output_path", str(tmp_path), "--log_samples"]
    ran = run(["megatron_opdlm.evaluation.lm_eval", *arguments], num_processes=2)
    assert ran.returncode == 0, ran.stderr
    results = [json.loads(path.read_text()) for path in tmp_path.rglob("results_*.json")]
    assert len(results) == 1, "one rank writes"
    assert results[0]["n-samples"]["sums"]["effective"] == 5
    assert results[0]["config"]["block_size"] == 4
    assert ran.stdout.count("exact_match") == 1, "one rank prints"


def test_the_tasks_of_this_package_are_known_unless_another_folder_is_named():
    assert with_our_tasks(["run", "--tasks", "a"])[-2:][0] == "--include_path"
    for arguments in (
        ["run", "--tasks", "a", "--include_path", "mine"],
        ["run", "--tasks=a", "--include_path=mine"],
        ["ls"],
    ):
        assert with_our_tasks(arguments) == arguments


STUDENT = ["--student.hf", "{folder}/hf"]
SUMS = ["--evaluation.tasks", "sums", "--evaluation.include_path", "{folder}/tasks"]
WRONG = {
    "nothing to score": (STUDENT, "give evaluation.files or evaluation.tasks, at least one of them"),
    "no model": (["--evaluation.tasks", "sums"], "give student.hf or student.checkpoint"),
    "no teacher": (
        ["--evaluation.tasks", "sums", "--evaluation.role", "teacher"],
        "give teacher.hf or teacher.checkpoint",
    ),
    "tasks and files": (
        [*STUDENT, "--evaluation.tasks", "sums", "--evaluation.files", "a.jsonl"],
        "evaluation.files (a.jsonl) and evaluation.tasks (sums) exclude each other: give one",
    ),
    "a teacher on files": (
        ["--teacher.hf", "{folder}/hf", "--evaluation.role", "teacher", "--evaluation.files", "a.jsonl"],
        "evaluation.role (teacher) must be student for evaluation.files; evaluation.tasks takes either",
    ),
    "a chunk too many": (
        [*STUDENT, *SUMS, "--evaluation.num_chunks", "2", "--evaluation.chunk", "2"],
        "evaluation.chunk (2) must be from 0 to one below evaluation.num_chunks (2)",
    ),
    "no responses": (
        [*STUDENT, *SUMS, "--evaluation.num_responses", "0"],
        "evaluation.num_responses (0) must be at least 1",
    ),
    "a folder of tasks that is not there": (
        [*STUDENT, "--evaluation.tasks", "sums", "--evaluation.include_path", "absent"],
        "evaluation.include_path: there is no folder absent",
    ),
    "a folder of data that is not there": (
        [*STUDENT, *SUMS, "--evaluation.data_dir", "absent"],
        "evaluation.data_dir: there is no folder absent",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_line_and_nothing_is_written(folder, tmp_path, capsys, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    arguments, expected = WRONG[case]
    with pytest.raises(SystemExit) as stop:
        evaluate([argument.format(folder=folder) for argument in arguments])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {expected}\n"
    assert list(tmp_path.iterdir()) == []
