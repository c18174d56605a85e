"""Pipeline stages change nothing, with one chunk of layers each or several: neither teacher, rollout nor training.

Each training run is a whole `Trainer`, as in `test_train_step_invariance`; the reference is the run of one process.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from megatron_opdlm.config.schema import EvaluationConfig, ParallelConfig, RolloutConfig
from megatron_opdlm.data.prompts import Prompt
from megatron_opdlm.diffusion.trajectory import Trajectory
from tests.distributed.test_train_step_invariance import SAME_COUNTS, SAME_NUMBERS, Run, read_weights, train
from tests.ranks import run_on_ranks
from tests.tiny_qwen3 import make_tiny_qwen3, write_prompts
from tests.worlds import PIPELINE_LAYOUTS, gathered_logits, layout, load_student, load_teacher, tiny_config

REFERENCES = {tie: Run(1, "tensor parallel 1", 1, tie) for tie in (False, True)}
OTHERS = [
    Run(2, "2 stages", 2),
    Run(2, "2 stages of 2 chunks", 2, tie=True),
]
"""With a teacher of more layers than the student; the other layouts are in `test_every_layout`."""
GROUPS = {"2 stages": (None, 1, 3), "2 stages of 2 chunks": (None, 1, 3)}
"""Layout -> `rollout.pipeline_micro_groups` of six sequences."""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pipeline")
    make_tiny_qwen3(root / "untied", seed=1, num_layers=4)
    make_tiny_qwen3(root / "tied", seed=2, num_layers=4, tie=True)
    make_tiny_qwen3(root / "teacher", seed=3, num_layers=8)
    write_prompts(root / "prompts.jsonl", 20)
    return root


# --- training ---------------------------------------------------------------------------------------------------------


def train_all(rank: int, runs: list[Run], root: Path) -> dict[Run, tuple[list[dict], dict]]:
    """Metrics of each step, and this rank's trajectories by step, prompt and sample."""
    return {run: train(run, root) for run in runs}


def train_in_worlds(runs: list[Run], root: Path) -> dict[Run, list[tuple[list[dict], dict]]]:
    """What `train_all` gives, by rank."""
    results = {}
    for world_size in sorted({run.world_size for run in runs}):
        mine = [run for run in runs if run.world_size == world_size]
        by_rank = [train_all(0, mine, root)] if world_size == 1 else run_on_ranks(train_all, world_size, mine, root)
        results |= {run: [rank[run] for rank in by_rank] for run in mine}
    return results


@pytest.fixture(scope="module")
def results(root, world_of_one) -> dict[Run, list[tuple[list[dict], dict]]]:
    return train_in_worlds([*REFERENCES.values(), *OTHERS], root)


def assert_same_metrics(actual: list[dict], expected: list[dict]) -> None:
    for one, other in zip(expected, actual, strict=True):
        for name in SAME_NUMBERS:
            assert other[name] == pytest.approx(one[name], rel=1e-5, abs=1e-6), name
        for name in SAME_COUNTS:
            assert other[name] == one[name], name


def assert_same_weights(root: Path, run: Run, reference: Run) -> None:
    start = read_weights(root / ("tied" if run.tie else "untied"))
    expected, actual = exported_weights(root, reference), exported_weights(root, run)
    assert actual.keys() == expected.keys() == start.keys()
    for name, weight in expected.items():
        difference = (actual[name] - weight).norm()
        assert difference <= 1e-6 * weight.norm(), name
        assert difference <= 1e-3 * (weight - start[name]).norm(), f"{name}: relative to what training changed"


def exported_weights(root: Path, run: Run) -> dict[str, torch.Tensor]:
    """The Hugging Face tensors of a run's last checkpoint, in float64."""
    from megatron_opdlm.checkpointing.conversion import megatron_to_hf

    output = root / f"{run} exported"
    if not output.exists():
        megatron_to_hf(root / str(run) / "checkpoints", output, dtype=None)
    return read_weights(output)


