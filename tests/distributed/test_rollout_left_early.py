"""A rollout that one rank is told to leave: all ranks leave it, and the engine decodes as before afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_opdlm.config.schema import ParallelConfig, RolloutConfig
from tests.distributed.test_rollout_invariance import prompts
from tests.ranks import run_on_ranks
from tests.tiny_moe import make_tiny_moe
from tests.tiny_qwen3 import make_tiny_qwen3
from tests.worlds import EXPERT_LAYOUTS, LAYOUTS, PIPELINE_LAYOUTS, layout, load_student, tiny_config

CASES = {
    "data parallel 2": LAYOUTS["tensor parallel 1"],
    "tensor parallel 2": LAYOUTS["tensor parallel 2"],
    "2 stages": PIPELINE_LAYOUTS["2 stages"],
    "experts over 2": EXPERT_LAYOUTS["experts over 2"],
}
ROUNDS = 3


def leave_and_repeat(rank: int, folder: Path, parallel: ParallelConfig, batch_size: int) -> tuple[int, list, list]:
    """Forwards until the rollout was left, what it left, and what the engine decodes in all later."""
    from megatron_opdlm.rollout import generation
    from megatron_opdlm.rollout.engine import RolloutEngine, RolloutTask

    generation.ROUNDS_BETWEEN_DEALS = generation.ROUNDS_BETWEEN_QUESTIONS = ROUNDS
    rollout = RolloutConfig(max_new_tokens=40, batch_size=batch_size, remasking_strategy="low_confidence_static")
    answers = iter([False, rank == 1])  # to the questions of the first rollout
    with layout(parallel) as groups:
        model, special = load_student(tiny_config(folder, parallel=parallel, rollout=rollout), groups)
        stop = lambda: next(answers, False)  # noqa: E731
        engine = RolloutEngine(model, rollout, special, seed=3, groups=groups, should_stop=stop)
        tasks = [RolloutTask(prompt, 40) for prompt in prompts()]
        left = [t.prompt_id for t in engine.generate(tasks, step=2)]
        num_forwards = engine.statistics.num_forwards
        again = [t.prompt_id for t in engine.generate(tasks, step=2)]
        assert again == engine.share([prompt.prompt_id for prompt in prompts()])
        return num_forwards, left, again


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[bool, Path]:
    """Of a dense model, and of a mixture of experts."""
    root = tmp_path_factory.mktemp("left early")
    return {False: make_tiny_qwen3(root / "dense", seed=5), True: make_tiny_moe(root / "mixture", seed=5)}


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_leave_a_rollout_that_one_is_told_to_leave(folders, name):
    arguments = folders[name.startswith("experts")], CASES[name], 1
    (first, left, _), (second, left_by_second, _) = run_on_ranks(leave_and_repeat, 2, *arguments)
    assert left == left_by_second == [] and first == second
    assert first == 2 * ROUNDS * (2 if name == "2 stages" else 1), "two stages decode two groups of sequences in turns"
