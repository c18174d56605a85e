"""A loss or a gradient that is not finite changes nothing, on any rank, and says whose it was.

Two ranks train a tiny model. What is sick is the divergence of one prompt, which one data-parallel rank or one pipeline
stage alone sees, or the gradient of one tensor-parallel rank's part of a weight.
"""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_opdlm.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    TrainingConfig,
)
from tests.ranks import run_on_ranks
from tests.tiny_qwen3 import make_tiny_qwen3, write_prompts
from tests.worlds import layout, no_report, quiet_logging, tiny_config

SICK_PROMPT = 5
MAX_IN_A_ROW = 3
LAYOUTS = {"2 replicas": ParallelConfig(), "2 stages": ParallelConfig(pipeline_model_parallel_size=2)}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("skipped")
    make_tiny_qwen3(root / "model", seed=1)
    write_prompts(root / "prompts.jsonl", 8)
    return root


def config_of(root: Path, run: str, parallel: ParallelConfig) -> Config:
    """Four optimizer steps of two rows in each training step; every prompt once."""
    return tiny_config(
        root / "model",
        parallel=parallel,
        rollout=RolloutConfig(max_new_tokens=4),
        data=DataConfig(train_files=[str(root / "prompts.jsonl")]),
        optimizer=OptimizerConfig(lr=1e-3, lr_warmup_steps=0),
        training=TrainingConfig(
            max_steps=2,
            num_prompts_per_step=8,
            global_batch_size=2,
            pad_to_multiple=8,
            max_skipped_steps=MAX_IN_A_ROW,
        ),
        checkpoint=CheckpointConfig(save_interval=0, async_save=False),
        logging=quiet_logging(root / run),
    )


def spoil_loss_of_prompt(trainer, prompt_id: int) -> None:
    """The loss of its rows becomes infinite, and with it their gradient."""
    loss = trainer.objective.loss

    def spoilt(hidden_TBH, states, targets):
        value, sums = loss(hidden_TBH, states, targets)
        if (states.prompt_ids_B == prompt_id).any():
            value, sums = value * torch.inf, sums | {"loss": sums["loss"] * torch.inf}
        return value, sums

    trainer.objective.loss = spoilt


def spoil_gradient(parameter: torch.nn.Parameter, is_due) -> None:
    parameter.register_hook(lambda gradient: gradient * torch.nan if is_due() else gradient)


def weights_around_each_step(trainer) -> list[tuple[bool, bool]]:
    """Of each optimizer step to come: whether it was skipped, and whether a weight changed."""
    from megatron_opdlm.training.optimizer import wait_for_weights

    noted, train_step = [], trainer.train_step

    def noting(micro_batches):
        wait_for_weights(trainer.student)
        before = [parameter.detach().clone() for parameter in trainer.student.model.parameters()]
        sums = train_step(micro_batches)
        wait_for_weights(trainer.student)
        after = trainer.student.model.parameters()
        has_changed = any(not torch.equal(old, weight) for old, weight in zip(before, after, strict=True))
        noted.append((bool(sums["is_skipped"]), has_changed))
        return sums

    trainer.train_step = noting
    return noted


def train_with_a_sick_prompt(rank: int, root: Path, run: str, parallel: ParallelConfig) -> dict:
    from megatron_opdlm.training.trainer import Trainer

    config = config_of(root, run, parallel)
    with layout(config.parallel), no_report():
        trainer = Trainer(config)
        spoil_loss_of_prompt(trainer, SICK_PROMPT)
        noted = weights_around_each_step(trainer)
        trainer.run()
        weights = [parameter.detach() for parameter in trainer.student.model.parameters()]
        return {"steps": noted, "num_updates": trainer.student.scheduler.num_steps, "weights": weights}


@pytest.mark.parametrize("run", LAYOUTS)
def test_a_step_with_an_infinite_loss_is_left_out_on_all_ranks_alike(root, run):
    first, second = run_on_ranks(train_with_a_sick_prompt, 2, root, run, LAYOUTS[run])
    assert first["steps"] == second["steps"], "both ranks decide the same"
    assert [is_skipped != has_changed for is_skipped, has_changed in first["steps"]] == [True] * 8
    assert sum(is_skipped for is_skipped, _ in first["steps"]) == 2, "once in each of two epochs"
    assert first["num_updates"] == 6, "the schedule counts the steps that were taken"
    assert all(weight.isfinite().all() for weight in first["weights"] + second["weights"])
    records = [json.loads(line) for line in (root / run / "skipped_steps.jsonl").read_text().splitlines()]
    assert records == [
        {"step": step, "loss_is_finite": False, "gradient_is_finite": False, "prompt_ids": [SICK_PROMPT]}
        for step in (0, 1)
    ]
    metrics = [json.loads(line) for line in (root / run / "metrics.jsonl").read_text().splitlines()]
    assert [record["train/skipped_steps"] for record in metrics] == [1, 1]
    assert all(record["train/loss"] > 0 and record["train/grad_norm"] > 0 for record in metrics)


def train_with_a_sick_rank(rank: int, root: Path) -> str:
    from megatron_opdlm.training.skipped_steps import TooManySkippedSteps
    from megatron_opdlm.training.trainer import Trainer

    config = config_of(root, "sick rank", ParallelConfig(tensor_model_parallel_size=2))
    with layout(config.parallel), mock.patch("megatron_opdlm.training.trainer.write_report") as report:
        trainer = Trainer(config)
        noted = weights_around_each_step(trainer)
        # from the second optimizer step on, and on one rank alone
        spoil_gradient(next(trainer.student.model.parameters()), lambda: rank == 1 and len(noted) > 0)
        with pytest.raises(TooManySkippedSteps) as stop:
            trainer.run()
        assert report.called == (rank == 0), "the report is written all the same"
        assert noted == [(False, True), (True, False), (True, False)], "the last one ends the run"
        return str(stop.value)


def test_a_run_whose_gradients_stay_sick_ends_with_a_report(root):
    first, second = run_on_ranks(train_with_a_sick_rank, 2, root)
    assert first == second
    assert first.startswith("training.max_skipped_steps (3) optimizer steps in a row were not finite")
    assert "its gradient of prompts" in first and "skipped_steps.jsonl" in first
    lines = (root / "sick rank" / "skipped_steps.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [(record["loss_is_finite"], record["gradient_is_finite"]) for record in records] == [(True, False)] * 3
    prompts = [record["prompt_ids"] for record in records]
    assert [len(ids) for ids in prompts] == [2, 2, 2], "nobody knows whose it was: the whole global batch is named"
