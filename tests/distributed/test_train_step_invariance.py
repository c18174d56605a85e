"""Three training steps give the same weights under every split: micro-batches, data and sequence parallelism.

Each run is a whole `Trainer`: rollout, states, teacher, optimizer, and the checkpoint it writes at the end, which is
exported to Hugging Face tensors and compared there. The reference is the run of one process, one row at a time. The
other layouts are in `test_every_layout`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_opdlm.config.schema import (
    CheckpointConfig,
    DataConfig,
    DivergenceConfig,
    OptimizerConfig,
    RolloutConfig,
    TrainingConfig,
)
from tests.ranks import run_on_ranks
from tests.tiny_qwen3 import make_tiny_qwen3, write_prompts
from tests.worlds import (
    CONTEXT_LAYOUTS,
    EXPERT_LAYOUTS,
    LAYOUTS,
    PIPELINE_LAYOUTS,
    layout,
    quiet_logging,
    run_trainer,
    tiny_config,
)

# Adam divides a gradient by its own size, so an element whose gradient is nothing but rounding noise would move by a
# whole learning rate in a random direction. An epsilon far above that noise (1e-8) and far below the gradients (1e-2)
# keeps updates proportional to gradients where only noise is left, and changes them by 0.1 % where there is more.
OPTIMIZER = OptimizerConfig(lr=1e-3, min_lr=1e-4, lr_warmup_steps=1, adam_eps=1e-5)


@dataclass(frozen=True)
class Run:
    """A layout of a run; data parallelism is what the world has left."""

    world_size: int
    layout: str
    micro_batch_size: int
    tie: bool = False
    by_token: bool = False
    """Loss by token, end tokens among the trained, of a restricted JSD from a filtered target."""

    def __str__(self) -> str:
        weights = f"{'un' * (not self.tie)}tied{', loss by token' * self.by_token}"
        return f"{self.world_size} ranks, {self.layout}, micro-batch {self.micro_batch_size}, {weights}"

    @property
    def reference(self) -> Run:
        """The same training by one process, one row at a time."""
        return dataclasses.replace(self, world_size=1, layout="tensor parallel 1", micro_batch_size=1)


BY_TOKEN = {"loss_reduction": "token", "train_on_end_token": True}
STOP_TOKEN_IDS = list(range(5, 25))
"""So many that some responses end early, in a state that masks their end token."""
FILTERED_JSD = DivergenceConfig(
    kind="jsd", jsd_alpha=0.3, top_k=8, top_k_tail="bucket", teacher_temperature=1.5, teacher_top_p=0.9, chunk_size=5
)
REFERENCES = [
    Run(1, "tensor parallel 1", 1),
    Run(1, "tensor parallel 1", 1, tie=True),
    Run(1, "tensor parallel 1", 1, by_token=True),
]
OTHERS = [
    Run(1, "tensor parallel 1", 2),
    Run(1, "tensor parallel 1", 4),
    Run(2, "tensor parallel 1", 4),
    Run(2, "sequence parallel 2", 4),
    Run(2, "sequence parallel 2", 2, tie=True),
    Run(1, "tensor parallel 1", 4, by_token=True),
    Run(2, "tensor parallel 1", 2, by_token=True),
    Run(2, "sequence parallel 2", 4, by_token=True),
]
SAME_NUMBERS = ("train/loss", "train/grad_norm", "train/teacher_agreement", "train/on_policy_gap", "train/lr")
SAME_COUNTS = ("rollout/tokens", "rollout/tokens_per_step", "rollout/end_token_fraction", "train/trained_tokens")


def train_all(rank: int, runs: list[Run], root: Path) -> dict[Run, tuple[list[dict], dict]]:
    """Metrics of each step, and this rank's trajectories by step, prompt and sample."""
    return {run: train(run, root) for run in runs}


