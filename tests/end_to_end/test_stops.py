"""A run that has to stop: SIGTERM, a disk that is full, shards that cannot be read, and one rank of four that dies.

Each time the same command goes on, and the end is that of the run that was left alone.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest

from megatron_opdlm.train import main as train
from tests.ranks import run_on_ranks
from tests.tiny_qwen3 import make_tiny_qwen3, write_prompts
from tests.worlds import layout, no_report, remove_parallel_groups

ROOT = Path(__file__).parents[2]
NUM_STEPS = 4


def flags(root: Path, run: str, **more: object) -> list[str]:
    """Of a run that saves each step and draws 4 of 12 prompts in one."""
    settings = {
        "--student.hf": root / "student",
        "--teacher.hf": root / "teacher",
        "--data.train_files": root / "prompts.jsonl",
        "--precision.dtype": "float32",
        "--rollout.max_new_tokens": 8,
        "--optimizer.lr": 0.001,
        "--training.max_steps": NUM_STEPS,
        "--training.num_prompts_per_step": 4,
        "--training.global_batch_size": 4,
        "--training.pad_to_multiple": 8,
        "--checkpoint.save_interval": 1,
        "--checkpoint.keep": 0,
        "--logging.directory": root / run,
        "--logging.tensorboard": "false",
        "--logging.progress_bar": "false",
    }
    return [str(part) for pair in (settings | more).items() for part in pair]


def train_here(root: Path, run: str, **more: object) -> bool:
    from megatron_opdlm.config.load import load_config
    from megatron_opdlm.training.trainer import Trainer

    config = load_config(flags(root, run, **more))
    with layout(config.parallel), no_report():
        return Trainer(config).run()


def state(root: Path, run: str, step: int = NUM_STEPS) -> dict[str, str]:
    """SHA-256 of the files with weights, optimizer and counters after a step."""
    from megatron_opdlm.checkpointing.manifest import check_complete

    folder = root / run / "checkpoints" / f"step_{step:08d}"
    check_complete(folder, "hashes")
    hashes = json.loads((folder / "manifest.json").read_text())["sha256"]
    return {name: digest for name, digest in hashes.items() if name.endswith((".distcp", "common.pt"))}


def audit(root: Path, run: str) -> dict[int, list[int]]:
    from megatron_opdlm.observability.audit import epochs, read_audit

    steps = read_audit(root / run / "audit.jsonl")
    assert [sorted(prompts) for prompts in epochs(steps, 12)[:1]] == [list(range(12))]
    return steps


def assert_ends_like(root: Path, run: str, reference: str) -> None:
    assert state(root, run) == state(root, reference)
    assert audit(root, run) == audit(root, reference)


@pytest.fixture(scope="module")
def root(tmp_path_factory, world_of_one) -> Path:
    """With the run `whole`, which was left alone."""
    root = tmp_path_factory.mktemp("stops")
    make_tiny_qwen3(root / "student", seed=1)
    make_tiny_qwen3(root / "teacher", seed=3)
    write_prompts(root / "prompts.jsonl", 12)
    assert train_here(root, "whole")
    return root


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO)
    return caplog


def sigterm_in(monkeypatch, step: int, during: str) -> None:
    """The process gets the signal in this training step, before its rollout or before its first optimizer step."""
    from megatron_opdlm.objectives.on_policy_distillation import OnPolicyDistillation
    from megatron_opdlm.training.train_step import TrainStep

    owner, name = {"rollout": (OnPolicyDistillation, "terminal_sequences"), "training": (TrainStep, "__call__")}[during]
    original, calls = getattr(owner, name), []

    def call(self, *arguments):
        calls.append(name)
        if len(calls) == step + 1:  # one optimizer step in each training step
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        return original(self, *arguments)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize(("during", "steps_saved"), [("rollout", 2), ("training", 3)])
def test_sigterm_saves_what_the_student_has_learned_and_a_step_in_its_rollout_is_begun_anew(
    root, log, monkeypatch, during, steps_saved
):
    with monkeypatch.context() as patch:
        sigterm_in(patch, step=2, during=during)
        assert not train_here(root, during, **{"--checkpoint.save_interval": 0})
    assert f"stopped after {steps_saved} training steps" in log.text
    assert [path.name for path in (root / during / "checkpoints").iterdir()] == [f"step_0000000{steps_saved}"]
    assert state(root, during, steps_saved) == state(root, "whole", steps_saved)
    assert train_here(root, during)
    assert_ends_like(root, during, "whole")
    shutil.rmtree(root / during)


def test_a_signal_before_there_is_anything_to_save_saves_nothing(root, monkeypatch):
    with monkeypatch.context() as patch:
        sigterm_in(patch, step=0, during="rollout")
        assert not train_here(root, "early")
    assert not (root / "early" / "checkpoints").exists()


def test_after_a_run_a_signal_does_again_what_it_did_before(root):
    before = signal.getsignal(signal.SIGTERM)
    assert train_here(root, "whole")
    assert signal.getsignal(signal.SIGTERM) == before and signal.set_wakeup_fd(-1) == -1
    assert not [thread.name for thread in threading.enumerate() if thread.name in ("SIGTERM", "grace")]


WAITING = """
import os, signal, sys, threading, time
import torch.distributed as dist
from megatron_opdlm.training.interruption import Interruption
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
with Interruption(grace_seconds=0.3) as interruption:
    os.kill(os.getpid(), signal.SIGTERM)
    lock = threading.Lock()
    lock.acquire()
    while interruption.is_requested() or True:
        lock.acquire()                     # deep in something that never comes back