@pytest.mark.parametrize("run", OTHERS, ids=str)
def test_all_stages_have_the_trajectories_of_one_process(results, run):
    expected = results[REFERENCES[run.tie]][0][1]
    parallel = PIPELINE_LAYOUTS[run.layout]
    num_copies = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    actual = [(key, line) for _, trajectories in results[run] for key, line in trajectories.items()]
    assert len(set(actual)) == len(expected) == 3 * 16 and len(actual) == num_copies * len(expected)
    for key, line in actual:
        assert_same_trajectory(line, expected[key])


@pytest.mark.parametrize("run", OTHERS, ids=str)
def test_losses_and_gradient_norms_on_all_stages_and_weights_are_those_of_one_process(results, root, run):
    for metrics, _ in results[run]:
        assert_same_metrics(metrics, results[REFERENCES[run.tie]][0][0])
    assert_same_weights(root, run, REFERENCES[run.tie])


def test_the_share_of_idle_time_is_a_metric_of_pipelines_alone(results):
    for run, by_rank in results.items():
        shares = {step.get("rollout/pipeline_bubble") for metrics, _ in by_rank for step in metrics}
        assert shares == {None} if run.world_size == 1 else all(0 < share < 1 for share in shares)


# --- forwards and rollouts --------------------------------------------------------------------------------------------


def prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 44, (length,), generator=generator).tolist() for length in (3, 11, 4, 7, 1, 16)]
    return [Prompt(prompt_id=row, token_ids=tuple(prompt)) for row, prompt in enumerate(ids)]


def generate(root: Path, parallel: ParallelConfig, num_groups: int | None) -> list[str]:
    """Trajectories as JSON."""
    from megatron_opdlm.rollout.engine import RolloutEngine, RolloutTask

    rollout = RolloutConfig(
        max_new_tokens=12, stop_token_ids=[5], dynamic_threshold=0.12, pipeline_micro_groups=num_groups
    )
    with layout(parallel) as groups:
        model, special = load_student(tiny_config(root / "untied", parallel=parallel, rollout=rollout), groups)
        engine = RolloutEngine(model, rollout, special, seed=3)
        return [t.to_json() for t in engine.generate([RolloutTask(prompt, 12) for prompt in prompts()], step=2)]


@torch.no_grad()
def teacher_logits(root: Path, parallel: ParallelConfig) -> torch.Tensor:
    ids = torch.randint(0, 44, (2, 24), generator=torch.Generator().manual_seed(4))
    with layout(parallel) as groups:
        model = load_teacher(tiny_config(root / "tied", teacher=root / "tied", parallel=parallel), groups)
        hidden = model(ids, torch.arange(24), None)
        assert (hidden is None) == (not model.is_last_stage), "the last stage alone has the output"
        return gathered_logits(model, hidden)


def teacher_logits_without_offsets(root: Path, parallel: ParallelConfig) -> torch.Tensor:
    """Every chunk takes the folder's first layers, as it would if it counted its own from 0."""
    from megatron_opdlm.models import pipeline

    whole_name, pipeline._whole_name = pipeline._whole_name, lambda chunk, name: name
    try:
        return teacher_logits(root, parallel)
    finally:
        pipeline._whole_name = whole_name


def bubble(root: Path, num_groups: int) -> float:
    """The share of idle time where a stage takes 60 ms longer for a forward than it would, whatever it reads."""
    from megatron_opdlm.models.build import Qwen3Model
    from megatron_opdlm.rollout.engine import RolloutEngine, RolloutTask

    def slow_forward(*arguments):
        time.sleep(0.06)
        return forward(*arguments)

    rollout = RolloutConfig(
        max_new_tokens=8, remasking_strategy="low_confidence_static", pipeline_micro_groups=num_groups
    )
    parallel, forward = PIPELINE_LAYOUTS["2 stages"], Qwen3Model.forward
    Qwen3Model.forward = slow_forward
    try:
        with layout(parallel) as groups:
            model, special = load_student(tiny_config(root / "untied", parallel=parallel, rollout=rollout), groups)
            engine = RolloutEngine(model, rollout, special, seed=3)
            engine.generate([RolloutTask(prompt, 8) for prompt in prompts()], step=2)
    finally:
        Qwen3Model.forward = forward
    return engine.statistics.pipeline_bubble


