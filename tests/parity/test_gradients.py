"""The gradient of a whole training step against a literal one: `transformers` in float64, full logits, autograd.

The step's trajectories come from a rollout, with rows of different lengths and padding. Everything between them and
the gradients is checked at once: states, both forwards, the chunked divergence, the split into micro-batches,
activation recompute, and Megatron's normalisation over the global batch.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_opdlm.config.schema import (
    DataConfig,
    DivergenceConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    StatesConfig,
    TrainingConfig,
)
from tests.references import load_reference, two_stream_logits
from tests.tiny_qwen3 import make_tiny_qwen3, write_prompts
from tests.worlds import layout, tiny_config

MLP_RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
CASES = {
    "one row at a time": {"micro_batch_size": 1},
    "all rows at once": {"micro_batch_size": 4},
    "aten": {"micro_batch_size": 2, "backend": "aten"},
    "recompute": {"micro_batch_size": 4, "recompute": "full"},
    "recompute, one row at a time, aten": {"micro_batch_size": 1, "backend": "aten", "recompute": "full"},
    "selective recompute": {"micro_batch_size": 2, "recompute": "selective"},
    "selective recompute, aten": {"micro_batch_size": 2, "backend": "aten", "recompute": "selective"},
    "recompute of the MLP alone": {"micro_batch_size": 2, "transformer": MLP_RECOMPUTE},
    "tied": {"micro_batch_size": 2, "tie": True},
    "shifted logits": {"micro_batch_size": 2, "logit_shift": "next_token"},
    "shifted logits, tied, aten": {"micro_batch_size": 1, "logit_shift": "next_token", "tie": True, "backend": "aten"},
    "teacher in host memory": {"micro_batch_size": 2, "offload": True},
    "all steps": {"micro_batch_size": 2, "states": {"selection": "all_steps"}},
    "all steps, shifted logits, one row at a time": {
        "micro_batch_size": 1,
        "states": {"selection": "all_steps", "shrink": 2},
        "logit_shift": "next_token",
    },
    "argmax fill": {"micro_batch_size": 2, "fill": "argmax"},
    "argmax fill, shifted logits, all steps": {
        "micro_batch_size": 2,
        "fill": "argmax",
        "logit_shift": "next_token",
        "states": {"selection": "all_steps"},
    },
    "random masks": {"micro_batch_size": 4, "states": {"selection": "random_mask"}},
    "tied, recompute": {"micro_batch_size": 2, "tie": True, "recompute": "full"},
}
Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("hf")
    return {
        False: make_tiny_qwen3(root / "untied", seed=1),
        True: make_tiny_qwen3(root / "tied", seed=2, tie=True),
        "teacher": make_tiny_qwen3(root / "teacher", seed=3, hidden_size=40, num_layers=1, spare_rows=5),
        "prompts": write_prompts(root / "prompts.jsonl", 9),
    }


def make_trainer(folders: dict, root: Path, case: dict):
    """A trainer whose gradients stay as they are: no clipping, no step to speak of."""
    from megatron_opdlm.training.trainer import Trainer

    config = tiny_config(
        folders[case.get("tie", False)],
        teacher=folders["teacher"],
        backend=case.get("backend", "dense"),
        transformer=case.get("transformer"),
        rollout=RolloutConfig(
            max_new_tokens=12,
            dynamic_threshold=0.12,
            stop_token_ids=[5],
            logit_shift=case.get("logit_shift", "none"),
        ),
        divergence=DivergenceConfig(chunk_size=5),
        data=DataConfig(train_files=[str(folders["prompts"])]),
        optimizer=OptimizerConfig(lr=1e-12, min_lr=0.0, clip_grad=0.0),
        training=TrainingConfig(
            num_prompts_per_step=4,
            global_batch_size=4,
            micro_batch_size=case["micro_batch_size"],
            pad_to_multiple=16,
            recompute=case.get("recompute", "none"),
        ),
        logging=LoggingConfig(directory=str(root / "run")),
    )
    teacher = dataclasses.replace(config.teacher, offload=case.get("offload", False), fill=case.get("fill", "terminal"))
    states = StatesConfig(**case.get("states", {}))
    return Trainer(dataclasses.replace(config, teacher=teacher, states=states))


def roll_out_states(trainer):
    tasks = trainer._tasks(trainer.prompt_stream.next_batch(), 12)
    return trainer.objective.select_states(trainer.engine.generate(tasks, trainer.step), trainer.step)


def megatron_gradients(trainer, states) -> tuple[Gradients, dict[str, float]]:
    """By the names of Hugging Face's tensors; and what the step reports."""
    from megatron_opdlm.checkpointing.hf_qwen3 import LAYER, hf_tensors

    (micro_batches,) = trainer._global_batches(states)
    sums = trainer.train_step(micro_batches)
    by_name = {name: parameter.main_grad.clone() for name, parameter in trainer.student.model.named_parameters()}
    parameter_of_key = {key: parameter for parameter, (key, _) in LAYER.items()}

    def read(key: str, layer: int | None) -> torch.Tensor:
        return by_name[key if layer is None else f"decoder.layers.{layer}.{parameter_of_key[key]}"]

    return dict(hf_tensors(trainer.source.architecture, read)), sums


