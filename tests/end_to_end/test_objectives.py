"""Whole runs of each objective on a tiny model: they learn, need what they say they need, and resume exactly."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_opdlm.config.schema import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RolloutConfig,
    TeacherConfig,
    TrainingConfig,
)
from tests.references import load_reference
from tests.tiny_qwen3 import make_tiny_qwen3, write_answered_prompts
from tests.worlds import layout, no_report, tiny_config

OBJECTIVES = {
    "sft": {"name": "sft"},
    "sft in two views": {"name": "sft", "complementary": True, "normaliser": "masked"},
    "lift": {"name": "lift"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory, world_of_one) -> Path:
    root = tmp_path_factory.mktemp("objectives")
    make_tiny_qwen3(root / "student", seed=1)
    make_tiny_qwen3(root / "teacher", seed=3)
    write_answered_prompts(root / "rows.jsonl", 8)
    return root


def config_of(root: Path, run: str, max_steps: int, objective: dict, **training):
    config = tiny_config(
        root / "student",
        teacher=root / "teacher",
        backend="aten",
        rollout=RolloutConfig(max_new_tokens=6, dynamic_threshold=0.12),
        objective=ObjectiveConfig(**objective),
        data=DataConfig(train_files=[str(root / "rows.jsonl")]),
        optimizer=OptimizerConfig(lr=5e-3, min_lr=1e-3, lr_warmup_steps=1, lr_decay_steps=20),
        training=TrainingConfig(
            max_steps=max_steps, num_prompts_per_step=8, global_batch_size=4, micro_batch_size=2, pad_to_multiple=8
        ),
        checkpoint=CheckpointConfig(save_interval=2, keep=0),
        logging=LoggingConfig(directory=str(root / run), tensorboard=False, progress_bar=False),
    )
    return dataclasses.replace(config, teacher=TeacherConfig()) if not config.objective.needs_teacher else config


def train(config) -> list[dict[str, float]]:
    from megatron_opdlm.training.trainer import Trainer

    with layout(config.parallel), no_report():
        trainer = Trainer(config)
        steps, one_step = [], trainer._one_step
        trainer._one_step = lambda: steps.append(one_step()) or steps[-1]
        trainer.run()
    return steps


def without_times(steps: list[dict[str, float]]) -> list[dict[str, float]]:
    timed = ("perf/seconds", "perf/tokens_per_second")
    return [{name: value for name, value in step.items() if not name.startswith(timed)} for step in steps]


def weights(root: Path, run: str) -> dict[str, torch.Tensor]:
    from megatron_opdlm.checkpointing.conversion import megatron_to_hf

    megatron_to_hf(root / run / "checkpoints", root / f"{run} exported", dtype=None)
    return load_file(root / f"{run} exported" / "model.safetensors")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_supervised_run_learns_without_a_teacher_and_resumes_exactly(root, objective):
    whole = train(config_of(root, f"{objective} whole", 8, OBJECTIVES[objective]))
    losses = [step["train/loss"] for step in whole]
    assert sum(losses[-2:]) < 0.6 * sum(losses[:2])
    assert whole[-1]["train/token_accuracy"] > whole[0]["train/token_accuracy"]
    assert not any(name.startswith(("rollout/tokens", "train/teacher", "train/on_policy")) for name in whole[-1])
    shutil.copytree(root / f"{objective} whole", root / f"{objective} resumed")
    for step in (4, 6, 8):
        shutil.rmtree(root / f"{objective} resumed" / "checkpoints" / f"step_{step:08d}")
    resumed = train(config_of(root, f"{objective} resumed", 8, OBJECTIVES[objective]))
    assert without_times(resumed) == without_times(whole[2:])
    expected, actual = weights(root, f"{objective} whole"), weights(root, f"{objective} resumed")
    assert all(actual[name].equal(weight) for name, weight in expected.items())


def mixed_trajectories(root: Path, run: str, objective: dict, step: int = 0):
    """The special tokens, the tasks of a step, and their trajectories."""
    from megatron_opdlm.training.trainer import Trainer

    config = config_of(root, run, 4, objective)
    greedy = dataclasses.replace(config.rollout, temperature=0.0)
    with layout(config.parallel):
        trainer = Trainer(dataclasses.replace(config, rollout=greedy))
        tasks = trainer._tasks(trainer.prompt_stream.next_batch(), 6)
        return trainer, tasks, trainer.objective.terminal_sequences(tasks, step, None)


def test_off_policy_sequences_are_the_teachers_own_greedy_responses_on_the_students_grid(root):
    trainer, tasks, trajectories = mixed_trajectories(root, "teacher's", {"off_policy_fraction": 1.0})
    teacher = load_reference(root / "teacher", torch.float32)
    for task, trajectory in zip(tasks, trajectories, strict=True):
        ids = list(task.prompt.token_ids)
        num_prompt, end = len(ids), trainer.special.end_token_ids
        width = (num_prompt + 6 + 3) // 4 * 4
        with torch.no_grad():
            while len(ids) < width and not (len(ids) > num_prompt and ids[-1] in end):
                ids.append(int(teacher(torch.tensor([ids])).logits[0, -1, : len(trainer.source.tokenizer)].argmax()))
        counted = next((i + 1 for i, token in enumerate(ids[num_prompt:]) if token in end), 6)
        assert trajectory.is_given and trajectory.prompt_id == task.prompt.prompt_id
        assert trajectory.terminal_ids_T[: len(ids)].tolist() == ids
        assert set(trajectory.terminal_ids_T[len(ids) :].tolist()) <= {end[0]}
        assert len(trajectory.terminal_ids_T) % 4 == 0 and trajectory.response_length == min(counted, 6)


def test_off_policy_sequences_can_be_the_data_s_responses(root):
    objective = {"off_policy_fraction": 1.0, "off_policy_source": "data"}
    _, tasks, trajectories = mixed_trajectories(root, "data's", objective)
    for task, trajectory in zip(tasks, trajectories, strict=True):
        assert trajectory.response_ids.tolist() == list(task.prompt.response_ids[:6])


def test_a_mixture_keeps_what_the_student_would_have_written_and_the_order_of_the_tasks(root):
    _, tasks, own = mixed_trajectories(root, "own", {})
    trainer, _, mixed = mixed_trajectories(root, "mixed", {"off_policy_fraction": 0.5})
    assert [t.prompt_id for t in mixed] == [task.prompt.prompt_id for task in tasks]
    num_given = sum(trajectory.is_given for trajectory in mixed)
    assert 0 < num_given < len(mixed)
    assert trainer.objective.rollout_metrics().values()["rollout/off_policy_fraction"] == num_given / len(mixed)
    for trajectory, expected in zip(mixed, own, strict=True):
        if not trajectory.is_given:  # other company rounds log-probabilities otherwise, and changes no token
            assert torch.equal(trajectory.terminal_ids_T, expected.terminal_ids_T)
            assert torch.equal(trajectory.step_map_R, expected.step_map_R)
            assert (trajectory.log_probs_R - expected.log_probs_R).abs().max() <= 1e-5
    with layout(trainer.config.parallel):
        again = mixed_trajectories(root, "mixed later", {"off_policy_fraction": 0.5}, step=1)[2]
    assert [t.is_given for t in again] != [t.is_given for t in mixed], "drawn anew in every step"


def test_a_run_with_a_mixture_trains_and_its_gap_is_that_of_the_students_own_rows(root):
    objective = {"off_policy_fraction": 0.9, "off_policy_decay": "linear", "off_policy_steps": 3}
    config = config_of(root, "decaying", 4, objective)
    standing_still = OptimizerConfig(lr=1e-12, min_lr=0.0)  # a step's second global batch meets the same student
    steps = train(dataclasses.replace(config, optimizer=standing_still))
    fractions = [step["rollout/off_policy_fraction"] for step in steps]
    assert fractions[0] > 0 and fractions[3] == 0.0
    assert all(step["train/on_policy_gap"] < 1e-4 for step in steps if "train/on_policy_gap" in step)
    assert "train/on_policy_gap" in steps[3] and "data/response_tokens" not in steps[3]
