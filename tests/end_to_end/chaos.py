"""The quickstart's training, killed with SIGKILL at random instants and started again, until it is done.

    python tests/end_to_end/chaos.py --rounds 100 --seed 0        # {"rounds": 100, "runs": 12, "killed_in": {...}, ...}

Each round starts the two ranks, waits until they are in a phase drawn at random (rollout, training, or a checkpoint
being written), then a random moment more, and kills both. A run that gets to its end must have the same checkpoint as
the undisturbed one, bit for bit, optimizer and counters included, and its audit must have every prompt exactly once per
epoch; after it the next run begins, until the rounds are over. Prompts and steps are fewer than the quickstart's.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.ranks import FORKED

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
NUM_RANKS, NUM_STEPS, NUM_PROMPTS, PROMPTS_PER_STEP = 2, 10, 20, 6
"""An epoch ends within the fourth step, and again within the seventh."""
PHASES = ("rollout", "training", "saving")
TRAINING = ("teacher", "student", "optimizer")
"""Phases of `PhaseTimers` that are called training here."""
LONGEST_WAIT = 0.15
"""Seconds at most between the beginning of a phase and the kill: about as long as a phase takes."""
TIME_LIMIT = 240.0
"""Seconds in which ranks get where they are to be killed, or to the end."""


def flags(root: Path, run: str, max_steps: int = NUM_STEPS) -> list[str]:
    """Of a run `root / run`."""
    settings = {
        "--config": QUICKSTART / "recipe.yaml",
        "--student.hf": QUICKSTART / "teacher",
        "--teacher.hf": QUICKSTART / "teacher",
        "--data.train_files": root / "prompts.jsonl",
        "--rollout.max_new_tokens": 8,
        "--optimizer.lr_warmup_steps": 2,
        "--optimizer.lr_decay_steps": 3 * NUM_STEPS,
        "--training.max_steps": max_steps,
        "--training.num_prompts_per_step": PROMPTS_PER_STEP,
        "--training.global_batch_size": 2,
        "--training.micro_batch_size": 1,
        "--checkpoint.save_interval": 1,
        "--logging.directory": root / run,
        "--logging.tensorboard": "false",
        "--logging.progress_bar": "false",
    }
    return [str(part) for pair in settings.items() for part in pair]


def write_prompts(path: Path) -> None:
    """Different sums in the words of the quickstart's teacher."""
    questions = [f"Solve {i % 10} + {(3 * i + 1) % 10} - {i // 10} =" for i in range(NUM_PROMPTS)]
    path.write_text("".join(json.dumps({"question": text, "domain": "math"}) + "\n" for text in questions))


def run_rank(rank: int, rendezvous: Path, arguments: list[str], phase_file: Path) -> None:
    """Trains as one of the ranks; rank 0 leaves in `phase_file` which phase it is in."""
    import torch
    import torch.distributed as dist

    from megatron_opdlm.config.load import load_config
    from megatron_opdlm.observability.timers import PhaseTimers
    from megatron_opdlm.training import trainer

    torch.set_num_threads(1)
    trainer.write_report = lambda directory: None  # plots take longer than all of the training
    if rank == 0:
        PhaseTimers.phase = _noting_phase(PhaseTimers.phase, phase_file)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=NUM_RANKS)
    trainer.Trainer(load_config(arguments)).run()
    dist.destroy_process_group()


def _noting_phase(phase: Callable, path: Path) -> Callable:
    @contextlib.contextmanager
    def noted(timers: object, name: str) -> Iterator[None]:
        path.write_text(name)
        with phase(timers, name):
            yield

    return noted