"""


def test_a_process_that_cannot_save_in_time_exits_all_the_same(tmp_path):
    command = [sys.executable, "-c", WAITING, str(tmp_path / "rendezvous")]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 143 and "training.grace_seconds (0.3) are over" in done.stderr, done.stderr


def run_main(root: Path, run: str, capsys, **more: object) -> str:
    """What the entry point says when it refuses to go on."""
    try:
        with pytest.raises(SystemExit) as stop:
            train(flags(root, run, **more))
    finally:
        remove_parallel_groups()
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("in_background", ["true", "false"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_takes_no_more_ends_the_run_in_one_line_and_leaves_the_checkpoint_before_as_it_was(
    root, capsys, monkeypatch, in_background
):
    """The kernel refuses files over a size, as it refuses those for which there is no space, in C++ as in Python."""
    from megatron_opdlm.training.trainer import Trainer

    run, limits, one_step = f"full {in_background}", resource.getrlimit(resource.RLIMIT_FSIZE), Trainer._one_step
    more = {"--checkpoint.async_save": in_background}

    def limited(trainer):
        if trainer.step == 2:
            while not (root / run / "checkpoints" / "step_00000002").exists():
                time.sleep(0.001)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        return one_step(trainer)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_one_step", limited)
            said = run_main(root, run, capsys, **more)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in said, said
    assert f"{root / run}/checkpoints/step_00000003 could not be written" in errors[0] and "File too large" in errors[0]
    assert sorted(path.name for path in (root / run / "checkpoints").iterdir()) == ["step_00000001", "step_00000002"]
    assert train_here(root, run, **more)
    assert_ends_like(root, run, "whole")


def spoil(shard: Path) -> None:
    """The same size, another content."""
    shard.write_bytes(bytes(shard.stat().st_size))


@pytest.mark.parametrize("verify", ["hashes", "sizes"])
def test_shards_that_are_not_what_was_written_are_passed_over_under_either_way_of_verification(root, log, verify):
    run = f"spoilt {verify}"
    shutil.copytree(root / "whole", root / run)
    for shard in (root / run / "checkpoints" / f"step_0000000{NUM_STEPS}").glob("*.distcp"):
        spoil(shard)
    assert train_here(root, run, **{"--checkpoint.verify": verify})
    assert "step_00000004 is damaged" in log.text and "is not what was written" in log.text
    assert "resumed from" in log.text and "step_00000003 at step 3" in log.text
    assert_ends_like(root, run, "whole")


def train_on_rank(rank: int, root: Path, run: str) -> None:
    train_here(root, run)


def worker(launcher: subprocess.Popen, rank: int) -> int | None:
    """Process id of this rank of a torchrun."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (folder / "environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if parent == launcher.pid and f"RANK={rank}".encode() in environment:
            return int(folder.name)
    return None


