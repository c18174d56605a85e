"""launch/slurm.sbatch, with an srun, a scancel and a scontrol that only note what they were asked for."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROGRAM = ["--", "-m", "megatron_opdlm.train", "--config", "my recipe.yaml"]
PER_NODE = ["srun", "--ntasks-per-node=1", "--cpu-bind=none", "--kill-on-bad-exit=1"]
SCONTROL = """#!/bin/bash
printf '%q ' scontrol "$@" >> "$CALLS"; echo >> "$CALLS"
if [[ "$1 $2 $3" == "show hostnames nodes[7-8]" ]]; then printf 'node7\\nnode8\\n'; fi
"""
# Slurm's own answers TERM by killing its tasks: `_srun_signal_mgr` in src/srun of https://github.com/SchedMD/slurm.
SRUN = """#!/bin/bash
printf '%q ' srun "$@" >> "$CALLS"; echo >> "$CALLS"
while [[ "$1" == --* ]]; do shift; done
ranks() {
    trap 'echo told to stop >> "$CALLS"; kill $sleeper; exit "$WHEN_TOLD"' TERM
    sleep 60 > /dev/null 2>&1 & sleeper=$!
    echo $BASHPID > "$CALLS.pid"; mv "$CALLS.pid" "$CALLS.waiting"
    wait $sleeper
}
trap 'echo killed >> "$CALLS"; kill -KILL $step; exit 137' TERM
case "$SRUN" in
    waits) ranks & step=$!; wait $step ;;
    runs) for node in 0 1; do SLURM_NODEID=$node "$@" || exit; done ;;
    *) exit "$SRUN" ;;