def evaluate(root: Path, parallel: ParallelConfig) -> dict:
    """Scores and responses of `evaluate`, without what took time."""
    from megatron_opdlm.evaluation.task_files import score_task_files

    file, entry = root / "tasks.jsonl", {"answer": "61", "metadata": {}}
    rows = [{"question": f"{n}+4=", "source": "reasoning_gym/chain_sum", "entry": entry} for n in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rollout, evaluation = RolloutConfig(max_new_tokens=8, temperature=0), EvaluationConfig(files=[str(file)])
    with layout(parallel):
        results = score_task_files(
            tiny_config(root / "untied", parallel=parallel, rollout=rollout, evaluation=evaluation)
        )
    return {name: value for name, value in results[str(file)].items() if name != "costs"}


def every_layout(rank: int, root: Path) -> dict:
    results = {"wrong": teacher_logits_without_offsets(root, PIPELINE_LAYOUTS["2 stages"])}
    results["bubbles"] = [bubble(root, num_groups) for num_groups in (1, 2)]
    for name, group_counts in GROUPS.items():
        results[name] = teacher_logits(root, PIPELINE_LAYOUTS[name])
        results[name, "evaluation"] = evaluate(root, PIPELINE_LAYOUTS[name])
        results |= {(name, count): generate(root, PIPELINE_LAYOUTS[name], count) for count in group_counts}
    return results


@pytest.fixture(scope="module")
def two_stages(root) -> list[dict]:
    return run_on_ranks(every_layout, 2, root)


def assert_same_trajectory(line: str, expected_line: str) -> None:
    actual, expected = Trajectory.from_json(line), Trajectory.from_json(expected_line)
    assert actual.terminal_ids_T.equal(expected.terminal_ids_T)
    assert actual.step_map_R.equal(expected.step_map_R)
    assert (actual.log_probs_R - expected.log_probs_R).abs().max() <= 1e-4
    assert (actual.prompt_id, actual.stop_reason) == (expected.prompt_id, expected.stop_reason)


@pytest.mark.parametrize("name", GROUPS)
def test_the_last_stage_has_the_logits_of_the_whole_teacher(root, world_of_one, two_stages, name):
    expected = teacher_logits(root, ParallelConfig())
    for stage in two_stages:
        assert (stage[name] - expected).abs().max() <= 1e-5
        assert (stage["wrong"] - expected).abs().max() > 0.1, "layers in the wrong place would show"


@pytest.mark.parametrize(("name", "count"), [(name, count) for name, counts in GROUPS.items() for count in counts])
def test_groups_that_take_turns_decode_what_one_process_decodes(root, world_of_one, two_stages, name, count):
    expected = generate(root, ParallelConfig(), None)
    first, last = (stage[name, count] for stage in two_stages)
    assert first == last, "all stages have the same trajectories, to the bit"
    for actual, one in zip(last, expected, strict=True):
        assert_same_trajectory(actual, one)


@pytest.mark.parametrize("name", GROUPS)
def test_evaluation_has_the_same_responses_and_scores_on_all_stages(root, world_of_one, two_stages, name):
    expected = evaluate(root, ParallelConfig())
    assert len(expected["responses"]) == 3
    assert all(stage[name, "evaluation"] == expected for stage in two_stages)


def test_two_groups_fill_the_time_in_which_one_would_wait_for_the_other_stage(two_stages):
    for stage in two_stages:
        of_one_group, of_two_groups = stage["bubbles"]
        assert of_one_group > 0.35, "with one group in flight one of two stages waits"
        assert of_two_groups < 0.6 * of_one_group
