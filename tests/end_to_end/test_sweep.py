"""`evaluate` with a sweep: each point is what an evaluation of its own gives, on one process and on two."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests.end_to_end.test_validation import TASKS, solves_by_letters
from tests.ranks import run_on_ranks
from tests.tiny_qwen3 import make_tiny_qwen3
from tests.worlds import layout, remove_parallel_groups

THRESHOLDS, BLOCK_SIZES = [0.05, 0.2, 1.0], [2, 4, 8]
SWEEP = {"--evaluation.sweep.thresholds": json.dumps(THRESHOLDS), "--evaluation.sweep.block_sizes": "[2, 4, 8]"}
COSTS = ("forwards", "seconds")


def flags(root: Path, **more: object) -> list[str]:
    settings = {
        "--student.hf": root / "student",
        "--precision.dtype": "float32",
        "--rollout.max_new_tokens": 12,
        "--rollout.temperature": 0,
        "--rollout.remasking_strategy": "low_confidence_static",
        "--evaluation.files": root / "tasks.jsonl",
        "--logging.progress_bar": "false",
    }
    return [str(part) for pair in (settings | more).items() for part in pair]


def evaluate(root: Path, **more: object) -> None:
    """As the command does it, in the world of the tests."""
    from megatron_opdlm import evaluate as door
    from megatron_opdlm.config.load import load_config

    config = load_config(flags(root, **more))
    with layout(config.parallel):
        door._sweep(config, Path(config.evaluation.output))


def points_of(folder: Path) -> dict[tuple[int, float], dict]:
    """By block size and threshold the scores of the only file, without what a layout or the clock changes."""
    points = json.loads((folder / "sweep.json").read_text())["points"]
    scores = {(p["rollout"]["block_size"], p["rollout"]["dynamic_threshold"]): p["tasks"] for p in points}
    return {
        pair: {name: value for name, value in next(iter(tasks.values())).items() if name not in COSTS}
        for pair, tasks in scores.items()
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory, world_of_one) -> Path:
    root = tmp_path_factory.mktemp("sweep")
    make_tiny_qwen3(root / "student", seed=1)
    task = {"source": "reasoning_gym/chain_sum", "entry": {"answer": "7", "metadata": {}}}
    (root / "tasks.jsonl").write_text("".join(json.dumps({"question": text} | task) + "\n" for text in TASKS))
    return root


@pytest.fixture(scope="module")
def one_process(root) -> Path:
    from megatron_opdlm.evaluation import scoring

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "score_response", solves_by_letters)
        evaluate(root, **SWEEP, **{"--evaluation.output": root / "one process"})
    return root / "one process"


def test_each_point_equals_an_evaluation_of_its_own_by_a_student_built_for_it(root, one_process, monkeypatch):
    from megatron_opdlm.config.load import load_config
    from megatron_opdlm.evaluation import scoring
    from megatron_opdlm.evaluation.task_files import score_task_files

    monkeypatch.setattr(scoring, "score_response", solves_by_letters)
    points = points_of(one_process)
    assert list(points) == [(block_size, threshold) for block_size in BLOCK_SIZES for threshold in THRESHOLDS]
    for (block_size, threshold), scores in points.items():
        own = {
            "--rollout.block_size": block_size,
            "--rollout.denoising_steps_per_block": block_size,
            "--rollout.remasking_strategy": "low_confidence_dynamic",
            "--rollout.dynamic_threshold": threshold,
        }
        config = load_config(flags(root, **own))
        with layout(config.parallel):
            (alone,) = score_task_files(config).values()
        assert scores == alone["scores"]
        assert alone["rollout"] == dataclasses.asdict(config.rollout)


def test_the_points_differ_as_thresholds_and_blocks_do(one_process):
    points = points_of(one_process)
    assert len({scores["accuracy"] for scores in points.values()}) > 2
    for block_size in BLOCK_SIZES:
        speeds = [points[block_size, threshold]["tokens_per_step"] for threshold in THRESHOLDS]
        assert speeds == sorted(speeds, reverse=True) and speeds[0] > 1.5 * speeds[-1], "a stricter one is slower"


def sweep_on_rank(rank: int, root: Path) -> None:
    from megatron_opdlm.evaluation import scoring

    scoring.score_response = solves_by_letters
    evaluate(root, **SWEEP, **{"--evaluation.output": root / "two ranks"})


def test_two_data_parallel_ranks_have_the_points_of_one_process(root, one_process):
    run_on_ranks(sweep_on_rank, 2, root)
    assert points_of(root / "two ranks") == points_of(one_process)


def test_a_second_sweep_decodes_nothing_again(root, one_process, monkeypatch):
    from megatron_opdlm.rollout.engine import RolloutEngine

    before = {path.name: path.read_bytes() for path in one_process.iterdir()}
    monkeypatch.delattr(RolloutEngine, "generate_some")
    evaluate(root, **SWEEP, **{"--evaluation.output": one_process})
    assert {path.name: path.read_bytes() for path in one_process.iterdir()} == before


MISTAKES = {
    "no folder": ({}, "evaluation.sweep needs evaluation.output, a folder for its table and plot"),
    "a file": ({"--evaluation.output": "tasks.jsonl"}, "tasks.jsonl) must be a folder under evaluation.sweep, and is"),
    "nowhere": ({"--evaluation.output": "no/folder"}, "no/folder) must lie in a folder that exists"),
    "threshold": ({"--evaluation.sweep.thresholds": "[0.5,2]"}, "evaluation.sweep.thresholds (2.0) must lie between"),
    "misspelt": ({"--evaluation.sweep.blocks": "[4]"}, "--evaluation.sweep.blocks is not a setting; the nearest is"),
    "another student": (
        {"--evaluation.output": "one process", "--student.mask_token": "<|im_start|>"},
        "one process) holds a sweep with another mask_token_id (",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(root, one_process, capsys, monkeypatch, name):
    from megatron_opdlm.evaluate import main

    more, expected = MISTAKES[name]
    monkeypatch.chdir(root)
    before = sorted(root.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        main(flags(root, **SWEEP | more))
    remove_parallel_groups()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2 and len(lines) == 1 and expected in lines[0]
    assert sorted(root.rglob("*")) == before
