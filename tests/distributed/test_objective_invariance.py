"""Every objective trains the same, however its rows are split and its model is laid out, to rounding in float32."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_opdlm.config.schema import DataConfig, ObjectiveConfig, TrainingConfig
from tests.distributed.test_train_step_invariance import Run, train
from tests.ranks import run_on_ranks
from tests.tiny_qwen3 import make_tiny_qwen3, write_answered_prompts
from tests.worlds import quiet_logging

OBJECTIVES = {
    "sft": ObjectiveConfig(name="sft", loss_weight="1/t", noise_low=0.1),
    "two views": ObjectiveConfig(name="sft", complementary=True, normaliser="masked"),
    "lift": ObjectiveConfig(name="lift", normaliser="response"),
    "off-policy": ObjectiveConfig(off_policy_fraction=0.6),
}
REFERENCE = Run(1, "tensor parallel 1", 1)
OTHERS = [
    Run(1, "tensor parallel 1", 4),
    Run(2, "tensor parallel 1", 2),
    Run(2, "sequence parallel 2", 4),
    Run(2, "2 stages", 4),
    Run(2, "context parallel 2", 2),
]
SAME = ("train/loss", "train/grad_norm", "train/trained_tokens", "train/token_accuracy", "rollout/off_policy_fraction")


def train_all(rank: int, runs: list[Run], root: Path) -> dict[tuple[Run, str], list[dict[str, float]]]:
    """The metrics of each run with each objective."""
    results = {}
    for run in runs:
        for name, objective in OBJECTIVES.items():
            sections = {
                "objective": objective,
                "data": DataConfig(train_files=[str(root / "rows.jsonl")]),
                "training": TrainingConfig(
                    max_steps=2,
                    num_prompts_per_step=8,
                    global_batch_size=8,
                    micro_batch_size=run.micro_batch_size,
                    pad_to_multiple=8,
                ),
                "logging": quiet_logging(root / f"{run} {name}"),
            }
            results[run, name] = train(run, root, **sections)[0]
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory, world_of_one) -> dict[tuple[Run, str], list[dict[str, float]]]:
    root = tmp_path_factory.mktemp("objectives")
    make_tiny_qwen3(root / "untied", seed=1)
    make_tiny_qwen3(root / "teacher", seed=3)
    write_answered_prompts(root / "rows.jsonl", 20)
    results = train_all(0, [run for run in [REFERENCE, *OTHERS] if run.world_size == 1], root)
    first, second = run_on_ranks(train_all, 2, [run for run in OTHERS if run.world_size == 2], root, time_limit=280)
    assert {key: [step.get("train/loss") for step in steps] for key, steps in first.items()} == {
        key: [step.get("train/loss") for step in steps] for key, steps in second.items()
    }
    return results | first


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("run", OTHERS, ids=str)
def test_losses_and_gradient_norms_are_those_of_one_process(results, run, objective):
    for expected, actual in zip(results[REFERENCE, objective], results[run, objective], strict=True):
        figures, others = ({name: step[name] for name in SAME if name in step} for step in (expected, actual))
        assert others == pytest.approx(figures, rel=1e-5, abs=1e-6)
        assert "train/loss" in expected and expected["train/grad_norm"] > 0.1
