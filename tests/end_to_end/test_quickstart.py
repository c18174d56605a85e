"""The quickstart's script from end to end, with two training steps in place of all: every part must work together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHORT = ["--training.max_steps", "2", "--training.num_prompts_per_step", "32", "--training.global_batch_size", "16"]
SHORT += ["--training.micro_batch_size", "8"]


@pytest.mark.parametrize("student", ["teacher", "small"])
def test_the_quickstart_script_leaves_scores_a_report_and_a_sound_hugging_face_folder(student, tmp_path):
    run = tmp_path / "run"
    environment = os.environ | {"RUN_DIRECTORY": str(run), "PYTHON": sys.executable}
    environment |= {"STUDENT": f"examples/quickstart/{student}"}
    finished = subprocess.run(
        ["bash", "examples/quickstart/run.sh", *SHORT],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=800,
    )
    assert finished.returncode == 0, finished.stdout[-3000:]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["num_heldout_tasks"] == 256
    assert summary["teacher_accuracy"] >= 0.9
    assert summary["untrained_accuracy"] <= 0.1
    assert summary["trained_tokens"] > 0
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1]
    assert "<svg" in (run / "report.html").read_text() or "data:image/png" in (run / "report.html").read_text()
    assert {path.name for path in (run / "student_hf").iterdir()} >= {"config.json", "model.safetensors"}
