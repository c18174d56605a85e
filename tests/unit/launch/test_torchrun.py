"""launch/torchrun.sh: the command that each node runs, its environment, and what it refuses."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROGRAM = ["--", "-m", "megatron_opdlm.train", "--config", "my recipe.yaml"]
MADE_BY = (
    *("SLURM", "PET_", "NCCL", "JOB_", "MASTER", "NNODES", "NODE_", "GPUS_", "OMP_", "TORCH", "LOCAL_", "PYTHON"),
    "CUDA_",
)


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Without what the surroundings of the tests have set."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(MADE_BY)}
    command = ["bash", "launch/torchrun.sh", *arguments]
    return subprocess.run(command, cwd=ROOT, env=clean | environment, capture_output=True, text=True, timeout=60)


def dry_run(*arguments: str, **environment: str) -> tuple[dict[str, str], list[list[str]]]:
    """What it would export, and its commands as words."""
    done = launch("--dry-run", *arguments, *PROGRAM, **environment)
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]
    exported = dict(words[1].split("=", 1) for words in lines if words[0] == "export")
    return exported, [words for words in lines if words[0] != "export"]


def test_on_one_node_torchrun_meets_itself_on_a_free_port():
    exported, (report, ranks) = dry_run(GPUS_PER_NODE="4")
    assert report == ["python", "-m", "megatron_opdlm.versions"]
    nodes = ["--nnodes", "1", "--nproc-per-node", "4", "--max-restarts", "3", "--standalone"]
    assert ranks == ["python", "-m", "torch.distributed.run", *nodes, *PROGRAM[1:]]
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in exported
    assert exported["PYTHONPATH"] == str(ROOT)


@pytest.mark.parametrize(("chosen", "ranks"), [({}, "3"), ({"CUDA_VISIBLE_DEVICES": "2,GPU-8a"}, "2")])
def test_each_gpu_that_may_be_used_gets_a_rank(tmp_path, chosen, ranks):
    (tmp_path / "nvidia-smi").write_text("#!/bin/bash\nprintf 'GPU %s: H100\\n  MIG 1g.10gb\\n' 0 1 2\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    _, (_, command) = dry_run(**chosen, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert command[command.index("--nproc-per-node") + 1] == ranks


@pytest.mark.parametrize("none", ["", "-1"])
def test_without_a_gpu_that_may_be_used_the_processes_have_to_be_given(none):
    done = launch("--dry-run", *PROGRAM, CUDA_VISIBLE_DEVICES=none)
    assert done.returncode == 2 and "GPUS_PER_NODE must be given" in done.stderr


@pytest.mark.parametrize(("node_rank", "is_host"), [("0", "1"), ("5", "0")])
def test_on_several_nodes_the_first_one_keeps_the_store(node_rank, is_host):
    where = {"MASTER_ADDR": "first", "LOCAL_ADDR": "own", "NODE_RANK": node_rank}
    exported, (_, ranks) = dry_run(NNODES="6", GPUS_PER_NODE="8", MAX_RESTARTS="9", JOB_ID="17", **where)
    assert ranks[3:] == [
        *("--nnodes", "6", "--nproc-per-node", "8", "--max-restarts", "9"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "first:29500", "--rdzv-id", "17"),
        *("--rdzv-conf", f"is_host={is_host},join_timeout=1800,read_timeout=300", "--local-addr", "own"),
        *PROGRAM[1:],
    ]
    assert exported["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def test_flags_win_over_the_environment():
    flags = ["--nnodes", "2", "--gpus-per-node", "3", "--node-rank", "1", "--master-addr", "b", "--master-port", "7"]
    _, (_, ranks) = dry_run(*flags, "--max-restarts", "0", "--job-id", "x", NNODES="4", MASTER_ADDR="a", JOB_ID="y")
    assert ranks[3:9] == ["--nnodes", "2", "--nproc-per-node", "3", "--max-restarts", "0"]
    assert ranks[11:15] == ["--rdzv-endpoint", "b:7", "--rdzv-id", "x"] and "is_host=0" in ranks[16]


@pytest.mark.parametrize("name", ["SLURM_NODEID", "JOB_COMPLETION_INDEX"])
def test_the_nodes_rank_comes_from_slurm_or_kubernetes(name):
    _, (_, ranks) = dry_run(NNODES="2", GPUS_PER_NODE="8", MASTER_ADDR="a", **{name: "1"})
    assert "is_host=0" in ranks[-5]


def test_what_is_set_already_stays_and_the_dry_run_shows_all_that_is_exported():
    exported, _ = dry_run(NNODES="2", MASTER_ADDR="a", GPUS_PER_NODE="1", NCCL_DEBUG="INFO", SOCKET_IFNAME="eth0")
    assert exported["NCCL_DEBUG"] == "INFO"
    assert exported["NCCL_SOCKET_IFNAME"] == exported["GLOO_SOCKET_IFNAME"] == "eth0"
    text = (ROOT / "launch" / "env.sh").read_text()
    named = set(re.findall(r"\b([A-Z0-9_]+)=", "\n".join(re.findall(r"^ *export (.*)", text, re.MULTILINE))))
    assert len(named) >= 10 and set(exported) == named | {"OMP_NUM_THREADS", "PYTHONPATH"}


def test_ranks_share_the_cores():
    cores = len(os.sched_getaffinity(0))
    assert dry_run(GPUS_PER_NODE="1")[0]["OMP_NUM_THREADS"] == str(min(8, cores))
    assert dry_run(GPUS_PER_NODE="1000")[0]["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "nothing to run"),
        (["--dry-run"], {}, "nothing to run"),
        (["-m", "megatron_opdlm.train"], {}, "-m is no setting of torchrun.sh; the program and its settings follow --"),
        (["--nnodes"], {}, "--nnodes needs a value"),
        (PROGRAM, {"GPUS_PER_NODE": "all"}, "GPUS_PER_NODE (all) must be a whole number"),
        (PROGRAM, {"GPUS_PER_NODE": "0"}, "must be at least 1"),
        (PROGRAM, {"GPUS_PER_NODE": "1", "NNODES": "1:2"}, "NNODES (1:2) must be a whole number"),
        (PROGRAM, {"GPUS_PER_NODE": "1", "NNODES": "2"}, "MASTER_ADDR must be given on several nodes"),
        (
            PROGRAM,
            {"GPUS_PER_NODE": "1", "NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "2"},
            "NODE_RANK (2) must be below NNODES (2)",
        ),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(arguments, environment, message):
    done = launch(*arguments, **environment)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_torchrun_takes_the_place_of_the_script_so_that_signals_reach_it(tmp_path):
    interpreter = tmp_path / "python"
    interpreter.write_text(f'#!/bin/bash\necho "$$ $*" >> {tmp_path}/calls\n')
    interpreter.chmod(0o755)
    environment = os.environ | {"PYTHON": str(interpreter), "GPUS_PER_NODE": "2"}
    process = subprocess.Popen(["bash", "launch/torchrun.sh", "--", "a program.py"], cwd=ROOT, env=environment)
    assert process.wait(timeout=60) == 0
    report, ranks = (tmp_path / "calls").read_text().splitlines()
    assert report.endswith("-m megatron_opdlm.versions")
    assert ranks.startswith(f"{process.pid} -m torch.distributed.run ") and ranks.endswith(" a program.py")