def test_when_one_rank_of_four_is_killed_torchrun_starts_all_again_and_the_run_ends_as_the_undisturbed_one(root):
    run_on_ranks(train_on_rank, 4, root, "four", time_limit=300)
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "4", "--max-restarts", "2"]
    command = [sys.executable, "-m", *launch, "-m", "megatron_opdlm.train", *flags(root, "killed")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (root / "killed.log").open("w") as log:
        launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            second = root / "killed" / "checkpoints" / "step_00000002"
            while not second.exists():
                assert launcher.poll() is None, (root / "killed.log").read_text()
                time.sleep(0.002)
            os.kill(worker(launcher, rank=2), signal.SIGKILL)
            assert launcher.wait(timeout=400) == 0, (root / "killed.log").read_text()
        finally:
            launcher.terminate()
            launcher.wait()
    assert_ends_like(root, "killed", "four")
    starts = [line for line in (root / "killed" / "audit.jsonl").read_text().splitlines() if "resumed_at" in line]
    assert len(starts) == 2 and json.loads(starts[1])["resumed_at"] >= 2


LONG = {"--rollout.max_new_tokens": 48, "--rollout.batch_size": 1, "--training.grace_seconds": 40}
"""A step's rollout of two sequences for each of two data-parallel ranks, in 96 forwards."""


def train_with_sigterm_in_a_slow_rollout(rank: int, root: Path, run: str, settings: dict) -> None:
    """The last rank gets the signal in its third rollout, of which every forward takes a second from then on."""
    from megatron_opdlm.rollout import generation
    from megatron_opdlm.rollout.block_decoder import BlockDecoder
    from megatron_opdlm.rollout.engine import RolloutEngine

    generation.ROUNDS_BETWEEN_DEALS = generation.ROUNDS_BETWEEN_QUESTIONS = 4
    take_step, generate, rollouts = BlockDecoder._take_step, RolloutEngine.generate, []

    def counting(engine, *arguments):
        rollouts.append(engine)
        if len(rollouts) == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return generate(engine, *arguments)

    def slow(decoder, plan):
        time.sleep(1.0 if len(rollouts) == 3 else 0.0)
        return take_step(decoder, plan)

    BlockDecoder._take_step, RolloutEngine.generate = slow, counting
    assert not train_here(root, run, **settings)


@pytest.mark.parametrize("tensor_parallel", [1, 2], ids=["data parallel 2", "tensor parallel 2"])
def test_a_rollout_longer_than_the_grace_is_left_and_the_steps_before_it_are_saved(root, tensor_parallel):
    run, whole = f"long {tensor_parallel}", f"whole long {tensor_parallel}"
    settings = LONG | {"--checkpoint.save_interval": 0, "--parallel.tensor_model_parallel_size": tensor_parallel}
    run_on_ranks(train_with_sigterm_in_a_slow_rollout, 2, root, run, settings, time_limit=200)
    assert [path.name for path in (root / run / "checkpoints").iterdir()] == ["step_00000002"]
    run_on_ranks(train_on_rank_with, 2, root, run, settings, time_limit=200)
    run_on_ranks(train_on_rank_with, 2, root, whole, settings, time_limit=200)
    assert_ends_like(root, run, whole)


def train_on_rank_with(rank: int, root: Path, run: str, settings: dict) -> None:
    assert train_here(root, run, **settings)


def train_with_a_slow_disk(rank: int, root: Path, run: str, settings: dict) -> None:
    from megatron_opdlm.checkpointing.writer import PublishingWriter

    write_data = PublishingWriter.write_data

    def slow(writer, plan, planner):
        time.sleep(10 if writer.partial.name.startswith("step_00000001") else 0)
        return write_data(writer, plan, planner)

    PublishingWriter.write_data = slow
    assert train_here(root, run, **settings)


def test_a_checkpoint_that_takes_longer_than_the_limit_of_collectives_is_no_rank_that_hangs(root):
    settings = {"--parallel.distributed_timeout_minutes": 0.15, "--training.max_steps": 2}
    run_on_ranks(train_with_a_slow_disk, 1, root, "slow disk", settings)
    assert (root / "slow disk" / "checkpoints" / "step_00000002").is_dir()


def reason_of_refusal(rank: int, root: Path, run: str) -> str:
    with pytest.raises(ValueError) as stop:
        train_here(root, run)
    return str(stop.value)


def test_a_run_directory_that_only_the_first_rank_cannot_write_ends_all_ranks_with_its_reason(root):
    (root / "barred" / "audit.jsonl").mkdir(parents=True)
    first, second = run_on_ranks(reason_of_refusal, 2, root, "barred")
    assert first == second and "logging.directory" in first and "Is a directory" in first


def test_forwards_of_student_and_teacher_and_a_save_under_way_are_progress(root):
    from megatron_opdlm.config.load import load_config
    from megatron_opdlm.training.trainer import Trainer

    config, signs = load_config(flags(root, "progress", **{"--training.max_steps": 1})), iter([None, None, None, 1.5])
    with layout(config.parallel), no_report():
        trainer = Trainer(config)
        assert trainer.run()
        assert trainer.objective.teacher.num_forwards == 4 // config.training.micro_batch_size
        progress, seen = trainer._watchdog(mock.Mock(sign_of_life=lambda: next(signs)))._progress, []
        seen.append(progress())
        for model in (trainer.objective.teacher, trainer.student.model):
            model.num_forwards += 1
            seen.append(progress())
        seen.append(progress())  # with a save under way
    assert all(before != after for before, after in itertools.pairwise(seen))
