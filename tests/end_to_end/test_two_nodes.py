"""Two launchers with two ranks each, as on two nodes: the quickstart's training is that of four ranks on one node.

Then one launcher is killed together with its ranks, as when a node is lost, and started again, as Kubernetes does on
another node: the run goes on from the newest checkpoint and ends with the same weights, bit for bit.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.test_stops import state
from tests.ranks import run_on_ranks
from tests.worlds import layout, no_report

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
NUM_STEPS, LOST_AFTER = 4, 2
TIME_LIMIT = 500.0


def flags(root: Path, run: str) -> list[str]:
    """The quickstart's recipe with few prompts and steps, each of which is saved."""
    settings = {
        "--config": QUICKSTART / "recipe.yaml",
        "--student.hf": QUICKSTART / "teacher",
        "--teacher.hf": QUICKSTART / "teacher",
        "--data.train_files": root / "tasks" / "train.jsonl",
        "--training.max_steps": NUM_STEPS,
        "--training.num_prompts_per_step": 8,
        "--training.global_batch_size": 8,
        "--training.micro_batch_size": 2,
        "--checkpoint.save_interval": 1,
        "--checkpoint.keep": 0,
        "--logging.directory": root / run,
        "--logging.tensorboard": "false",
        "--logging.progress_bar": "false",
    }
    return [str(part) for pair in settings.items() for part in pair]


def train_on_rank(rank: int, root: Path, run: str) -> None:
    from megatron_opdlm.config.load import load_config
    from megatron_opdlm.training.trainer import Trainer

    config = load_config(flags(root, run))
    with layout(config.parallel), no_report():
        Trainer(config).run()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Node:
    """What runs on one of the two nodes."""

    def __init__(self, root: Path, rank: int, port: int) -> None:
        address = ["--master-addr", "127.0.0.1", "--master-port", str(port), "--local-addr", "127.0.0.1"]
        nodes = ["--nnodes", "2", "--node-rank", str(rank), "--gpus-per-node", "2", *address]
        program = ["-m", "megatron_opdlm.train", *flags(root, "two nodes")]
        self.log = root / f"node{rank}.log"
        with self.log.open("a") as log:
            self.launcher = subprocess.Popen(
                ["bash", "launch/torchrun.sh", *nodes, "--", *program],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable},
                stdout=log,
                stderr=log,
            )

    def ranks(self) -> list[int]:
        """Process ids."""
        children = Path(f"/proc/{self.launcher.pid}/task/{self.launcher.pid}/children")
        return [int(child) for child in children.read_text().split()]

    def is_lost(self) -> None:
        """All of it at once, without a chance to say so. What it held open is closed when this returns."""
        processes = [self.launcher.pid, *self.ranks()]
        assert len(processes) == 3, "a launcher and its two ranks"
        for process in processes:
            os.kill(process, signal.SIGKILL)
        self.launcher.wait()

    def ends_within(self, seconds: float) -> int:
        """Its exit code."""
        return self.launcher.wait(timeout=seconds)

    def remove(self) -> None:
        """Whatever is left of it."""
        if self.launcher.poll() is None:
            self.launcher.terminate()
            self.launcher.wait()


def wait_for(path: Path, nodes: list[Node]) -> None:
    deadline = time.monotonic() + TIME_LIMIT
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} was not written in time"
        for node in nodes:
            assert node.launcher.poll() is None, node.log.read_text()
        time.sleep(0.005)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Iterator[Path]:
    """With `one node`, left alone, and `two nodes`, of which the second was lost and came back."""
    root = tmp_path_factory.mktemp("nodes")
    tasks = ["--output", str(root / "tasks"), "--num-train", "32", "--num-heldout", "8", "--seed", "0"]
    subprocess.run([sys.executable, QUICKSTART / "tasks.py", *tasks], cwd=ROOT, check=True, timeout=120)
    run_on_ranks(train_on_rank, 4, root, "one node", time_limit=TIME_LIMIT)
    port = free_port()
    nodes = [Node(root, 0, port), Node(root, 1, port)]
    try:
        wait_for(root / "two nodes" / "checkpoints" / f"step_{LOST_AFTER:08d}", nodes)
        nodes[1].is_lost()
        nodes[1] = Node(root, 1, port)
        for node in nodes:
            assert node.ends_within(TIME_LIMIT) == 0, node.log.read_text()
        yield root
    finally:
        for node in nodes:
            node.remove()


def losses(root: Path, run: str) -> dict[int, float]:
    records = [json.loads(line) for line in (root / run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["train/loss"] for record in records}


@pytest.mark.timeout(1200)
def test_two_nodes_of_two_ranks_train_as_one_node_of_four(root):
    for step in range(1, LOST_AFTER + 1):
        assert state(root, "two nodes", step) == state(root, "one node", step)


@pytest.mark.timeout(1200)
def test_a_node_that_is_lost_and_replaced_leaves_the_losses_and_weights_of_the_undisturbed_run(root):
    assert state(root, "two nodes", NUM_STEPS) == state(root, "one node", NUM_STEPS)
    assert losses(root, "two nodes") == losses(root, "one node") and len(losses(root, "one node")) == NUM_STEPS
    audit = [json.loads(line) for line in (root / "two nodes" / "audit.jsonl").read_text().splitlines()]
    starts = [record["resumed_at"] for record in audit if "resumed_at" in record]
    assert len(starts) == 2 and starts[0] == 0 and starts[1] >= LOST_AFTER