esac
"""
SCANCEL = """#!/bin/bash
printf '%q ' scancel "$@" >> "$CALLS"; echo >> "$CALLS"
[[ "$1" != --signal=TERM ]] || kill -TERM "$(<"$CALLS.waiting")"
"""
PYTHON = """#!/bin/bash
printf '%q ' python "$@" >> "$CALLS"; echo >> "$CALLS"
"""


class Job:
    """A job on nodes 7 and 8."""

    def __init__(self, folder: Path, srun: str, *arguments: str, **environment: str) -> None:
        for name, text in {"scontrol": SCONTROL, "srun": SRUN, "scancel": SCANCEL, "python": PYTHON}.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        self.calls_file = folder / "calls"
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMP", "PYTHON"))}
        slurm = {"SLURM_JOB_ID": "40017", "SLURM_JOB_NODELIST": "nodes[7-8]", "SLURM_GPUS_ON_NODE": "8"}
        fakes = {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(self.calls_file), "SRUN": srun}
        self.process = subprocess.Popen(
            ["bash", "launch/slurm.sbatch", *arguments],
            cwd=ROOT,
            env=clean | slurm | {"SLURM_SUBMIT_DIR": str(ROOT), "WHEN_TOLD": "1"} | fakes | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ends(self) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        stdout, stderr = self.process.communicate(timeout=60)
        return self.process.returncode, stdout, stderr

    def calls(self) -> list[list[str]]:
        """What srun, scancel, scontrol and python were asked for, as words."""
        return [shlex.split(line) for line in self.calls_file.read_text().splitlines()]

    def gets(self, *signals: signal.Signals) -> None:
        """Once its ranks run."""
        waiting = Path(f"{self.calls_file}.waiting")
        deadline = time.monotonic() + 60
        while not waiting.exists():
            assert time.monotonic() < deadline and self.process.poll() is None, self.ends()
            time.sleep(0.005)
        for number in signals:
            self.process.send_signal(number)


TOLD = [["scancel", "--signal=TERM", "40017"], ["told", "to", "stop"]]
"""The ranks, by Slurm, so that srun does not kill them."""


def words(text: str) -> list[list[str]]:
    return [shlex.split(line) for line in text.splitlines() if not line.startswith(("#", "export"))]


def test_one_task_on_each_node_starts_the_ranks_which_meet_at_the_first(tmp_path):
    job = Job(tmp_path, "runs", *PROGRAM)
    assert job.ends()[0] == 0
    _, step, *on_nodes = job.calls()
    assert step == [*PER_NODE, "bash", f"{ROOT}/launch/torchrun.sh", *PROGRAM]
    ranks = [call for call in on_nodes if "torch.distributed.run" in call]
    assert [call[call.index("--rdzv-conf") + 1].split(",")[0] for call in ranks] == ["is_host=1", "is_host=0"]
    for call in ranks:
        assert call[3:7] == ["--nnodes", "2", "--nproc-per-node", "8"]
        assert call[9:15] == ["--rdzv-backend", "c10d", "--rdzv-endpoint", "node7:24017", "--rdzv-id", "40017.0"]
        assert call[-4:] == PROGRAM[1:]


def test_the_dry_run_prints_every_command_and_starts_nothing(tmp_path):
    job = Job(
        tmp_path, "runs", "--dry-run", *PROGRAM, STAGE="/shared/a /shared/b", STAGE_TO="/local", SOCKET_IFNAME="ib0"
    )
    code, stdout, stderr = job.ends()
    assert code == 0, stderr
    assert job.calls() == [["scontrol", "show", "hostnames", "nodes[7-8]"]]
    staging, step, versions, ranks, told, requeue = words(stdout)
    assert staging == [*PER_NODE, "bash", f"{ROOT}/launch/stage_data.sh", "--to", "/local", "/shared/a", "/shared/b"]
    assert step == [*PER_NODE, "bash", f"{ROOT}/launch/torchrun.sh", *PROGRAM]
    assert versions[1:] == ["-m", "megatron_opdlm.versions"] and ranks[2] == "torch.distributed.run"
    assert told == TOLD[0] and requeue == ["scontrol", "requeue", "40017"]
    assert "export GLOO_SOCKET_IFNAME=ib0" in stdout and "PYTHONNOUSERSITE" not in stdout


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_the_ranks_run_in_the_container_and_staging_outside_of_it(tmp_path, runtime):
    container = {"CONTAINER": "opdlm.img", "CONTAINER_RUNTIME": runtime, "CONTAINER_MOUNTS": "/data:/d"}
    job = Job(tmp_path, "0", "--dry-run", *PROGRAM, STAGE="/a", STAGE_TO="/local", OPDLM_ROOT=str(ROOT), **container)
    stdout = job.ends()[1]
    staging, step, *_ = words(stdout)
    assert staging == [*PER_NODE, "bash", f"{ROOT}/launch/stage_data.sh", "--to", "/local", "/a"]
    mounts = f"{ROOT}:{ROOT},/local:/local,/data:/d"
    inside = {
        "pyxis": ["--container-image=opdlm.img", f"--container-mounts={mounts}", f"--container-workdir={ROOT}"],
        "apptainer": ["apptainer", "exec", "--nv", "--bind", mounts, "--pwd", str(ROOT), "opdlm.img"],
    }
    assert step == [*PER_NODE, *inside[runtime], "bash", f"{ROOT}/launch/torchrun.sh", *PROGRAM]
    assert "export PYTHONNOUSERSITE=1" in stdout, "so that packages of the user do not hide those of the image"


def test_out_of_time_the_ranks_are_told_and_the_job_goes_back_to_the_queue(tmp_path):
    job = Job(tmp_path, "waits", *PROGRAM)
    job.gets(signal.SIGUSR1)
    code, _, stderr = job.ends()
    assert code == 1 and "job 40017 goes back to the queue" in stderr
    assert job.calls()[2:] == [*TOLD, ["scontrol", "requeue", "40017"]]


def test_a_signal_that_slurm_does_not_take_any_more_changes_nothing(tmp_path):
    job = Job(tmp_path, "waits", *PROGRAM)
    (tmp_path / "scancel").write_text("#!/bin/bash\necho 'scancel: error: Job 40017 is completing' >&2\nexit 1\n")
    job.gets(signal.SIGTERM)
    time.sleep(0.1)
    assert job.process.poll() is None
    os.kill(int(Path(f"{job.calls_file}.waiting").read_text()), signal.SIGTERM)
    assert job.ends()[0] == 1


def test_a_run_that_ends_well_after_the_signal_is_done(tmp_path):
    job = Job(tmp_path, "waits", *PROGRAM, WHEN_TOLD="0")
    job.gets(signal.SIGUSR1)
    assert job.ends()[0] == 0 and job.calls()[2:] == TOLD


def test_a_job_that_is_told_to_end_saves_and_does_not_come_back(tmp_path):
    job = Job(tmp_path, "waits", *PROGRAM, WHEN_TOLD="3")
    job.gets(signal.SIGTERM)
    assert job.ends()[0] == 3 and job.calls()[2:] == TOLD


def test_a_run_that_fails_does_not_come_back_either(tmp_path):
    job = Job(tmp_path, "5", *PROGRAM)
    assert job.ends()[0] == 5 and len(job.calls()) == 2


def test_a_job_that_never_gets_through_comes_back_so_often_and_no_more(tmp_path):
    job = Job(tmp_path, "waits", *PROGRAM, SLURM_RESTART_COUNT="3", MAX_REQUEUES="3")
    job.gets(signal.SIGUSR1)
    code, _, stderr = job.ends()
    assert code == 2 and "MAX_REQUEUES (3) are used up" in stderr
    assert job.calls()[2:] == TOLD


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "the program and its settings follow --"),
        (PROGRAM[1:], {}, "the program and its settings follow --"),
        (PROGRAM, {"SLURM_JOB_ID": ""}, "there is no Slurm job"),
        (PROGRAM, {"OPDLM_ROOT": "/nowhere"}, "OPDLM_ROOT (/nowhere) must be the repository"),
        (PROGRAM, {"CONTAINER": "x", "CONTAINER_RUNTIME": "docker"}, "(docker) must be pyxis or apptainer"),
        (PROGRAM, {"STAGE": "/a"}, "STAGE (/a) needs STAGE_TO"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(tmp_path, arguments, environment, message):
    code, stdout, stderr = Job(tmp_path, "0", *arguments, **environment).ends()
    assert code == 2 and stdout == "" and stderr.startswith("error: ") and message in stderr
    assert stderr.count("\n") == 1


def test_slurm_leaves_time_to_save_and_signals_the_script_alone():
    text = (ROOT / "launch" / "slurm.sbatch").read_text()
    settings = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert {"--signal=B:USR1@300", "--requeue", "--ntasks-per-node=1", "--open-mode=append"} <= set(settings)
    # Slurm reads them up to the first line that is neither blank nor a comment
    assert text.rindex("#SBATCH") < text.index("\nset -euo pipefail")
