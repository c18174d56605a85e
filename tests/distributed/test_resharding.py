"""A checkpoint goes on under every other layout: the same losses, and every tensor of the state bit for bit.

Under each layout a run of two steps saves and goes on for two more, which are the reference. Each other layout loads
that checkpoint, saves it again (the gathered state, to compare), and takes the two steps too. More layouts, and
mixtures of experts, are in the ring of `test_every_layout`.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_opdlm.config.schema import (
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RolloutConfig,
    TrainingConfig,
)
from tests.ranks import run_on_ranks
from tests.tiny_qwen3 import make_tiny_qwen3, write_prompts
from tests.worlds import layout, no_report, quiet_logging, tiny_config

TP2, TWO_STAGES = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "TP1 DP1": (1, ParallelConfig()),
    "TP1 DP2": (2, ParallelConfig()),
    "TP2 DP1": (2, ParallelConfig(**TP2)),
    "PP2 DP1": (2, ParallelConfig(**TWO_STAGES)),
    "TP4 DP1": (4, ParallelConfig(tensor_model_parallel_size=4)),
    "TP2 SP DP2": (4, ParallelConfig(**TP2, sequence_parallel=True)),
    "PP2 in chunks CP2": (
        4,
        ParallelConfig(**TWO_STAGES, virtual_pipeline_model_parallel_size=2, context_parallel_size=2),
    ),
}
"""Name -> ranks and layout."""
PAIRS = list(itertools.permutations(LAYOUTS, 2))
"""(saved, loaded)."""
BFLOAT16 = "TP2 DP1 in bfloat16"
STEPS = 2
STEP_FOLDER = f"step_{STEPS:08d}"
TIME_LIMIT = 600.0
"""Seconds for all runs of as many processes."""
pytestmark = pytest.mark.timeout(3 * TIME_LIMIT)  # whichever test comes first waits for all the runs


def build_trainer(root: Path, run: str, name: str):
    """Of a run whose checkpoints stand in `run`. Adam's epsilon: see test_train_step_invariance."""
    from megatron_opdlm.training.trainer import Trainer

    config = tiny_config(
        root / "student",
        teacher=root / "teacher",
        parallel=LAYOUTS[name][1],
        backend="aten",
        rollout=RolloutConfig(max_new_tokens=4, dynamic_threshold=0.12),
        data=DataConfig(train_files=[str(root / "prompts.jsonl")]),
        optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-4, lr_warmup_steps=1, lr_decay_steps=8, adam_eps=1e-5),
        training=TrainingConfig(
            max_steps=STEPS, num_prompts_per_step=4, global_batch_size=4, micro_batch_size=2, pad_to_multiple=8
        ),
        checkpoint=CheckpointConfig(directory=str(root / run / "checkpoints")),
        logging=quiet_logging(root / run),
    )
    if run.startswith(BFLOAT16):
        config = dataclasses.replace(config, precision=PrecisionConfig(dtype="bfloat16"))
    return Trainer(config)


def two_more_steps(trainer) -> list[dict[str, float]]:
    metrics = []
    for _ in range(2):
        metrics.append(trainer._one_step())
        trainer.step += 1
    return metrics


def save(rank: int, root: Path, runs: list[tuple[str, str]]) -> dict[str, list[dict[str, float]]]:
    """Trains and saves each (run, layout); the metrics of two more steps, by run."""
    metrics = {}
    for run, name in runs:
        with layout(LAYOUTS[name][1]):
            trainer = build_trainer(root, run, name)
            with no_report():
                trainer.run()
            metrics[run] = two_more_steps(trainer)
    return metrics


def load(rank: int, root: Path, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], list[dict[str, float]]]:
    """Resumes each (run, layout) on a copy of the run's checkpoint, replaces that by what was loaded, and goes on."""
    from megatron_opdlm.checkpointing.distributed import BackgroundSaves

    metrics = {}
    for run, name in pairs:
        copy = f"{run} on {name}"
        if rank == 0:
            shutil.copytree(root / run, root / copy)
        dist.barrier()
        with layout(LAYOUTS[name][1]), BackgroundSaves() as saves:
            trainer = build_trainer(root, copy, name)
            assert trainer.step == STEPS
            trainer._save(saves)
            metrics[run, name] = two_more_steps(trainer)
    return metrics


