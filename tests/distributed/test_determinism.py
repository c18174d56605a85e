"""`training.deterministic`: the same run in other processes gives the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megatron_opdlm.config.schema import CheckpointConfig, DataConfig, LoggingConfig, RolloutConfig, TrainingConfig
from tests.ranks import run_on_ranks
from tests.tiny_qwen3 import make_tiny_qwen3, write_prompts
from tests.worlds import layout, run_trainer, tiny_config

CLOCK = ("perf/seconds", "perf/tokens_per_second", "rollout/tokens_per_second_per_rank", "rollout/idle_share")


def train(rank: int, root: Path, run: str, seed: int) -> tuple[list[dict[str, float]], list[str]]:
    config = tiny_config(
        root / "model",
        rollout=RolloutConfig(max_new_tokens=8, dynamic_threshold=0.1),
        data=DataConfig(train_files=[str(root / "prompts.jsonl")]),
        training=TrainingConfig(
            max_steps=2, num_prompts_per_step=8, global_batch_size=4, pad_to_multiple=8, deterministic=True, seed=seed
        ),
        checkpoint=CheckpointConfig(save_interval=0),
        logging=LoggingConfig(directory=str(root / run), tensorboard=False, progress_bar=False),
    )
    with layout(config.parallel):
        steps, trajectories = run_trainer(config)
    assert torch.are_deterministic_algorithms_enabled()
    steps = [{name: value for name, value in step.items() if not name.startswith(CLOCK)} for step in steps]
    return steps, [trajectories[key] for key in sorted(trajectories)]


def weights(root: Path, run: str) -> dict[str, bytes]:
    """The optimizer's state among them."""
    from torch.distributed.checkpoint import FileSystemReader

    (folder,) = (root / run / "checkpoints").glob("step_*")
    index = FileSystemReader(folder).read_metadata()
    parts = {}
    for place, where in index.storage_data.items():
        content = (folder / where.relative_path).read_bytes()
        parts[f"{place.fqn} {place.offset} {place.index}"] = content[where.offset : where.offset + where.length]
    return parts


def test_a_run_that_is_repeated_is_repeated_bit_for_bit(tmp_path):
    make_tiny_qwen3(tmp_path / "model", seed=1)
    write_prompts(tmp_path / "prompts.jsonl", 16)
    runs = {run: run_on_ranks(train, 2, tmp_path, run, seed) for run, seed in (("a", 1), ("b", 1), ("c", 2))}
    assert json.dumps(runs["a"]) == json.dumps(runs["b"]), "metrics and trajectories"
    assert json.dumps(runs["a"]) != json.dumps(runs["c"])
    first, second, other = (weights(tmp_path, run) for run in "abc")
    assert first == second and len(first) > 20
    assert first != other
