"""A run that was stopped goes on as if it had not been: the same numbers and the same weights, bit for bit.

Four steps at once are the reference. Against them: two steps, then a fresh process for the other two; a checkpoint that
was damaged in between; tensor parallelism; and another layout after the stop, which agrees to rounding. Last, a run on
two ranks that is killed again and again while it saves.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.ranks import FORKED, run_on_ranks
from tests.tiny_qwen3 import make_tiny_qwen3, write_prompts
from tests.worlds import layout

ROOT = Path(__file__).parents[2]
NUM_STEPS, STOPPED_AFTER = 4, 2
KILLED_AFTER = (0.0, 0.01, 0.03, 0.07, 0.15)
"""Seconds from the beginning of a save to the end of the run."""
TENSOR_PARALLEL = {"--parallel.tensor_model_parallel_size": "2", "--parallel.sequence_parallel": "true"}


def flags(root: Path, run: str, max_steps: int, **more: str) -> list[str]:
    """Of a run that draws 6 of 14 prompts a step, so that its third step crosses the end of an epoch."""
    settings = {
        "--student.hf": root / "student",
        "--teacher.hf": root / "teacher",
        "--data.train_files": root / "prompts.jsonl",
        "--precision.dtype": "float32",
        "--rollout.max_new_tokens": 8,
        "--rollout.dynamic_threshold": 0.12,
        "--curricula.length_start": 4,
        "--curricula.length_ramp_steps": 3,
        "--curricula.threshold_start": 0.5,
        "--curricula.threshold_hold_steps": 1,
        "--curricula.threshold_ramp_steps": 2,
        "--optimizer.lr": 0.001,
        "--optimizer.lr_warmup_steps": 3,
        # the schedule's length must not follow `training.max_steps`, which differs between the runs
        "--optimizer.lr_decay_steps": 3 * NUM_STEPS,
        "--training.max_steps": max_steps,
        "--training.num_prompts_per_step": 6,
        "--training.global_batch_size": 2,
        "--training.pad_to_multiple": 8,
        "--checkpoint.save_interval": STOPPED_AFTER,
        "--checkpoint.keep": 0,
        "--logging.directory": root / run,
        "--logging.tensorboard": "false",
        "--logging.progress_bar": "false",
    }
    return [str(part) for pair in (settings | more).items() for part in pair]


def train_by_command(root: Path, run: str, max_steps: int) -> str:
    """In a fresh process; what it wrote to the terminal."""
    command = [sys.executable, "-m", "megatron_opdlm.train", *flags(root, run, max_steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stderr


def train_here(root: Path, run: str, max_steps: int, **more: str) -> None:
    from megatron_opdlm.config.load import load_config
    from megatron_opdlm.training.trainer import Trainer

    config = load_config(flags(root, run, max_steps, **more))
    with layout(config.parallel):
        Trainer(config).run()


def train_on_rank(rank: int, root: Path, runs: list[tuple[str, int, dict[str, str]]]) -> None:
    for run, max_steps, more in runs:
        train_here(root, run, max_steps, **more)


def metrics(root: Path, run: str) -> list[dict[str, float]]:
    """The records of a run without what depends on the clock."""
    records = [json.loads(line) for line in (root / run / "metrics.jsonl").read_text().splitlines()]
    timed = ("perf/seconds", "perf/tokens_per_second", "rollout/tokens_per_second_per_rank", "rollout/idle_share")
    return [{name: value for name, value in record.items() if not name.startswith(timed)} for record in records]


def weights(root: Path, run: str) -> dict[str, torch.Tensor]:
    from megatron_opdlm.checkpointing.conversion import megatron_to_hf

    output = root / f"{run} exported"
    if not output.exists():
        megatron_to_hf(root / run / "checkpoints", output, dtype=None)
    return load_file(output / "model.safetensors")


def assert_identical(root: Path, run: str, reference: str) -> None:
    assert metrics(root, run) == metrics(root, reference)
    expected, actual = weights(root, reference), weights(root, run)
    assert all(torch.equal(actual[name], weight) for name, weight in expected.items())


def checkpoint(root: Path, run: str, step: int) -> Path:
    return root / run / "checkpoints" / f"step_{step:08d}"


def damage(folder: Path) -> None:
    """Cuts the end off one of the files that hold weights."""
    shard = next(folder.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])


@pytest.fixture(scope="module")
def root(tmp_path_factory, world_of_one) -> Path:
    """With the reference run `whole`."""
    root = tmp_path_factory.mktemp("resume")
    make_tiny_qwen3(root / "student", seed=1)
    make_tiny_qwen3(root / "teacher", seed=3)
    write_prompts(root / "prompts.jsonl", 14)
    train_here(root, "whole", NUM_STEPS)
    return root


def test_the_reference_trains(root):
    records = metrics(root, "whole")
    assert [record["step"] for record in records] == list(range(NUM_STEPS))
    assert len({record["train/loss"] for record in records}) == NUM_STEPS
    assert [record["rollout/length_limit"] for record in records] == [4, 8, 8, 8]
    assert [record["rollout/dynamic_threshold"] for record in records] == pytest.approx([0.5, 0.5, 0.31, 0.12])
    total = sum(record["rollout/tokens"] for record in records)
    assert records[-1]["rollout/total_tokens"] == total


def test_defect_8_two_steps_and_a_fresh_process_for_two_more_equal_four_steps(root):
    train_here(root, "stopped", STOPPED_AFTER)
    assert len(metrics(root, "stopped")) == STOPPED_AFTER
    assert not torch.equal(*(weights(root, run)["model.norm.weight"] for run in ("whole", "stopped")))
    shutil.rmtree(root / "stopped exported")
    log = train_by_command(root, "stopped", NUM_STEPS)
    assert f"resumed from {checkpoint(root, 'stopped', STOPPED_AFTER)} at step {STOPPED_AFTER}" in log
    assert_identical(root, "stopped", "whole")


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(root, caplog):
    shutil.copytree(root / "whole", root / "damaged")
    damage(checkpoint(root, "damaged", NUM_STEPS))
    train_here(root, "damaged", NUM_STEPS)
    assert "falling back to the checkpoint before it" in caplog.text
    assert "__0_" in caplog.text and "bytes instead of" in caplog.text
    assert_identical(root, "damaged", "whole")


def test_a_checkpoint_that_an_interrupted_save_left_is_no_checkpoint(root):
    shutil.copytree(root / "whole", root / "interrupted")
    last = checkpoint(root, "interrupted", NUM_STEPS)
    (last / "manifest.json").unlink()
    last.rename(last.with_name(last.name + ".partial"))
    train_here(root, "interrupted", NUM_STEPS)
    assert_identical(root, "interrupted", "whole")
    assert sorted(path.name for path in last.parent.iterdir()) == ["step_00000002", "step_00000004"]


def test_with_no_whole_checkpoint_left_a_run_starts_anew_and_says_so(root, caplog):
    shutil.copytree(root / "whole", root / "lost")
    for step in (STOPPED_AFTER, NUM_STEPS):
        damage(checkpoint(root, "lost", step))
    train_here(root, "lost", NUM_STEPS)
    assert all(f"step_0000000{step} is damaged" in caplog.text for step in (STOPPED_AFTER, NUM_STEPS))
    assert_identical(root, "lost", "whole")


def test_a_finished_run_that_is_started_again_changes_nothing(root):
    shutil.copytree(root / "whole", root / "finished")
    train_here(root, "finished", NUM_STEPS)
    assert_identical(root, "finished", "whole")


def test_a_resumed_run_takes_its_learning_rates_from_its_own_recipe(root):
    """Only the place in the schedule is the checkpoint's: a longer run must not stay at the end of a shorter one."""
    shutil.copytree(root / "whole", root / "other rates")
    shutil.rmtree(checkpoint(root, "other rates", NUM_STEPS))
    changed = {"--optimizer.lr": "0.004", "--optimizer.min_lr": "0.0005", "--optimizer.lr_decay_steps": "24"}
    train_here(root, "other rates", NUM_STEPS, **changed)
    optimizer_steps = [3 * step for step in (3, 4)]  # three global batches in each of the steps after the stop
    cosine = [0.5 + 0.5 * math.cos(math.pi * (step - 3) / (24 - 3)) for step in optimizer_steps]
    rates = [record["train/lr"] for record in metrics(root, "other rates")]
    assert rates[STOPPED_AFTER:] == pytest.approx([0.0005 + 0.0035 * share for share in cosine])
    assert rates[:STOPPED_AFTER] == [record["train/lr"] for record in metrics(root, "whole")][:STOPPED_AFTER]