def literal_gradients(
    student, teacher, states, special, logit_shift: str = "none", fill: str = "terminal"
) -> tuple[Gradients, float]:
    """Mean over trajectories of the mean over trained positions of KL(teacher || student), mask token left out."""
    teacher_BTV = teacher(input_ids=states.clean_ids_BT).logits.detach()
    clean_BTV, noisy_BTV = two_stream_logits(student, states.clean_ids_BT, states.noisy_ids_BT, states.lengths_B, 4)
    num_tokens = min(teacher_BTV.shape[-1], noisy_BTV.shape[-1])
    live = [token for token in range(num_tokens) if token != special.mask_token_id]
    by_trajectory: list[list[torch.Tensor]] = []
    for row, is_trained_T in enumerate(states.is_trained_BT):
        if states.is_first_row_B[row]:
            by_trajectory.append([])
        for position in is_trained_T.nonzero()[:, 0].tolist():
            log_p = teacher_BTV[row, position - 1, live].log_softmax(0)
            if fill == "argmax":
                before = filled_before(states, row, position, clean_BTV, noisy_BTV, live, logit_shift)
                log_p = teacher(input_ids=before[None]).logits[0, -1, live].log_softmax(0).detach()
            shift = 1 if logit_shift == "next_token" else 0
            student_BTV = clean_BTV if shift and position % 4 == 0 else noisy_BTV
            log_q = student_BTV[row, position - shift, live].log_softmax(0)
            by_trajectory[-1].append((log_p.exp() * (log_p - log_q)).sum())
    loss = torch.stack([torch.stack(divergences).mean() for divergences in by_trajectory]).mean()
    student.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in student.named_parameters()}, loss.item()


def filled_before(states, row, position, clean_BTV, noisy_BTV, live, logit_shift) -> torch.Tensor:
    """The clean blocks before, then what the state shows of the block, with the student's choice where it is masked."""
    ids_T, shift = states.clean_ids_BT[row, :position].clone(), 1 if logit_shift == "next_token" else 0
    for before in range(position // 4 * 4, position):
        if states.noisy_ids_BT[row, before] != ids_T[before]:
            student_BTV = clean_BTV if shift and before % 4 == 0 else noisy_BTV
            ids_T[before] = live[int(student_BTV[row, before - shift, live].argmax())]
    return ids_T


@pytest.mark.parametrize("case", CASES)
def test_defect_1_gradients_equal_autograd_through_transformers_with_and_without_recompute(
    folders, world_of_one, tmp_path, case
):
    with layout(ParallelConfig()):
        trainer = make_trainer(folders, tmp_path, CASES[case])
        states = roll_out_states(trainer)
        actual, sums = megatron_gradients(trainer, states)
    student = load_reference(folders[CASES[case].get("tie", False)])
    teacher, shift = load_reference(folders["teacher"]), CASES[case].get("logit_shift", "none")
    fill = CASES[case].get("fill", "terminal")
    expected, loss = literal_gradients(student, teacher, states, trainer.special, shift, fill)
    assert len(states.lengths_B.unique()) > 1, "padding is needed"
    assert states.num_trained_by_trajectory_B.min() > 0, "and something to train"
    selection = StatesConfig(**CASES[case].get("states", {}))
    assert states.num_rows == 4 * (4 // selection.shrink if selection.selection == "all_steps" else 1)
    assert sums["loss"] / sums["loss_count"] == pytest.approx(loss, rel=1e-5)
    norm = sum(float(gradient.square().sum()) for gradient in expected.values()) ** 0.5
    assert sums["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


class CausalStudent:
    """A student that ignores the mask it is given, as one does that sees the teacher's."""

    def __init__(self, model) -> None:
        self.model, self.dtype = model, model.dtype
        self.zero_grad, self.named_parameters = model.zero_grad, model.named_parameters

    def __call__(self, *, input_ids, attention_mask, position_ids):
        return self.model(input_ids=input_ids, position_ids=position_ids)


def test_defect_1_the_comparison_sees_a_student_under_the_teachers_mask(folders, world_of_one, tmp_path):
    with layout(ParallelConfig()):
        trainer = make_trainer(folders, tmp_path, CASES["all rows at once"])
        states = roll_out_states(trainer)
        actual, _ = megatron_gradients(trainer, states)
    student = CausalStudent(load_reference(folders[False]))
    wrong, _ = literal_gradients(student, load_reference(folders["teacher"]), states, trainer.special)
    errors = [float((actual[name] - gradient).norm() / gradient.norm()) for name, gradient in wrong.items()]
    assert max(errors) > 0.01
