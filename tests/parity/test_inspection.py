"""What a run says about its kept rollouts, against `transformers` in float64, full logits and plain formulas.

Confidence, divergence, and what the teacher gives to each token and to its favourites are all those of the state in
which the token was committed, which is built here position by position from the step map.
"""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from megatron_opdlm.config.schema import (
    DataConfig,
    DivergenceConfig,
    LoggingConfig,
    ObjectiveConfig,
    ParallelConfig,
    RolloutConfig,
    TrainingConfig,
)
from megatron_opdlm.observability.trajectories import KeptTrajectory, read_trajectories
from tests.references import load_reference, masked_logits, two_stream_logits
from tests.tiny_qwen3 import make_tiny_qwen3, write_prompts
from tests.worlds import layout, run_trainer, tiny_config

SETTINGS = {
    "one step or several": {"rollout": {"dynamic_threshold": 0.12, "stop_token_ids": [5]}},
    "three steps a block of eight, shifted logits": {
        "rollout": {"block_size": 8, "denoising_steps_per_block": 3, "logit_shift": "next_token"}
    },
    "bucket of a filtered target": {"divergence": {"top_k": 6, "top_k_tail": "bucket", "teacher_temperature": 1.5}},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("inspection")
    make_tiny_qwen3(root / "student", seed=1)
    make_tiny_qwen3(root / "teacher", seed=3, hidden_size=40, num_layers=1, spare_rows=5)
    write_prompts(root / "prompts.jsonl", 8)
    return root


def configuration(root, run, *, rollout=None, divergence=None, logging=None, **sections):
    return tiny_config(
        root / "student",
        teacher=root / "teacher",
        rollout=RolloutConfig(max_new_tokens=16, **(rollout or {})),
        divergence=DivergenceConfig(chunk_size=5, **(divergence or {})),
        data=DataConfig(train_files=[str(root / "prompts.jsonl")]),
        training=TrainingConfig(
            max_steps=3, num_prompts_per_step=4, global_batch_size=4, micro_batch_size=2, pad_to_multiple=8
        ),
        logging=LoggingConfig(directory=str(root / run), tensorboard=False, progress_bar=False, **(logging or {})),
        **sections,
    )


@torch.no_grad()
def recomputed(root, sequence: KeptTrajectory, mask_token_id: int, settings: RolloutConfig):
    """Position in the response -> the student's and the teacher's log-probabilities [V] there, in float64."""
    student, teacher = load_reference(root / "student"), load_reference(root / "teacher")
    num_prompt, size = len(sequence.prompt_ids), settings.block_size
    clean_T = torch.tensor(sequence.prompt_ids + sequence.token_ids)
    steps_T = torch.tensor([0] * num_prompt + sequence.step_map)
    num_tokens = len(clean_T)
    causal = torch.ones(1, num_tokens, num_tokens, dtype=torch.bool).tril()
    teacher_TV = masked_logits(teacher, clean_T[None], torch.arange(num_tokens), causal)[0]
    found = {}
    for place in range(sequence.response_length):
        position = num_prompt + place
        noisy_T = clean_T.masked_fill(steps_T >= steps_T[position], mask_token_id)
        streams = two_stream_logits(student, clean_T[None], noisy_T[None], torch.tensor([num_tokens]), size)
        clean_TV, noisy_TV = (stream[0] for stream in streams)
        if settings.logit_shift == "none":
            student_V = noisy_TV[position]
        else:
            student_V = (clean_TV if position % size == 0 else noisy_TV)[position - 1]
        rows = [student_V, teacher_TV[position - 1]]  # the teacher has a few more, which take no part
        found[place] = [live_log_probs(row, mask_token_id, min(map(len, rows))) for row in rows]
    return found


def live_log_probs(logits_V: torch.Tensor, mask_token_id: int, vocab_size: int) -> torch.Tensor:
    logits_V = logits_V[:vocab_size].clone()
    logits_V[mask_token_id] = -torch.inf
    return logits_V.log_softmax(0)


def divergence_of(log_q_V: torch.Tensor, log_p_V: torch.Tensor, settings: DivergenceConfig) -> float:
    """Forward KL over all tokens, or over the teacher's k favourites and one outcome for all others."""
    chosen = log_p_V.topk(settings.top_k).indices if settings.top_k else log_p_V.isfinite().nonzero().flatten()
    p, q = (log_p_V / settings.teacher_temperature).softmax(0), log_q_V.exp()
    terms = [float(p[token] * (p[token] / q[token]).log()) for token in chosen]
    if settings.top_k:
        rest_p, rest_q = 1 - float(p[chosen].sum()), 1 - float(q[chosen].sum())
        terms.append(rest_p * math.log(rest_p / rest_q))
    return sum(terms)


@pytest.mark.parametrize("case", SETTINGS)
def test_kept_figures_equal_a_recomputation_in_float64(root, world_of_one, case):
    from megatron_opdlm.training.trainer import Trainer

    config = configuration(root, case.replace(" ", "_"), **SETTINGS[case])
    (root / case.replace(" ", "_")).mkdir()
    with layout(ParallelConfig()):
        trainer = Trainer(config)
        mask_token_id = trainer.special.mask_token_id
        trainer.kept_trajectories.begin(0)
        tasks = trainer._tasks(trainer.prompt_stream.next_batch(), 16)
        trainer.kept_trajectories.keep(0, trainer.engine.generate(tasks, 0))
    kept = read_trajectories(root / case.replace(" ", "_") / "trajectories.jsonl")
    assert len(kept) == 2 and len({step for sequence in kept for step in sequence.step_map}) > 1
    for sequence in kept:
        for place, (log_q_V, log_p_V) in recomputed(root, sequence, mask_token_id, config.rollout).items():
            token = sequence.token_ids[place]
            assert sequence.log_probs[place] == pytest.approx(float(log_q_V[token]), abs=1e-4)
            assert sequence.teacher_log_probs[place] == pytest.approx(float(log_p_V[token]), abs=1e-4)
            expected = divergence_of(log_q_V, log_p_V, config.divergence)
            assert sequence.divergence[place] == pytest.approx(expected, abs=1e-4)
            top = log_p_V.topk(5)
            assert [token for token, _ in sequence.alternatives[place]] == top.indices.tolist()
            assert [value for _, value in sequence.alternatives[place]] == pytest.approx(top.values.tolist(), abs=1e-4)
        behind = slice(sequence.response_length, None)
        assert not any(sequence.alternatives[behind]) and set(sequence.divergence[behind]) <= {None}


def test_a_run_keeps_every_so_many_steps_and_the_last_and_trains_the_same_without(root, world_of_one):
    runs = {"on": {"trajectory_interval": 3, "num_trajectories": 1}, "off": {"trajectory_interval": 0}}
    with layout(ParallelConfig()):
        metrics = {run: run_trainer(configuration(root, run, logging=flags))[0] for run, flags in runs.items()}
    kept = read_trajectories(root / "on" / "trajectories.jsonl")
    assert [sequence.step for sequence in kept] == [0, 2]
    assert not (root / "off" / "trajectories.jsonl").exists()
    losses = {run: [step["train/loss"] for step in steps] for run, steps in metrics.items()}
    assert losses["on"] == losses["off"]


def test_objectives_without_rollouts_keep_nothing(root, world_of_one):
    rows = [{"question": f"{i}+1=", "response": f"{i + 1}"} for i in range(8)]
    (root / "answered.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = configuration(root, "sft", objective=ObjectiveConfig(name="sft", preset="sdar"))
    config = dataclasses.replace(config, data=DataConfig(train_files=[str(root / "answered.jsonl")]))
    with layout(ParallelConfig()):
        run_trainer(config)
    assert not (root / "sft" / "trajectories.jsonl").exists()