OF_THE_LAYOUT = ("train/token_imbalance", "rollout/forwards_per_token", "rollout/cache_use", "rollout/padding_share")
"""Metrics of how rows are spread and sequences batched."""


def test_defect_8_resuming_is_exact_under_tensor_and_sequence_parallelism_too_and_in_another_layout_to_rounding(root):
    whole, stopped = ("parallel", NUM_STEPS, TENSOR_PARALLEL), ("parallel stopped", STOPPED_AFTER, TENSOR_PARALLEL)
    run_on_ranks(train_on_rank, 2, root, [whole, stopped])
    shutil.copytree(root / "parallel stopped", root / "relaid")
    runs = [("parallel stopped", NUM_STEPS, TENSOR_PARALLEL), ("relaid", NUM_STEPS, {})]
    run_on_ranks(train_on_rank, 2, root, runs)
    assert_identical(root, "parallel stopped", "parallel")
    for run in ("parallel", "relaid"):
        for expected, actual in zip(metrics(root, "whole"), metrics(root, run), strict=True):
            of_the_layout = {name: actual[name] for name in actual if name.startswith(OF_THE_LAYOUT)}
            assert actual == pytest.approx(expected | of_the_layout, rel=1e-4, abs=1e-5)
        expected, actual = weights(root, "whole"), weights(root, run)
        start = load_file(root / "student" / "model.safetensors")
        for name, weight in expected.items():
            assert (actual[name] - weight).norm() <= 0.01 * (weight - start[name]).norm(), name