def train(run: Run, root: Path, **sections) -> tuple[list[dict], dict]:
    """What `run_trainer` gives; `sections` take the place of those sections of the configuration."""
    config = tiny_config(
        root / ("tied" if run.tie else "untied"),
        teacher=root / "teacher",
        parallel=(LAYOUTS | PIPELINE_LAYOUTS | EXPERT_LAYOUTS | CONTEXT_LAYOUTS)[run.layout],
        backend="aten",
        rollout=RolloutConfig(
            max_new_tokens=8, dynamic_threshold=0.12, stop_token_ids=STOP_TOKEN_IDS if run.by_token else []
        ),
        data=DataConfig(train_files=[str(root / "prompts.jsonl")]),
        divergence=FILTERED_JSD if run.by_token else DivergenceConfig(),
        optimizer=OPTIMIZER,
        training=TrainingConfig(
            max_steps=3,
            num_prompts_per_step=16,
            global_batch_size=8,
            micro_batch_size=run.micro_batch_size,
            pad_to_multiple=8,
            **(BY_TOKEN if run.by_token else {}),
        ),
        checkpoint=CheckpointConfig(save_interval=0),
        logging=quiet_logging(root / str(run)),
    )
    config = dataclasses.replace(config, **sections)
    with layout(config.parallel):
        return run_trainer(config)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("invariance")
    make_tiny_qwen3(root / "untied", seed=1)
    make_tiny_qwen3(root / "tied", seed=2, tie=True)
    make_tiny_qwen3(root / "teacher", seed=3)
    write_prompts(root / "prompts.jsonl", 20)
    return root


@pytest.fixture(scope="module")
def results(root, world_of_one) -> dict[Run, tuple[list[dict], dict]]:
    """The metrics, equal on all ranks, and the trajectories of all ranks."""
    from megatron_opdlm.diffusion.trajectory import Trajectory

    results = {}
    for world_size in (1, 2):
        runs = [run for run in [*REFERENCES, *OTHERS] if run.world_size == world_size]
        by_rank = [train_all(0, runs, root)] if world_size == 1 else run_on_ranks(train_all, world_size, runs, root)
        for run in runs:
            lines = {key: line for rank in by_rank for key, line in rank[run][1].items()}
            results[run] = by_rank[0][run][0], {key: Trajectory.from_json(line) for key, line in lines.items()}
            for rank in by_rank:
                assert [s["train/loss"] for s in rank[run][0]] == [s["train/loss"] for s in results[run][0]]
    return results


@pytest.fixture(scope="module")
def weights(results, root):
    """Run -> its trained Hugging Face tensors in float64."""
    from megatron_opdlm.checkpointing.conversion import megatron_to_hf

    def export(run: Run) -> dict[str, torch.Tensor]:
        output = root / f"{run} exported"
        megatron_to_hf(root / str(run) / "checkpoints", output, dtype=None)
        return read_weights(output)

    return {run: export(run) for run in results}


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("run", OTHERS, ids=str)
def test_trajectories_are_identical(results, run):
    expected, actual = results[run.reference][1], results[run][1]
    assert actual.keys() == expected.keys() and len(expected) == 3 * 16
    for key, trajectory in expected.items():
        assert actual[key].terminal_ids_T.equal(trajectory.terminal_ids_T)
        assert actual[key].step_map_R.equal(trajectory.step_map_R)
        assert (actual[key].log_probs_R - trajectory.log_probs_R).abs().max() <= 1e-4


@pytest.mark.parametrize("run", OTHERS, ids=str)
def test_loss_and_gradient_norm_are_equal(results, run):
    for expected, actual in zip(results[run.reference][0], results[run][0], strict=True):
        for name in SAME_NUMBERS:
            assert actual[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
        for name in SAME_COUNTS:
            assert actual[name] == expected[name], name


@pytest.mark.parametrize("run", OTHERS, ids=str)
def test_weights_after_three_steps_are_equal(results, weights, root, run):
    expected, actual = weights[run.reference], weights[run]
    start = read_weights(root / ("tied" if run.tie else "untied"))
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        difference = (actual[name] - weight).norm()
        assert difference <= 1e-6 * weight.norm(), name
        assert difference <= 1e-3 * (weight - start[name]).norm(), f"{name}: relative to what training changed"


def test_training_changes_every_weight(weights, root):
    for run in REFERENCES:
        start = read_weights(root / ("tied" if run.tie else "untied"))
        for name, weight in weights[run].items():
            assert (weight - start[name]).norm() > 1e-3 * weight.norm(), name


def test_a_loss_by_token_is_another_one_than_that_by_sequence(results, root, world_of_one):
    run = Run(1, "tensor parallel 1", 4, by_token=True)
    training = TrainingConfig(
        max_steps=3, num_prompts_per_step=16, global_batch_size=8, micro_batch_size=4, pad_to_multiple=8
    )
    logging = quiet_logging(root / "by sequence")
    by_sequence, _ = train(run, root, training=training, logging=logging)
    (first, *_), (other, *_) = results[run][0], by_sequence
    assert other["train/loss"] != pytest.approx(first["train/loss"], rel=1e-3)
    assert first["train/trained_tokens"] > other["train/trained_tokens"], "some end tokens were masked"
