"""The gradient of a supervised step against a literal one: `transformers` in float64, full logits, autograd.

Checked at once: the states that the step trains in (of LIFT, after the student's own scores chose them), the forward,
the chunked cross-entropy, the split into micro-batches, the normaliser.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_opdlm.config.schema import (
    DataConfig,
    DivergenceConfig,
    LoggingConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    TrainingConfig,
)
from tests.parity.test_gradients import megatron_gradients
from tests.references import load_reference, two_stream_logits
from tests.tiny_qwen3 import make_tiny_qwen3, write_answered_prompts
from tests.unit.diffusion.test_lift_masks import kept_slowly
from tests.worlds import layout, tiny_config

CASES = {
    "sdar": {"objective": {"name": "sft", "preset": "sdar"}, "divisor": "tokens"},
    "fast_dllm_v2": {
        "objective": {"name": "sft", "preset": "fast_dllm_v2"},
        "logit_shift": "next_token",
        "divisor": "masked",
    },
    "each response by itself": {
        "objective": {"name": "sft", "normaliser": "response", "loss_weight": "1/t", "noise_low": 0.2},
        "divisor": "response",
    },
    "lift": {"objective": {"name": "lift", "normaliser": "masked"}, "divisor": "masked"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("supervised")
    make_tiny_qwen3(root / "hf", seed=1)
    write_answered_prompts(root / "rows.jsonl", 4)
    return root


def make_trainer(root: Path, run: Path, case: dict, micro_batch_size: int = 2):
    """No step to speak of, and no teacher: its folder does not exist."""
    from megatron_opdlm.training.trainer import Trainer

    config = tiny_config(
        root / "hf",
        teacher=root / "no such teacher",
        rollout=RolloutConfig(logit_shift=case.get("logit_shift", "none")),
        objective=ObjectiveConfig(**case["objective"]),
        divergence=DivergenceConfig(chunk_size=5),
        data=DataConfig(train_files=[str(root / "rows.jsonl")]),
        optimizer=OptimizerConfig(lr=1e-12, min_lr=0.0, clip_grad=0.0),
        training=TrainingConfig(
            num_prompts_per_step=4, global_batch_size=4, micro_batch_size=micro_batch_size, pad_to_multiple=16
        ),
        logging=LoggingConfig(directory=str(run)),
    )
    return Trainer(config)


def log_probs(student, states, special, logit_shift: str) -> torch.Tensor:
    """Of the clean tokens at all positions, float64 [B, T]; the mask token takes no part."""
    clean_BTV, noisy_BTV = two_stream_logits(student, states.clean_ids_BT, states.noisy_ids_BT, states.lengths_B, 4)
    if logit_shift == "next_token":
        starts_block_T = torch.arange(clean_BTV.shape[1]) % 4 == 0
        outputs_BTV = torch.where(starts_block_T[:, None], clean_BTV.roll(1, dims=1), noisy_BTV.roll(1, dims=1))
    else:
        outputs_BTV = noisy_BTV
    is_dead_V = torch.arange(outputs_BTV.shape[-1]) == special.mask_token_id
    outputs_BTV = outputs_BTV.masked_fill(is_dead_V, -torch.inf)
    return outputs_BTV.log_softmax(-1).gather(2, states.clean_ids_BT[..., None])[..., 0]


def choose_slowly(states, log_probs_BT: torch.Tensor):
    """What LIFT keeps of a super-set, block by block: noisy ids and trained positions."""
    noisy, is_trained = states.noisy_ids_BT.clone(), states.is_trained_BT.clone()
    for row, length in enumerate(states.lengths_B.tolist()):
        for begin in range(0, length, 4):
            place = row, slice(begin, begin + 4)
            is_masked = states.is_masked_BT[place].tolist()
            if any(is_masked):
                t, share = states.noise_BT[row, begin].item(), states.kept_share_BT[row, begin].item()
                columns = log_probs_BT[place].tolist(), states.place_BT[place].tolist()
                is_kept = torch.tensor(kept_slowly(columns[0], is_masked, t, t / share - t, columns[1]))
                noisy[place] = torch.where(is_kept, noisy[place], states.clean_ids_BT[place])
                is_trained[place] &= is_kept
    return noisy, is_trained


def literal_loss(log_probs_BT, states, is_trained_BT, end_ids, divisor: str, prompt_lengths: list[int]):
    """The sum by loops over rows and positions, divided as `divisor` says."""
    total, num_tokens, num_masked = 0.0, 0, 0
    for row, is_trained_T in enumerate(is_trained_BT):
        response = states.clean_ids_BT[row, prompt_lengths[row] :].tolist()
        num_response = 1 + next(place for place, token in enumerate(response) if token in end_ids)
        of_row = 0.0
        for position in is_trained_T.nonzero()[:, 0].tolist():
            of_row = of_row - states.weights_BT[row, position].double() * log_probs_BT[row, position]
        total = total + (of_row / num_response if divisor == "response" else of_row)
        num_tokens, num_masked = num_tokens + num_response, num_masked + int(is_trained_T.sum())
    return total / {"tokens": num_tokens, "masked": num_masked, "response": len(is_trained_BT)}[divisor]


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_autograd_through_transformers(root, world_of_one, tmp_path, case):
    settings = CASES[case]
    shift = settings.get("logit_shift", "none")
    with layout(ParallelConfig()):
        trainer = make_trainer(root, tmp_path, settings)
        tasks = trainer._tasks(trainer.prompt_stream.next_batch(), 12)
        trajectories = trainer.objective.terminal_sequences(tasks, 0, None)
        states = trainer.objective.select_states(trajectories, 0)
        actual, sums = megatron_gradients(trainer, states)
    student = load_reference(root / "hf")
    is_trained_BT = states.is_trained_BT
    if case == "lift":
        scores_BT = log_probs(student, states, trainer.special, shift).detach()
        noisy_ids_BT, is_trained_BT = choose_slowly(states, scores_BT)
        assert 0 < is_trained_BT.sum() < states.is_trained_BT.sum()
        object.__setattr__(states, "noisy_ids_BT", noisy_ids_BT)
    views = trainer.objective.rows_per_response
    prompt_lengths = [trajectory.prompt_length for trajectory in trajectories for _ in range(views)]
    loss = literal_loss(
        log_probs(student, states, trainer.special, shift),
        states,
        is_trained_BT,
        trainer.special.end_token_ids,
        settings["divisor"],
        prompt_lengths,
    )
    loss.backward()
    expected = {name: parameter.grad for name, parameter in student.named_parameters()}
    assert len(states.lengths_B.unique()) > 1, "padding is needed"
    assert sums["loss"] / sums["loss_count"] == pytest.approx(loss.item(), rel=1e-5)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