class Ranks:
    """The processes of one life of a run. They come from a server that has imported what they need."""

    def __init__(self, root: Path, run: str) -> None:
        self.run = root / run
        self.phase_file = Path(tempfile.mkstemp(dir=root, prefix="phase")[1])
        rendezvous = Path(tempfile.mkdtemp(dir=root)) / "rendezvous"
        arguments = (rendezvous, flags(root, run), self.phase_file)
        self.processes: list[BaseProcess] = [
            FORKED.Process(target=run_rank, args=(rank, *arguments)) for rank in range(NUM_RANKS)
        ]
        for process in self.processes:
            process.start()

    def phase(self) -> str:
        """What is going on: one of `PHASES`, or something else."""
        if any((self.run / "checkpoints").glob("step_*[0-9].partial")):
            return "saving"
        name = self.phase_file.read_text()
        return "training" if name in TRAINING else name

    def finish(self) -> None:
        """Waits for the end, which must be a good one."""
        for process in self.processes:
            process.join(TIME_LIMIT)
            assert process.exitcode == 0, f"a rank of {self.run.name} ended with {process.exitcode}"

    def kill_in(self, phase: str, wait: float) -> str | None:
        """Kills the ranks `wait` seconds after they are in the phase; the phase met. None if the run ended before."""
        deadline = time.monotonic() + TIME_LIMIT
        while self.phase() != phase and all(process.is_alive() for process in self.processes):
            assert time.monotonic() < deadline, f"{self.run.name} never gets to {phase}"
            time.sleep(0.002)
        time.sleep(wait)
        met = self.phase()
        if not all(process.is_alive() for process in self.processes):
            self.finish()
            return None
        for process in self.processes:
            process.kill()
            process.join()
        return met


def checkpoint_hashes(run: Path) -> dict[str, str]:
    """The SHA-256 of the files that hold the state after the last step."""
    from megatron_opdlm.checkpointing.folders import newest_checkpoint

    newest = newest_checkpoint(run / "checkpoints", "hashes")
    assert newest is not None and newest.name == f"step_{NUM_STEPS:08d}", f"{run.name} ended with {newest}"
    hashes = json.loads((newest / "manifest.json").read_text())["sha256"]
    return {name: digest for name, digest in hashes.items() if name.endswith((".distcp", "common.pt"))}


def check_run(run: Path, reference: Path) -> None:
    """AssertionError or ValueError unless the run has the same end as the undisturbed one, and a clean audit."""
    from megatron_opdlm.observability.audit import epochs, read_audit

    assert checkpoint_hashes(run) == checkpoint_hashes(reference), f"{run.name} has another state than {reference.name}"
    steps = read_audit(run / "audit.jsonl")
    assert steps == read_audit(reference / "audit.jsonl"), f"{run.name} learned from other prompts"
    for prompts in epochs(steps, NUM_PROMPTS)[:-1]:
        assert sorted(prompts) == list(range(NUM_PROMPTS)), f"{run.name}: {prompts} is not each prompt once"


def chaos(root: Path, rounds: int, seed: int) -> dict:
    """The rounds, in runs below `root`. Raises what `check_run` raises; returns what was met."""
    generator = random.Random(seed)
    root.mkdir(parents=True, exist_ok=True)
    write_prompts(root / "prompts.jsonl")
    Ranks(root, "undisturbed").finish()
    killed_in: collections.Counter = collections.Counter()
    runs = []
    for number in range(rounds):
        if not runs or is_finished(runs[-1]):
            runs.append(root / f"run_{number}")
        phase = PHASES[number % len(PHASES)]
        wait = generator.uniform(0, LONGEST_WAIT) if number >= len(PHASES) else 0.0  # each phase is met once at least
        met = Ranks(root, runs[-1].name).kill_in(phase, wait)
        killed_in[met or "the end"] += 1
    Ranks(root, runs[-1].name).finish()
    for run in runs:
        check_run(run, root / "undisturbed")
    starts = sum("resumed_at" in line for run in runs for line in (run / "audit.jsonl").read_text().splitlines())
    return {"rounds": rounds, "runs": len(runs), "starts": starts, "killed_in": dict(killed_in)}


def is_finished(run: Path) -> bool:
    """Whether the state after the last step is saved."""
    return (run / "checkpoints" / f"step_{NUM_STEPS:08d}").exists()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rounds",
        type=int,
        default=10,
        help="lives of runs; each is killed unless it ends first, which is counted as killed in the end",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--output", type=Path, help="folder for the runs, kept; default: a temporary one")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(chaos(arguments.output or Path(temporary), arguments.rounds, arguments.seed)))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"  # of the server and its ranks
    main()