def train_as_rank(rank: int, rendezvous: Path, root: Path, run: str, max_steps: int, more: dict[str, str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    train_here(root, run, max_steps, **more)
    dist.destroy_process_group()


def train_until_a_rank_fails(rank: int, rendezvous: Path, root: Path, run: str) -> None:
    """Rank 1 fails in the step after a save."""
    from megatron_opdlm.training.trainer import Trainer

    one_step = Trainer._one_step

    def fail_after_the_save(trainer: Trainer) -> dict[str, float]:
        assert rank == 0 or trainer.step < STOPPED_AFTER, "a failure"
        return one_step(trainer)

    Trainer._one_step = fail_after_the_save
    train_as_rank(rank, rendezvous, root, run, NUM_STEPS, {})


def start_on_two_ranks(function, rendezvous: Path, *arguments) -> list[BaseProcess]:
    """Processes that are there at once: they come from a server which has imported what they need."""
    ranks = [FORKED.Process(target=function, args=(rank, rendezvous, *arguments)) for rank in range(2)]
    for process in ranks:
        process.start()
    return ranks


def wait_for_the_save(folder: Path, ranks: list[BaseProcess]) -> None:
    deadline = time.monotonic() + 60
    while not (folder.exists() or folder.with_name(folder.name + ".partial").exists()):
        assert time.monotonic() < deadline and all(process.is_alive() for process in ranks), f"no {folder.name}"
        time.sleep(0.001)


def test_a_run_that_is_killed_while_it_saves_goes_on_to_the_same_weights(root, tmp_path):
    from megatron_opdlm.checkpointing.folders import newest_checkpoint

    num_steps, more = 2 * len(KILLED_AFTER) + 1, {"--checkpoint.save_interval": "1", "--checkpoint.keep": "2"}
    undisturbed = start_on_two_ranks(train_as_rank, tmp_path / "0", root, "undisturbed", num_steps, more)
    for process in undisturbed:
        process.join()
    directory, found, interrupted = root / "killed" / "checkpoints", [], 0
    for seconds in KILLED_AFTER:
        newest = newest_checkpoint(directory)
        step = int(newest.name.removeprefix("step_")) if newest else 0
        ranks = start_on_two_ranks(train_as_rank, tmp_path / f"after {seconds}", root, "killed", num_steps, more)
        wait_for_the_save(checkpoint(root, "killed", step + 2), ranks)
        time.sleep(seconds)
        for process in ranks:
            process.kill()
            process.join()
        interrupted += any(directory.glob("*.partial"))
        found.append(newest_checkpoint(directory))
    assert interrupted, "no kill met a save"
    assert len(set(found)) == len(KILLED_AFTER), "each round saves one step at least"
    last = start_on_two_ranks(train_as_rank, tmp_path / "last", root, "killed", num_steps, more)
    for process in last:
        process.join()
        assert process.exitcode == 0
    assert_identical(root, "killed", "undisturbed")
    kept = [checkpoint(root, "killed", step).name for step in (num_steps - 1, num_steps)]
    assert sorted(path.name for path in directory.iterdir()) == kept


def test_a_save_that_was_begun_ends_well_although_the_training_of_a_rank_fails(root, tmp_path):
    from megatron_opdlm.checkpointing.folders import newest_checkpoint

    ranks = start_on_two_ranks(train_until_a_rank_fails, tmp_path / "0", root, "failed")
    for process in ranks:
        process.join()
        assert process.exitcode == 1
    assert newest_checkpoint(root / "failed" / "checkpoints") == checkpoint(root, "failed", STOPPED_AFTER)
