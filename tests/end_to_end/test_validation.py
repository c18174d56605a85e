"""Evaluation while training: it changes nothing but what it writes, and `checkpoints/best` is the best there was.

The tiny model solves no task, so the accuracies are written by hand, except where the same scores are to come out of
`evaluate` later: there a response counts as solved by a rule that some of them satisfy.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import run_on_ranks
from tests.tiny_qwen3 import make_tiny_qwen3, write_prompts
from tests.worlds import layout, no_report

NUM_STEPS = 5
TASKS = ("3+4=", "12-5=", "8+8+1=", "9-1=", "2+2=", "7+5-3=")


def flags(root: Path, run: str, **more: object) -> list[str]:
    settings = {
        "--student.hf": root / "student",
        "--teacher.hf": root / "teacher",
        "--data.train_files": root / "prompts.jsonl",
        "--precision.dtype": "float32",
        "--rollout.max_new_tokens": 8,
        "--rollout.dynamic_threshold": 0.2,
        "--optimizer.lr": 0.01,
        "--optimizer.lr_warmup_steps": 1,
        "--optimizer.lr_decay_steps": 100,
        "--training.max_steps": NUM_STEPS,
        "--training.num_prompts_per_step": 4,
        "--training.global_batch_size": 2,
        "--training.pad_to_multiple": 8,
        "--evaluation.files": root / "tasks.jsonl",
        "--checkpoint.save_interval": 0,
        "--checkpoint.keep": 1,
        "--logging.directory": root / run,
        "--logging.tensorboard": "false",
        "--logging.progress_bar": "false",
    }
    return [str(part) for pair in (settings | more).items() for part in pair]


def train(root: Path, run: str, **more: object) -> None:
    from megatron_opdlm.config.load import load_config
    from megatron_opdlm.training.trainer import Trainer

    config = load_config(flags(root, run, **more))
    with layout(config.parallel), no_report():
        Trainer(config).run()


EVERY_STEP = {"--evaluation.interval": 1}


def solves_by_letters(task: dict, text: str) -> float:
    """Half of what a random model writes is solved by this rule."""
    return float(sum(map(ord, text)) % 2)


def records(root: Path, run: str) -> list[dict]:
    return [json.loads(line) for line in (root / run / "metrics.jsonl").read_text().splitlines()]


def of_training(record: dict) -> dict:
    """Without what depends on the clock and what the evaluation says."""
    timed = ("perf/seconds", "perf/tokens_per_second", "rollout/tokens_per_second_per_rank", "rollout/idle_share")
    return {name: value for name, value in record.items() if not name.startswith((*timed, "evaluation/"))}


def best_of(root: Path, run: str) -> str:
    return (root / run / "checkpoints" / "best").resolve().name


def steps_kept(root: Path, run: str) -> list[int]:
    names = (path.name for path in (root / run / "checkpoints").iterdir())
    return sorted(int(name.removeprefix("step_")) for name in names if name != "best")


@pytest.fixture(scope="module")
def root(tmp_path_factory, world_of_one) -> Path:
    root = tmp_path_factory.mktemp("validation")
    make_tiny_qwen3(root / "student", seed=1)
    make_tiny_qwen3(root / "teacher", seed=3)
    write_prompts(root / "prompts.jsonl", 10)
    task = {"source": "reasoning_gym/chain_sum", "entry": {"answer": "7", "metadata": {}}}
    rows = [{"question": question} | task for question in TASKS]
    (root / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def accuracies(monkeypatch):
    """Lets the evaluations of a run give these accuracies, one after the other."""
    from megatron_opdlm.training import validation

    evaluate_student = validation.evaluate_student

    def give(*values: float) -> None:
        remaining = iter(values)

        def evaluate(*arguments, **keywords):
            scores, records = evaluate_student(*arguments, **keywords)
            return scores | {"accuracy": next(remaining)}, records

        monkeypatch.setattr(validation, "evaluate_student", evaluate)

    return give


def test_a_run_with_evaluations_has_the_losses_and_weights_of_one_without_to_the_bit(root):
    from megatron_opdlm.checkpointing.conversion import megatron_to_hf

    train(root, "without")
    train(root, "with", **EVERY_STEP)
    observed, undisturbed = (list(map(of_training, records(root, run))) for run in ("with", "without"))
    assert observed == undisturbed
    assert all("evaluation/accuracy" in record for record in records(root, "with"))
    assert not any("evaluation/accuracy" in record for record in records(root, "without"))
    for run in ("with", "without"):
        megatron_to_hf(root / run / "checkpoints", root / f"{run} exported", dtype=None)
    expected, actual = (load_file(root / f"{run} exported" / "model.safetensors") for run in ("without", "with"))
    assert all(torch.equal(actual[name], weight) for name, weight in expected.items())


def test_the_best_checkpoint_is_kept_beside_the_newest(root, accuracies):
    accuracies(0.25, 0.5, 0.5, 0.125, 0.375)
    train(root, "kept", **EVERY_STEP)
    assert [record["evaluation/accuracy"] for record in records(root, "kept")] == [0.25, 0.5, 0.5, 0.125, 0.375]
    assert best_of(root, "kept") == "step_00000002", "the earlier of two equal ones"
    assert steps_kept(root, "kept") == [2, NUM_STEPS]


def test_an_evaluation_is_due_every_so_many_steps_and_after_the_last(root, accuracies):
    accuracies(0.5, 0.75, 0.25)
    train(root, "every two", **{"--evaluation.interval": 2})
    steps = [record["step"] for record in records(root, "every two") if "evaluation/accuracy" in record]
    assert steps == [1, 3, 4], "steps count from 0"
    assert best_of(root, "every two") == "step_00000004"


def test_a_resumed_run_remembers_the_best_of_before(root, accuracies):
    accuracies(0.25, 0.75)
    train(root, "resumed", **EVERY_STEP | {"--training.max_steps": 2})
    train(root, "resumed", **{"--training.max_steps": 3})  # evaluates nothing, and hands on what is known
    accuracies(0.5, 0.75)
    train(root, "resumed", **EVERY_STEP)
    assert best_of(root, "resumed") == "step_00000002"
    assert steps_kept(root, "resumed") == [2, NUM_STEPS]


@pytest.mark.parametrize("moment", ["point_to_best", "remove_old_checkpoints"])
def test_a_run_that_ends_between_a_checkpoint_and_its_being_called_best_makes_up_for_it(
    root, accuracies, monkeypatch, moment
):
    from megatron_opdlm.checkpointing import train_state

    done = getattr(train_state, moment)

    def fail_at_the_third(directory: Path, *arguments) -> None:
        if (directory / "step_00000003").exists():
            raise OSError("interrupted")
        done(directory, *arguments)

    run = f"ended at {moment}"
    accuracies(0.25, 0.5, 0.75)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="could not be written: rank 0: interrupted"):
        patch.setattr(train_state, moment, fail_at_the_third)
        train(root, run, **EVERY_STEP | {"--checkpoint.async_save": "false"})
    assert best_of(root, run) == {"point_to_best": "step_00000002"}.get(moment, "step_00000003")
    accuracies(0.5, 0.25)
    train(root, run, **EVERY_STEP)
    assert best_of(root, run) == "step_00000003"
    assert steps_kept(root, run) == [3, NUM_STEPS]


def test_if_the_best_checkpoint_is_gone_the_best_is_sought_anew(root, accuracies, caplog):
    accuracies(0.75, 0.25)
    train(root, "gone", **EVERY_STEP | {"--training.max_steps": 2})
    shutil.rmtree(root / "gone" / "checkpoints" / "step_00000001")
    accuracies(0.125, 0.25, 0.125)
    train(root, "gone", **EVERY_STEP)
    assert "step_00000001 was the best and is not whole" in caplog.text
    assert best_of(root, "gone") == "step_00000004"


def test_with_other_tasks_the_best_is_sought_anew(root, accuracies, caplog):
    accuracies(0.75, 0.5)
    train(root, "other tasks", **EVERY_STEP | {"--training.max_steps": 2})
    accuracies(0.25, 0.5, 0.25)
    train(root, "other tasks", **EVERY_STEP | {"--evaluation.max_tasks": 3})
    assert "evaluation.files has other tasks than before" in caplog.text
    assert best_of(root, "other tasks") == "step_00000004"


def test_evaluate_and_convert_take_the_best_checkpoint_and_give_the_scores_it_had(root, monkeypatch):
    from megatron_opdlm.checkpointing.conversion import megatron_to_hf
    from megatron_opdlm.config.load import load_config
    from megatron_opdlm.evaluation import scoring
    from megatron_opdlm.evaluation.task_files import score_task_files

    monkeypatch.setattr(scoring, "score_response", solves_by_letters)
    train(root, "scored", **EVERY_STEP)
    by_step = {record["step"] + 1: record for record in records(root, "scored")}
    best = root / "scored" / "checkpoints" / "best"
    expected = by_step[int(best.resolve().name.removeprefix("step_"))]
    assert len({record["evaluation/accuracy"] for record in by_step.values()}) > 1
    assert expected["evaluation/accuracy"] == max(record["evaluation/accuracy"] for record in by_step.values())
    megatron_to_hf(best, root / "best exported", dtype=None)
    for student, folder in (("checkpoint", best), ("hf", root / "best exported")):
        flag_of_start, start, *others = flags(root, "scored", **{"--rollout.temperature": 0})
        assert (flag_of_start, start) == ("--student.hf", str(root / "student"))
        config = load_config([f"--student.{student}", str(folder), *others])
        with layout(config.parallel):
            (result,) = score_task_files(config).values()
        scores = {f"evaluation/{name}": value for name, value in result["scores"].items()}
        assert scores == {name: expected[name] for name in scores}


LAYOUTS: dict[str, dict[str, object]] = {
    "data parallel 2": {},
    "tensor parallel 2": {"--parallel.tensor_model_parallel_size": 2, "--parallel.sequence_parallel": "true"},
    "2 stages": {"--parallel.pipeline_model_parallel_size": 2},
}


def train_on_rank(rank: int, root: Path) -> None:
    from megatron_opdlm.evaluation import scoring

    scoring.score_response = solves_by_letters
    for name, settings in LAYOUTS.items():
        train(root, name, **EVERY_STEP | settings | {"--training.max_steps": 2})


def test_every_layout_has_the_scores_and_the_best_step_of_one_process(root, monkeypatch):
    from megatron_opdlm.evaluation import scoring

    monkeypatch.setattr(scoring, "score_response", solves_by_letters)
    train(root, "one process", **EVERY_STEP | {"--training.max_steps": 2})
    run_on_ranks(train_on_rank, 2, root)
    names = ("num_tasks", "accuracy", "standard_error", "tokens_per_step", "response_length", "end_token_fraction")
    expected = [{name: record[f"evaluation/{name}"] for name in names} for record in records(root, "one process")]
    for run in LAYOUTS:
        found = [{name: record[f"evaluation/{name}"] for name in names} for record in records(root, run)]
        assert found == expected, run
        assert os.readlink(root / run / "checkpoints" / "best") == best_of(root, "one process"), "relative"
