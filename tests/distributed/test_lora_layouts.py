"""Adapters train to the same weights under every layout, and go on under another one than they were saved in.

The runs are those of `test_train_step_invariance`, with adapters; compared are the merged weights of their exports.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from megatron_opdlm.config.schema import LoraConfig, TrainingConfig
from tests.distributed.test_train_step_invariance import SAME_COUNTS, SAME_NUMBERS, Run, read_weights, train
from tests.ranks import run_on_ranks
from tests.tiny_qwen3 import make_tiny_qwen3, write_prompts
from tests.worlds import quiet_logging

LORA = LoraConfig(rank=3, alpha=6.0)
REFERENCE = Run(1, "tensor parallel 1", 1, tie=True)
RUNS = [
    Run(2, "tensor parallel 1", 2, tie=True),
    Run(2, "tensor parallel 2", 4, tie=True),
    Run(2, "sequence parallel 2", 4, tie=True),
    Run(2, "2 stages", 4, tie=True),
]
CONTINUED = {"continued": REFERENCE, "continued under sequence parallelism": RUNS[2]}


def train_all(rank: int, runs: list[Run], root: Path) -> list[list[dict]]:
    return [train(run, root, lora=LORA)[0] for run in runs]


def go_on(rank: int, name: str, root: Path) -> None:
    """One more step of the reference, from its checkpoint."""
    run = CONTINUED[name]
    training = TrainingConfig(max_steps=4, num_prompts_per_step=16, global_batch_size=8, pad_to_multiple=8)
    logging = quiet_logging(root / name)
    train(run, root, lora=LORA, training=training, logging=logging)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("lora")
    make_tiny_qwen3(root / "tied", seed=2, tie=True)
    make_tiny_qwen3(root / "teacher", seed=3)
    write_prompts(root / "prompts.jsonl", 20)
    return root


def train_and_go_on(rank: int, root: Path) -> list[list[dict]]:
    results = train_all(rank, RUNS, root)
    go_on(rank, "continued under sequence parallelism", root)
    return results


@pytest.fixture(scope="module")
def results(root, world_of_one) -> dict[Run, list[dict]]:
    (reference,) = train_all(0, [REFERENCE], root)
    for name in CONTINUED:
        shutil.copytree(root / str(REFERENCE), root / name)
    go_on(0, "continued", root)
    return {REFERENCE: reference} | dict(zip(RUNS, run_on_ranks(train_and_go_on, 2, root)[0], strict=True))


def exported(root: Path, name: str) -> dict[str, torch.Tensor]:
    from megatron_opdlm.checkpointing.conversion import megatron_to_hf

    output = root / f"{name} exported"
    if not output.exists():
        megatron_to_hf(root / name / "checkpoints", output, dtype=None)
    return read_weights(output)


def assert_same_weights(root: Path, name: str, reference: str) -> None:
    """To a thousandth of what training changed; what has no adapter is what it was, bit for bit."""
    expected, actual, start = exported(root, reference), exported(root, name), read_weights(root / "tied")
    for tensor, weight in expected.items():
        if tensor.endswith("_proj.weight"):
            change = (weight - start[tensor]).norm()
            assert change > 0 and (actual[tensor] - weight).norm() <= 1e-3 * change, tensor
        else:
            assert actual[tensor].equal(weight) and weight[: len(start[tensor])].equal(start[tensor]), tensor


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_every_layout_trains_the_same_adapters(results, root, run):
    for expected, actual in zip(results[REFERENCE], results[run], strict=True):
        for name in SAME_NUMBERS:
            assert actual[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
        for name in SAME_COUNTS:
            assert actual[name] == expected[name], name
    assert_same_weights(root, str(run), str(REFERENCE))


def test_adapters_go_on_under_another_layout(results, root):
    names = list(CONTINUED)
    assert_same_weights(root, names[1], names[0])
    before, after = exported(root, str(REFERENCE)), exported(root, names[0])
    assert any(not torch.equal(after[name], weight) for name, weight in before.items())
