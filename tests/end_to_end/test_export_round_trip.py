"""A student that leaves as a Hugging Face folder and comes back goes on as if it had stayed.

An exported folder has no optimizer state and a new run counts its steps from zero. So the optimizer here keeps nothing
from step to step (no moments, a large epsilon, a constant rate), and a step's rollout depends on the weights alone
(temperature 0, every prompt, every state). What is left to differ is the student.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_moe import make_tiny_moe
from tests.tiny_qwen3 import make_tiny_qwen3, write_prompts
from tests.worlds import layout, no_report

MODELS = {"dense": make_tiny_qwen3, "mixture": make_tiny_moe}


def train(root: Path, run: str, student: Path, max_steps: int) -> dict[str, float]:
    """The metrics of the last step."""
    from megatron_opdlm.config.load import load_config
    from megatron_opdlm.training.trainer import Trainer

    settings = {
        "--student.hf": student,
        "--teacher.hf": root / "teacher",
        "--data.train_files": root / "prompts.jsonl",
        "--precision.dtype": "float32",
        "--rollout.max_new_tokens": 8,
        "--rollout.temperature": 0.0,
        "--rollout.dynamic_threshold": 0.12,
        "--states.selection": "all_steps",
        "--optimizer.lr": 1.0,
        "--optimizer.min_lr": 1.0,
        "--optimizer.lr_warmup_steps": 0,
        "--optimizer.adam_beta1": 0.0,
        "--optimizer.adam_beta2": 0.0,
        "--optimizer.adam_eps": 10.0,
        "--training.max_steps": max_steps,
        "--training.num_prompts_per_step": 4,
        "--training.global_batch_size": 4,
        "--training.pad_to_multiple": 8,
        "--checkpoint.save_interval": 1,
        "--checkpoint.keep": 0,
        "--logging.directory": root / run,
        "--logging.tensorboard": "false",
        "--logging.progress_bar": "false",
    }
    config = load_config([str(part) for pair in settings.items() for part in pair])
    with layout(config.parallel), no_report():
        Trainer(config).run()
    return json.loads((root / run / "metrics.jsonl").read_text().splitlines()[-1])


def export(root: Path, run: str, step: int, format_: str = "transformers") -> Path:
    """The folder of a step, made once."""
    from megatron_opdlm.export.hf_package import ExportOptions, export_hf

    output = root / f"{run} {step} {format_}"
    if not output.exists():
        export_hf(root / run / "checkpoints" / f"step_{step:08d}", output, ExportOptions(format=format_))
    return output


@pytest.fixture(scope="module", params=MODELS)
def stayed(request, tmp_path_factory, world_of_one) -> tuple[Path, dict[str, float]]:
    """Two steps of one run, and the metrics of the second. The embeddings are not tied."""
    root = tmp_path_factory.mktemp("round_trip")
    make = MODELS[request.param]
    make(root / "student", seed=1)
    make(root / "teacher", seed=3)
    write_prompts(root / "prompts.jsonl", 4)
    return root, train(root, "stayed", root / "student", 2)


@pytest.mark.parametrize("format_", ["transformers", "sdar"])
def test_one_more_step_after_export_and_import_equals_never_having_left(stayed, format_):
    root, expected = stayed
    run = f"left as {format_}"
    actual = train(root, run, export(root, "stayed", 1, format_), 1)
    for name in ("train/loss", "train/grad_norm", "rollout/tokens_per_step", "rollout/response_length"):
        assert actual[name] == pytest.approx(expected[name], rel=1e-5), name
    exported = export(root, run, 1), export(root, "stayed", 2), export(root, "stayed", 1)
    left, remained, before = (load_file(folder / "model.safetensors") for folder in exported)
    assert left.keys() == remained.keys() == before.keys()
    mask_id = json.loads((exported[0] / "config.json").read_text())["mask_token_id"]
    if format_ == "sdar":  # whose output matrix does not say the mask token; no loss and no rollout reads that row
        left["lm_head.weight"][mask_id] = remained["lm_head.weight"][mask_id]
    moved = max((remained[name] - before[name]).abs().max() for name in before)
    apart = max((remained[name] - left[name]).abs().max() for name in before)
    assert moved > 1e-3, "a step must change the weights"
    assert apart < 1e-6


def test_the_card_of_an_exported_checkpoint_tells_of_its_training(stayed):
    root, metrics = stayed
    folder = root / "card"
    from megatron_opdlm.export.hf_package import ExportOptions, export_hf

    export_hf(root / "stayed" / "checkpoints", folder, ExportOptions())
    card = (folder / "README.md").read_text()
    assert "# student, trained for 2 steps" in card and "| teacher | teacher |" in card
    assert f"| response tokens | {metrics['rollout/total_tokens']:,.0f} |" in card
    assert f"| FLOPs, paper's account | {metrics['perf/total_paper_flops']:.3g} |" in card
    assert str(root) not in card


def test_the_training_is_told_up_to_the_checkpoint_alone(stayed):
    from megatron_opdlm.export.run_record import read_run

    root, _ = stayed
    first, second = (json.loads(line) for line in (root / "stayed" / "metrics.jsonl").read_text().splitlines())
    run = read_run(root / "stayed" / "checkpoints" / "step_00000001")
    assert (run.step, run.metrics) == (1, first)
    assert run.trained_tokens == first["train/trained_tokens"] > 0
    run = read_run(root / "stayed" / "checkpoints" / "step_00000002")
    assert run.trained_tokens == first["train/trained_tokens"] + second["train/trained_tokens"]


def test_scores_are_those_of_this_very_checkpoint(stayed):
    from megatron_opdlm.export.run_record import read_run

    root, _ = stayed
    decoding = {
        "remasking_strategy": "low_confidence_dynamic",
        "dynamic_threshold": 0.9,
        "denoising_steps_per_block": 4,
        "block_size": 4,
        "temperature": 0.0,
    }
    task = {"scores": {"accuracy,none": {"mean": 0.25, "stderr": None}}, "decoding": decoding}
    folder = root / "stayed" / "checkpoints" / "step_00000002"
    results = {"model": {"role": "student", "folder": str(folder)}, "tasks": {"opdlm_gsm8k": task}}
    (root / "stayed" / "evaluation").mkdir()
    (root / "stayed" / "evaluation" / "results.json").write_text(json.dumps(results))
    (score,) = read_run(folder).scores
    assert (score.task, score.metric, score.value) == ("opdlm_gsm8k", "accuracy", 0.25)
    assert score.decoding == "low_confidence_dynamic 0.9, 4 steps for 4, temperature 0"
    assert read_run(folder.with_name("step_00000001")).scores == []


def test_weights_move_between_the_two_steps_in_both_runs(stayed):
    """The comparison above could not fail if the second step did nothing to most of the tensors."""
    root, _ = stayed
    before, after = (load_file(export(root, "stayed", step) / "model.safetensors") for step in (1, 2))
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) > 0.8 * len(before)