def everywhere(function, root: Path, work: list[tuple[str, str]]) -> dict:
    """Runs (run, layout) pairs on as many ranks as their layouts ask for; equal on all ranks but for the clock."""
    results = {}
    for world_size in (1, 2, 4):
        own = [(run, name) for run, name in work if LAYOUTS[name][0] == world_size]
        if world_size == 1:
            results |= function(0, root, own)
        else:
            results |= run_on_ranks(function, world_size, root, own, time_limit=TIME_LIMIT)[0]
    return results


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    stored = checkpoint.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    checkpoint.load(state, checkpoint_id=folder, no_dist=True)
    return state


def assert_same_state(root: Path, run: str, name: str, num_tokens: int) -> dict[str, torch.Tensor]:
    """The vocabulary is padded to a multiple that depends on the layout, with rows that take no part."""
    expected = tensors(root / run / "checkpoints" / STEP_FOLDER)
    actual = tensors(root / f"{run} on {name}" / "checkpoints" / STEP_FOLDER)
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        has_vocabulary = "word_embeddings" in key or "output_layer" in key
        rows = slice(num_tokens) if has_vocabulary else slice(None)
        assert actual[key].dtype == tensor.dtype and actual[key][rows].equal(tensor[rows]), key
    return expected


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("resharding")
    make_tiny_qwen3(root / "student", seed=1, num_layers=4, num_groups=4)
    make_tiny_qwen3(root / "teacher", seed=3, num_layers=4, num_groups=4)
    write_prompts(root / "prompts.jsonl", 14)
    return root


@pytest.fixture(scope="module")
def num_tokens(root) -> int:
    from transformers import AutoTokenizer

    return len(AutoTokenizer.from_pretrained(root / "student"))


@pytest.fixture(scope="module")
def saved(root, world_of_one) -> dict[str, list[dict[str, float]]]:
    """Run -> the metrics of the steps after its checkpoint."""
    return everywhere(save, root, [*((name, name) for name in LAYOUTS), (BFLOAT16, "TP2 DP1")])


@pytest.fixture(scope="module")
def loaded(root, saved) -> dict[tuple[str, str], list[dict[str, float]]]:
    """(run, layout that loaded it) -> the metrics of its steps after that."""
    return everywhere(load, root, [*PAIRS, (BFLOAT16, "TP1 DP2")])


@pytest.mark.parametrize(("run", "name"), PAIRS)
def test_the_losses_after_a_checkpoint_are_the_same_on_another_layout(saved, loaded, run, name):
    (first, second), (expected, expected_second) = loaded[run, name], saved[run]
    assert first["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-6)
    assert first["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=1e-5)
    assert second["train/loss"] == pytest.approx(expected_second["train/loss"], rel=1e-5)  # after an update by Adam
    assert first["train/loss"] != second["train/loss"]
    for key in ("rollout/tokens", "rollout/total_tokens", "train/lr"):
        assert first[key] == expected[key], key


@pytest.mark.parametrize(("run", "name"), PAIRS)
def test_weights_and_moments_come_over_to_another_layout_bit_for_bit(root, loaded, num_tokens, run, name):
    state = assert_same_state(root, run, name, num_tokens)
    for part in ("param", "exp_avg", "exp_avg_sq"):
        moved = [tensor for key, tensor in state.items() if key.startswith(f"optimizer.state.{part}.")]
        assert len(moved) >= 10 and all(tensor.any() for tensor in moved), part


@pytest.mark.parametrize("run", [name for name in LAYOUTS if name != "TP1 DP1"])
def test_every_layout_saves_the_same_state(root, saved, num_tokens, run):
    """A wrong place for a shard that loading puts right again would pass the tests above."""
    reference = tensors(root / "TP1 DP1" / "checkpoints" / STEP_FOLDER)
    state = tensors(root / run / "checkpoints" / STEP_FOLDER)
    assert state.keys() == reference.keys()
    for key, tensor in reference.items():
        rows = slice(num_tokens if "word_embeddings" in key or "output_layer" in key else None)
        assert (state[key][rows] - tensor[rows]).norm() <= 1e-4 * tensor[rows].norm(), key


def test_bfloat16_weights_come_over_with_their_float32_main_parameters(root, saved, loaded, num_tokens):
    state = assert_same_state(root, BFLOAT16, "TP1 DP2", num_tokens)
    mains = {key: tensor for key, tensor in state.items() if key.startswith("optimizer.state.param.")}
    assert state["decoder.final_layernorm.weight"].dtype == torch.bfloat16
    for key, main in mains.items():
        assert main.dtype == torch.float32 and not main.bfloat16().float().equal(main), key
    (first, _), (expected, _) = loaded[BFLOAT16, "TP1 DP2"], saved[BFLOAT16]
    assert first["train/loss"] == pytest.approx(expected["train/loss"], rel=0.05)
