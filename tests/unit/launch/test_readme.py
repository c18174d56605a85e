"""The commands of launch/README.md: those that start ranks run here with --dry-run; the others need an engine."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FAKES = {
    "nvidia-smi": "for gpu in 0 1 2 3 4 5 6 7; do echo GPU $gpu: H100; done",
    "scontrol": "echo node7; echo node8",
    "srun": "exit 1",
}


def blocks() -> list[str]:
    """Of commands, continued lines joined."""
    text = (ROOT / "launch" / "README.md").read_text().replace("\\\n", " ")
    return re.findall(r"```bash[^\n]*\n(.*?)```", text, re.DOTALL)


def launching() -> list[tuple[str, str]]:
    """(exports that precede it in its block, command)."""
    found = []
    for block in blocks():
        exports = [line for line in block.splitlines() if line.startswith("export ")]
        launches = [line for line in block.splitlines() if re.search(r"launch/\S+\.(sh|sbatch)", line)]
        found += [("\n".join(exports), line) for line in launches]
    return found


@pytest.mark.parametrize(("exports", "command"), launching())
def test_every_command_that_starts_ranks_dry_runs(tmp_path, exports, command):
    for name, text in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    command = re.sub(r"\bsbatch (--nodes \d+ +)?launch/", "bash launch/", command).replace(" --dry-run", "")
    command = re.sub(r"launch/(torchrun\.sh|slurm\.sbatch)", r"\g<0> --dry-run", command, count=1)
    slurm = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "node[7-8]"} if "slurm" in command else {}
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "USER": "someone"} | slurm
    line = f"set -e\n{exports}\n{command}"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "-m torch.distributed.run --nnodes" in done.stdout and "-m megatron_opdlm.train --config" in done.stdout


def test_they_are_all_found():
    assert len(launching()) == 8
