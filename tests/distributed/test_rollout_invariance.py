"""What a prompt yields does not depend on how the rollout is spread over ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_opdlm.config.schema import ParallelConfig, RolloutConfig
from megatron_opdlm.data.prompts import Prompt
from megatron_opdlm.diffusion.trajectory import Trajectory
from tests.ranks import run_on_ranks
from tests.tiny_qwen3 import make_tiny_qwen3
from tests.worlds import LAYOUTS, layout, load_student, tiny_config

SETTINGS = {
    "static": {"remasking_strategy": "low_confidence_static"},
    "dynamic": {"dynamic_threshold": 0.12},
    "dynamic, 3 steps for 8": {"dynamic_threshold": 0.12, "block_size": 8, "denoising_steps_per_block": 3},
    "shifted logits": {"dynamic_threshold": 0.12, "logit_shift": "next_token"},
    "top-k and top-p": {"dynamic_threshold": 0.12, "top_k": 12, "top_p": 0.8},
    "entropy-bounded, top-p": {"remasking_strategy": "entropy_bounded", "entropy_bound": 6.0, "top_p": 0.7},
}


def prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 44, (length,), generator=generator).tolist() for length in (3, 11, 4, 7, 1, 16)]
    return [Prompt(prompt_id=row, token_ids=tuple(prompt)) for row, prompt in enumerate(ids)]


def generate(folder: Path, parallel: ParallelConfig, settings: dict) -> list[str]:
    """Trajectories of this data-parallel rank's prompts as JSON, whoever decoded them."""
    from megatron_opdlm.rollout.engine import RolloutEngine, RolloutTask

    rollout = RolloutConfig(max_new_tokens=12, stop_token_ids=[5], batch_size=2, **settings)
    with layout(parallel) as groups:
        model, special = load_student(tiny_config(folder, parallel=parallel, rollout=rollout), groups)
        engine = RolloutEngine(model, rollout, special, seed=3, groups=groups)
        trajectories = engine.generate([RolloutTask(prompt, 12) for prompt in prompts()], step=2)
        assert [t.prompt_id for t in trajectories] == engine.share([prompt.prompt_id for prompt in prompts()])
        return [t.to_json() for t in trajectories]


def every_case(rank: int, folder: Path) -> dict[tuple[str, str], list[str]]:
    return {(name, case): generate(folder, LAYOUTS[name], SETTINGS[case]) for name in LAYOUTS for case in SETTINGS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_tiny_qwen3(tmp_path_factory.mktemp("hf"), seed=5)


@pytest.fixture(scope="module")
def two_ranks(folder) -> list[dict]:
    return run_on_ranks(every_case, 2, folder)


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("name", LAYOUTS, ids=["data parallel 2", *list(LAYOUTS)[1:]])
def test_two_ranks_decode_what_one_rank_decodes(folder, world_of_one, two_ranks, name, case):
    expected = [Trajectory.from_json(line) for line in generate(folder, ParallelConfig(), SETTINGS[case])]
    by_rank = [rank[name, case] for rank in two_ranks]
    if LAYOUTS[name].tensor_model_parallel_size == 2:
        assert by_rank[0] == by_rank[1], "tensor-parallel ranks decode the same"
        by_rank = by_rank[:1]
    actual = {t.prompt_id: t for lines in by_rank for t in map(Trajectory.from_json, lines)}
    assert len(actual) == sum(map(len, by_rank)) == len(expected)
    for trajectory in expected:
        other = actual[trajectory.prompt_id]
        assert other.terminal_ids_T.equal(trajectory.terminal_ids_T)
        assert other.step_map_R.equal(trajectory.step_map_R)
        assert (other.log_probs_R - trajectory.log_probs_R).abs().max() <= 1e-5
        assert (other.response_length, other.stop_reason) == (trajectory.response_length, trajectory.stop_reason)


def test_seed_and_step_change_what_is_drawn(folder, world_of_one):
    """Otherwise the equality above could come from draws that do not depend on anything."""
    from megatron_opdlm.rollout.engine import RolloutEngine, RolloutTask

    rollout = RolloutConfig(max_new_tokens=12, dynamic_threshold=0.12)
    with layout(ParallelConfig()) as groups:
        model, special = load_student(tiny_config(folder, rollout=rollout), groups)
        responses = set()
        for seed, step, sample in ((3, 2, 0), (4, 2, 0), (3, 3, 0), (3, 2, 1)):
            task = RolloutTask(prompts()[0], 12, sample_index=sample)
            (trajectory,) = RolloutEngine(model, rollout, special, seed).generate([task], step)
            responses.add(tuple(trajectory.terminal_ids_T.tolist()))
    assert len(responses) == 4


def share_work(rank: int, folder: Path) -> tuple[int, int, float]:
    """Sequences that this rank decoded, its forwards, and its idle seconds; every second task is a long one."""
    from megatron_opdlm.rollout.engine import RolloutEngine, RolloutTask

    rollout = RolloutConfig(remasking_strategy="low_confidence_static", batch_size=2)
    with layout(ParallelConfig()) as groups:
        model, special = load_student(tiny_config(folder, rollout=rollout), groups)
        special = dataclasses.replace(special, end_token_ids=())
        engine = RolloutEngine(model, rollout, special, seed=3, groups=groups)
        four = Prompt(prompt_id=0, token_ids=(1, 2, 3, 4))
        tasks = [RolloutTask(four, 64 if index % 2 else 4, sample_index=index) for index in range(16)]
        trajectories = engine.generate(tasks, step=2)
        assert [t.sample_index for t in trajectories] == list(range(groups.dp.rank(), 16, 2))
        statistics = engine.statistics
    return statistics.num_tokens, statistics.num_forwards, statistics.idle_seconds


def test_ranks_share_the_work_and_get_what_belongs_to_them(folder):
    """A fixed split would give one rank eight sequences of 64 tokens, two at a time: 256 forwards; and the other 16."""
    results = run_on_ranks(share_work, 2, folder)
    assert sum(tokens for tokens, _, _ in results) == 8 * 64 + 8 * 4
    assert max(forwards for _, forwards, _ in results) <= 160
    assert all(seconds >= 0 for _, _, seconds in results)
    again = run_on_ranks(share_work, 2, folder)
    assert [rank[:2] for rank in again] == [rank[:2] for rank in results], "the split follows from the work, not time"
