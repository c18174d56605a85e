"""Accuracy against trained tokens, for ways to turn the same teacher into a block-diffusion student.

    python examples/data_efficiency/study.py --output runs/data_efficiency

trains every method of `METHODS` from the quickstart's teacher with each seed, scores the checkpoints of every run on
the quickstart's held-out tasks (greedily, one token per step), and writes `scores.jsonl`, a line per checkpoint.
Started again it goes on where it stopped. `summarize.py` makes the table and the figure of it.

The methods share everything that is not theirs: first weights, prompts and their order, batches, optimizer, schedule.
Supervised ones learn the teacher's greedy responses to the same prompts, which are decoded once and not counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
METHODS: dict[str, list[str]] = {
    "on_policy_distillation": [],
    "random_mask_kl": ["--states.selection", "random_mask"],
    "sft_sdar": ["--objective.name", "sft", "--objective.preset", "sdar"],
    "lift": ["--objective.name", "lift"],
}
"""Method -> what it sets."""
MAX_STEPS = 210
SCORED_EVERY = 15
"""Training steps between the checkpoints that are scored."""
NUM_TRAIN, NUM_HELDOUT = 20_000, 256


@dataclass(frozen=True)
class Run:
    """One method with one seed."""

    method: str
    seed: int
    folder: Path

    def train(self, data: Path, max_steps: int) -> None:
        """To the end, from its newest checkpoint."""
        call(
            "-m",
            "megatron_opdlm.train",
            *("--config", str(QUICKSTART / "recipe.yaml")),
            *("--student.hf", str(QUICKSTART / "teacher"), "--teacher.hf", str(QUICKSTART / "teacher")),
            *("--data.train_files", str(data / "answered.jsonl"), "--logging.directory", str(self.folder)),
            *("--training.max_steps", str(max_steps), "--training.seed", str(self.seed)),
            *("--checkpoint.save_interval", str(SCORED_EVERY), "--checkpoint.keep", "0"),
            *("--logging.tensorboard", "false", "--logging.progress_bar", "false"),
            *METHODS[self.method],
        )

    def score(self, checkpoint: Path, data: Path) -> float:
        """Share of the held-out tasks that a checkpoint solves."""
        output = checkpoint.parent.parent / f"{checkpoint.name}.json"
        call(
            "-m",
            "megatron_opdlm.evaluate",
            *("--config", str(QUICKSTART / "recipe.yaml"), "--student.checkpoint", str(checkpoint)),
            *("--evaluation.files", str(data / "heldout.jsonl"), "--evaluation.output", str(output)),
            *("--rollout.temperature", "0", "--rollout.remasking_strategy", "low_confidence_static"),
            *("--logging.progress_bar", "false"),
        )
        (result,) = json.loads(output.read_text()).values()
        return result["scores"]["accuracy"]

    def tokens_by_step(self) -> dict[int, tuple[int, int]]:
        """Steps taken -> response tokens that training has read until then, and positions that it has trained."""
        totals, by_step = [0, 0], {}
        for line in (self.folder / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            totals[0] += int(record.get("rollout/tokens", 0) + record.get("data/response_tokens", 0))
            totals[1] += int(record["train/trained_tokens"])
            by_step[record["step"] + 1] = (totals[0], totals[1])
        return by_step


def call(*arguments: str) -> None:
    """Runs Python with these arguments from the repository's root; its output is shown if it fails."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments[:2])} ended with {done.returncode}:\n{done.stderr[-3000:]}")


def write_data(data: Path, num_train: int, num_heldout: int) -> None:
    """The quickstart's tasks, and the training ones again with the teacher's greedy responses."""
    if (data / "answered.jsonl").exists():
        return
    sizes = ("--num-train", str(num_train), "--num-heldout", str(num_heldout), "--seed", "0")
    call(str(QUICKSTART / "tasks.py"), "--output", str(data), *sizes)
    call(str(Path(__file__).with_name("answer.py")), "--tasks", str(data / "train.jsonl"), "--output", str(data))


def train_and_score(run: Run, data: Path, max_steps: int, scores: Path) -> None:
    """A line in `scores` for every checkpoint that has none yet."""
    known = {(line["method"], line["seed"], line["step"]) for line in read_scores(scores)}
    steps = list(range(SCORED_EVERY, max_steps + 1, SCORED_EVERY))
    missing = [step for step in steps if (run.method, run.seed, step) not in known]
    if not missing:
        return
    run.train(data, max_steps)
    tokens = run.tokens_by_step()
    for step in missing:
        accuracy = run.score(run.folder / "checkpoints" / f"step_{step:08d}", data)
        response_tokens, trained_tokens = tokens[step]
        line = {"method": run.method, "seed": run.seed, "step": step, "accuracy": accuracy}
        line |= {"response_tokens": response_tokens, "trained_tokens": trained_tokens}
        with scores.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def read_scores(path: Path) -> list[dict]:
    """The lines that are there already."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/data_efficiency"), help="folder of runs and scores")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="default: 1 2 3")
    parser.add_argument("--max-steps", type=int, default=MAX_STEPS, help=f"of each run; default: {MAX_STEPS}")
    parser.add_argument("--num-train", type=int, default=NUM_TRAIN, help=f"prompts; default: {NUM_TRAIN}")
    parser.add_argument("--num-heldout", type=int, default=NUM_HELDOUT, help=f"tasks; default: {NUM_HELDOUT}")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one process each; default: 2")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    write_data(output / "tasks", arguments.num_train, arguments.num_heldout)
    runs = [Run(method, seed, output / f"{method}_{seed}") for seed in arguments.seeds for method in arguments.methods]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        jobs = [
            pool.submit(train_and_score, run, output / "tasks", arguments.max_steps, output / "scores.jsonl")
            for run in runs
        ]
        for job in jobs:
            job.result()


if __name__ == "__main__":
    main()
