"""Where the experts of a mixture lie changes nothing: neither rollout nor training.

Each training run is a whole `Trainer`, as in `test_train_step_invariance`; the reference is the run of one process.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_opdlm.config.schema import ParallelConfig, RolloutConfig
from megatron_opdlm.data.prompts import Prompt
from tests.distributed.test_pipeline import (
    assert_same_metrics,
    assert_same_trajectory,
    assert_same_weights,
    train_in_worlds,
)
from tests.distributed.test_train_step_invariance import Run
from tests.ranks import run_on_ranks
from tests.tiny_moe import make_tiny_moe
from tests.tiny_qwen3 import write_prompts
from tests.worlds import EXPERT_LAYOUTS, layout, load_student, tiny_config

REFERENCE = Run(1, "tensor parallel 1", 1)
OTHERS = [Run(4, "experts over 2", 1), Run(4, "experts over 4", 2)]
"""With a teacher whose router's probabilities do not sum to one; the other layouts are in `test_every_layout`."""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("experts")
    make_tiny_moe(root / "untied", seed=1)
    make_tiny_moe(root / "teacher", seed=3, norm_topk_prob=False)
    write_prompts(root / "prompts.jsonl", 20)
    return root


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(root, world_of_one) -> dict[Run, list[tuple[list[dict], dict]]]:
    return train_in_worlds([REFERENCE, *OTHERS], root)


@pytest.mark.parametrize("run", OTHERS, ids=str)
def test_trajectories_are_those_of_one_process(results, run):
    expected = results[REFERENCE][0][1]
    actual = [(key, line) for _, trajectories in results[run] for key, line in trajectories.items()]
    assert {key for key, _ in actual} == expected.keys() and len(expected) == 3 * 16
    for key, line in actual:
        assert_same_trajectory(line, expected[key])


@pytest.mark.parametrize("run", OTHERS, ids=str)
def test_losses_gradient_norms_expert_loads_and_weights_are_those_of_one_process(results, root, run):
    expected = results[REFERENCE][0][0]
    for metrics, _ in results[run]:
        assert_same_metrics(metrics, expected)
        for step, expected_step in zip(metrics, expected, strict=True):
            assert step["moe/max_expert_load"] == pytest.approx(expected_step["moe/max_expert_load"], rel=1e-9)
    assert_same_weights(root, run, REFERENCE)


# --- rollout ----------------------------------------------------------------------------------------------------------

SHARES = {"one rank has nothing to do": (0, 6), "both have long and short responses": (2, 4)}
"""Prompts of the first and of the second data-parallel rank."""


def prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 44, (length,), generator=generator).tolist() for length in (3, 11, 4, 7, 1, 16)]
    return [Prompt(prompt_id=row, token_ids=tuple(prompt)) for row, prompt in enumerate(ids)]


def generate(root: Path, parallel: ParallelConfig, share: tuple[int, int] | None) -> tuple[list[str], int]:
    """This rank's trajectories as JSON, and how many forwards it took for them; responses differ in length."""
    from megatron_opdlm.rollout.engine import RolloutEngine, RolloutTask

    rollout = RolloutConfig(max_new_tokens=20, stop_token_ids=[5], dynamic_threshold=0.12, batch_size=4)
    with layout(parallel) as groups:
        model, special = load_student(tiny_config(root / "untied", parallel=parallel, rollout=rollout), groups)
        engine = RolloutEngine(model, rollout, special, seed=3)
        tasks = [RolloutTask(prompt, 4 + 3 * prompt.prompt_id) for prompt in prompts()]
        if share is not None:
            tasks = tasks[: share[0]] if groups.dp.rank() == 0 else tasks[share[0] :]
        return [t.to_json() for t in engine.generate(tasks, step=2)], engine.statistics.num_forwards


def every_share(rank: int, root: Path, name: str) -> dict[str, tuple[list[str], int]]:
    return {case: generate(root, EXPERT_LAYOUTS[name], share) for case, share in SHARES.items()}


@pytest.fixture(scope="module")
def shares(root) -> dict[str, list[dict]]:
    names = {"experts over 2": 2, "2 stages, experts over 2": 4}
    return {name: run_on_ranks(every_share, size, root, name) for name, size in names.items()}


@pytest.mark.parametrize("case", SHARES)
@pytest.mark.parametrize("name", ["experts over 2", "2 stages, experts over 2"])
def test_ranks_that_share_experts_decode_unlike_numbers_of_prompts(root, world_of_one, shares, name, case):
    expected, _ = generate(root, ParallelConfig(), None)
    by_rank = [rank[case] for rank in shares[name]][:2]  # the last ones are the second stage
    actual = [line for lines, _ in by_rank for line in lines]
    for line, one in zip(actual, expected, strict=True):
        assert_same_trajectory(line, one)
    assert by_rank[0][1] < by_rank[1][1], "the first rank must need its company"
