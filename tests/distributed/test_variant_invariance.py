"""States in several rows, and the teacher's argmax fill: the same weights under every split, as the default has them.

Rows per trajectory, filler rows among them, are dealt out to ranks and cut into micro-batches. The reference is one
process that trains one row at a time.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_opdlm.config.schema import StatesConfig, TeacherConfig
from tests.distributed.test_train_step_invariance import SAME_COUNTS, SAME_NUMBERS, Run, read_weights, train
from tests.ranks import run_on_ranks
from tests.tiny_qwen3 import make_tiny_qwen3, write_prompts
from tests.worlds import quiet_logging

VARIANTS = {
    "all steps": {"states": StatesConfig(selection="all_steps")},
    "every second step, argmax fill": {
        "states": StatesConfig(selection="all_steps", shrink=2),
        "teacher": "argmax",
    },
}
REFERENCE = Run(1, "tensor parallel 1", 1)
RUNS = [
    (Run(1, "tensor parallel 1", 4), "all steps"),
    (Run(2, "tensor parallel 1", 2), "all steps"),
    (Run(2, "context parallel 2", 4), "all steps"),
    (Run(2, "sequence parallel 2", 2), "every second step, argmax fill"),
    (Run(2, "2 stages of 2 chunks", 4), "every second step, argmax fill"),
]


def train_all(rank: int, runs: list[tuple[Run, str]], root: Path) -> list[list[dict]]:
    return [train_variant(run, variant, root) for run, variant in runs]


def folder_of(run: Run, variant: str, root: Path) -> Path:
    return root / f"{run}, {variant}"


def train_variant(run: Run, variant: str, root: Path) -> list[dict]:
    sections = dict(VARIANTS[variant])
    if fill := sections.pop("teacher", None):
        sections["teacher"] = TeacherConfig(hf=str(root / "teacher"), fill=fill)
    directory = folder_of(run, variant, root)
    return train(run, root, logging=quiet_logging(directory), **sections)[0]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("variants")
    make_tiny_qwen3(root / "untied", seed=1, num_layers=4)
    make_tiny_qwen3(root / "teacher", seed=3, num_layers=4)
    write_prompts(root / "prompts.jsonl", 20)
    return root


@pytest.fixture(scope="module")
def results(root, world_of_one) -> dict[tuple[Run, str], list[dict]]:
    alone = [(REFERENCE, variant) for variant in VARIANTS] + [run for run in RUNS if run[0].world_size == 1]
    together = [run for run in RUNS if run[0].world_size == 2]
    results = dict(zip(alone, train_all(0, alone, root), strict=True))
    return results | dict(zip(together, run_on_ranks(train_all, 2, together, root)[0], strict=True))


@pytest.fixture(scope="module")
def weights(results, root):
    from megatron_opdlm.checkpointing.conversion import megatron_to_hf

    def export(run: Run, variant: str) -> dict:
        output = root / f"{run}, {variant} exported"
        megatron_to_hf(folder_of(run, variant, root) / "checkpoints", output, dtype=None)
        return read_weights(output)

    return {key: export(*key) for key in results}


@pytest.mark.parametrize(("run", "variant"), RUNS, ids=str)
def test_losses_and_weights_are_those_of_one_row_at_a_time(results, weights, root, run, variant):
    for expected, actual in zip(results[REFERENCE, variant], results[run, variant], strict=True):
        for name in SAME_NUMBERS:
            assert actual[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
        for name in SAME_COUNTS:
            assert actual[name] == expected[name], name
    start = read_weights(root / "untied")
    for name, weight in weights[REFERENCE, variant].items():
        difference = (weights[run, variant][name] - weight).norm()
        assert difference <= 1e-3 * (weight - start[name]).norm(), f"{name}: relative to what training changed"


def test_the_variants_train_different_things(results):
    losses = [[step["train/loss"] for step in results[REFERENCE, variant]] for variant in VARIANTS]
    assert abs(losses[0][0] - losses[1][0]) > 1e-3
    trained = [results[REFERENCE, variant][0]["train/trained_tokens"] for variant in VARIANTS]
    assert trained[0] > trained[1]
