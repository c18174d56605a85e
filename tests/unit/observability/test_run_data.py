"""What the report takes from a run directory: the very numbers that stand there."""

from __future__ import annotations

import itertools
import json
import math

import pytest

from megatron_opdlm.config.load import save_config
from megatron_opdlm.config.schema import Config, DivergenceConfig
from megatron_opdlm.observability.run_data import (
    MOST_SEQUENCES,
    MOST_TOKENS,
    accuracy_points,
    curves,
    page_trajectories,
    phase_seconds,
    read_run,
    warnings,
)
from megatron_opdlm.observability.trajectories import TrajectoryWriter
from tests.kept_sequences import SEQUENCE, kept


def write_lines(path, records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_curves_have_the_numbers_of_the_metrics_file(tmp_path):
    values = [0.1 + 0.2, 1 / 3, None, 1e-17]
    records = [{"step": 2 * i, "train/loss": value, "other/thing": 1.0} for i, value in enumerate(values)]
    records[1]["train/grad_norm"] = 7.5
    write_lines(tmp_path / "metrics.jsonl", records)
    loss, norm = curves(read_run(tmp_path).records)
    assert (loss.title, loss.steps, norm.steps, norm.values) == ("Loss", [0, 2, 4, 6], [2], [7.5])
    assert loss.values[:2] == values[:2] and math.isnan(loss.values[2]) and loss.values[3] == values[3]


def test_phases_have_their_seconds_and_zero_where_a_step_has_them_not(tmp_path):
    records = [
        {"step": 0, "perf/seconds_rollout": 1.5},
        {"step": 1, "perf/seconds_rollout": 1.25, "perf/seconds_evaluation": 9},
    ]
    assert phase_seconds(records) == {"rollout": [1.5, 1.25], "evaluation": [0.0, 9]}


def test_accuracy_against_speed_comes_from_training_evaluations_and_sweeps(tmp_path):
    scored = {"step": 49, "evaluation/accuracy": 0.5, "evaluation/tokens_per_step": 1.5}
    write_lines(tmp_path / "metrics.jsonl", [{"step": 48}, scored])
    content = {"heldout.jsonl": {"scores": {"accuracy": 0.75, "tokens_per_step": 2.0}, "responses": []}}
    (tmp_path / "student.json").write_text(json.dumps(content))
    (tmp_path / "summary.json").write_text(json.dumps({"accuracy": 0.9, "seconds": 3}))
    (tmp_path / "half_written.json").write_text('{"heldout.jsonl": {"sco')
    (tmp_path / "list.json").write_text("[1]")
    points = [
        {
            "rollout": {"block_size": 4, "dynamic_threshold": threshold},
            "tasks": {"heldout.jsonl": {"accuracy": a, "tokens_per_step": t}},
        }
        for threshold, a, t in ((0.9, 0.8, 2.1), (1.0, 0.85, 1.1))
    ]
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"points": points}))
    assert accuracy_points(read_run(tmp_path)) == {
        "after training steps": [(1.5, 0.5, "50")],
        "evaluations": [(2.0, 0.75, "student")],
        "blocks of 4": [(2.1, 0.8, "0.9"), (1.1, 0.85, "1")],
    }


def test_warnings_tell_skipped_steps_broken_responses_and_collapse(tmp_path):
    lengths = [100.0] * 6 + [1.0] * 20
    records = [{"step": step, "rollout/response_length": value} for step, value in enumerate(lengths)]
    records[3]["rollout/not_finite"] = 2.0
    write_lines(tmp_path / "metrics.jsonl", records)
    write_lines(tmp_path / "skipped_steps.jsonl", [{"step": 9}, {"step": 9}, {"step": 4}])
    told = warnings(read_run(tmp_path))
    assert told[:3] == [
        "Step 4: 1 optimizer step left out, loss or gradient was not finite.",
        "Step 9: 2 optimizer steps left out, loss or gradient was not finite.",
        "Step 3: 2 responses broke off at a logit that was not finite.",
    ]
    (collapse,) = told[3:]
    assert "rollout/response_length" in collapse and "ever shorter" in collapse


def test_sequences_come_with_their_order_and_the_text_of_every_token(tmp_path):
    save_config(Config(divergence=DivergenceConfig(kind="jsd")), tmp_path / "config.yaml")
    TrajectoryWriter(tmp_path / "trajectories.jsonl", 0).write([SEQUENCE])
    page = page_trajectories(read_run(tmp_path))
    (sequence,) = page["sequences"]
    assert page["divergence"] == "Jensen-Shannon divergence"
    assert sequence["order"] == SEQUENCE.commit_order and sequence["ids"] == SEQUENCE.token_ids
    assert sequence["divergence"] == SEQUENCE.divergence and sequence["logProbs"] == SEQUENCE.log_probs
    assert sequence["alternatives"] == SEQUENCE.alternatives and page["texts"] == SEQUENCE.texts


def test_a_page_takes_a_part_of_very_long_runs_and_sequences(tmp_path):
    length = MOST_TOKENS + 102
    columns = ("token_ids", "step_map", "log_probs", "divergence", "teacher_log_probs")
    long = kept(**{name: [1] * length for name in columns}, alternatives=[[]] * length, response_length=length)
    TrajectoryWriter(tmp_path / "trajectories.jsonl", 0).write([kept(step=step) for step in range(99)] + [long])
    sequences = page_trajectories(read_run(tmp_path))["sequences"]
    assert len(sequences) == MOST_SEQUENCES and sequences[0]["step"] == 0
    cut = sequences[-1]
    assert cut["counted"] == len(cut["ids"]) == len(cut["alternatives"]) == MOST_TOKENS - 2
    assert (len(cut["prompt"]) + len(cut["ids"])) % 4 == 0, "whole blocks"


def test_a_page_full_of_different_tokens_stays_below_two_megabytes(tmp_path):
    length, numbers = MOST_TOKENS, itertools.count(100_000)
    full = []
    for step in range(MOST_SEQUENCES):
        ids = [next(numbers) for _ in range(length)]
        figures = [-0.123456 - place for place in range(length)]
        alternatives = [[(next(numbers), -9.123456) for _ in range(5)] for _ in range(length)]
        texts = {str(number): " token" for number in [*ids, *(pair[0] for some in alternatives for pair in some)]}
        columns = {"log_probs": figures, "divergence": figures, "teacher_log_probs": figures, "step_map": [1] * length}
        full.append(kept(step=step, prompt_ids=ids, token_ids=ids, alternatives=alternatives, texts=texts, **columns))
    TrajectoryWriter(tmp_path / "trajectories.jsonl", 0).write(full)
    assert len(json.dumps(page_trajectories(read_run(tmp_path)), separators=(",", ":"))) < 2e6


def test_without_any_file_there_is_nothing_and_without_a_directory_an_error(tmp_path):
    run = read_run(tmp_path)
    assert (curves(run.records), accuracy_points(run), warnings(run), page_trajectories(run)) == ([], {}, [], None)
    with pytest.raises(ValueError, match="there is no run directory"):
        read_run(tmp_path / "absent")
