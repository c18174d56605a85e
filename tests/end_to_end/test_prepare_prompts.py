"""`tools/prepare_prompts.py` from the command line: a killed preparation goes on, and mistakes end in one line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tools.prepare_prompts import main

ROOT = Path(__file__).parents[2]
SETTINGS = [
    "--mix=tests/fixtures/prompts/mix.yaml",
    "--tokenizer=examples/quickstart/teacher",
    "--rows-per-shard=4",
    "--max-prompt-tokens=200",
]
COMPARED = "--evaluation-data=tests/fixtures/benchmarks"
KILLED_AT_ITS_SIXTH_FILE = """
import os, pathlib, signal, sys
rename, names = pathlib.Path.replace, []
def replace(path, target):
    names.append(target)
    if len(names) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(path, target)
pathlib.Path.replace = replace
from tools.prepare_prompts import main
main()
"""


def prepare(output, program=("tools/prepare_prompts.py",)):
    command = [sys.executable, *program, *SETTINGS, "--no-evaluation-data", f"--output={output}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_killed_preparation_goes_on_and_ends_in_the_same_files(tmp_path):
    whole = prepare(tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    killed = prepare(tmp_path / "killed", program=("-c", KILLED_AT_ITS_SIXTH_FILE))
    assert killed.returncode == -signal.SIGKILL
    assert list((tmp_path / "killed").glob("**/*.partial"))
    assert prepare(tmp_path / "killed").stdout == whole.stdout
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_what_stands_in_an_evaluation_set_is_dropped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for name, flag in (("compared", COMPARED), ("all", "--no-evaluation-data")):
        monkeypatch.setattr(sys, "argv", ["prepare_prompts.py", *SETTINGS, flag, f"--output={tmp_path / name}"])
        main()
    dropped = {
        name: json.loads((tmp_path / name / "statistics.json").read_text())["all"]["dropped"]["in_evaluation"]
        for name in ("compared", "all")
    }
    assert dropped == {"compared": 2, "all": 0}
    assert "| general | 12 | 6 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mix=opdml"], "--mix (opdml) must be one of opdlm, math, codeforces or a YAML file that exists"),
        (["--benchmarks=gsm8k"], "--benchmarks (gsm8k) must be of opdlm_mmlu, "),
        (["--ngram=0"], "--ngram (0) must be at least 1"),
        (
            ["--evaluation-data=tests"],
            "evaluation.data_dir (tests) has no MMLU.json, the rows of MMLU; get it with",
        ),
        (["--tokenizer=tests"], "tests: no tokenizer there"),
    ],
)
def test_a_mistake_ends_in_one_line_and_leaves_nothing(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    flags = [COMPARED, *flags]
    monkeypatch.setattr(sys, "argv", ["prepare_prompts.py", *SETTINGS, f"--output={tmp_path / 'out'}", *flags])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()
