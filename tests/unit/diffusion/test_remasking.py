"""Remasking strategies against a literal, slow reading of the method."""

from __future__ import annotations

import random
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opdlm.config.method import RemaskingStrategy
from megatron_opdlm.diffusion.blocks import commit_schedule
from megatron_opdlm.diffusion.remasking import REMASKING_STRATEGIES, select_commits
from tests.slow_remasking import commits_slowly

STATIC, DYNAMIC, SEQUENTIAL, ENTROPY = (
    "low_confidence_static",
    "low_confidence_dynamic",
    "sequential",
    "entropy_bounded",
)
STRATEGIES = [STATIC, DYNAMIC, SEQUENTIAL, ENTROPY]
# Few values and a threshold among them, all exact in float32, so that ties and equality with the threshold are common.
CONFIDENCES = [0.0, 0.25, 0.5, 0.75, 1.0]
# Eighths add up without rounding, so that sums often are the bound.
ENTROPIES = [0.0, 0.125, 0.25, 0.5, 2.0]
BLOCKS_PER_EXAMPLE, NUM_EXAMPLES = 64, 160


def random_blocks(rng: random.Random, block_size: int, num_steps: int) -> list[dict]:
    """What `select_commits` and the oracle are told about each block; rows are at different steps."""
    schedule, blocks = commit_schedule(block_size, num_steps).tolist(), []
    for _ in range(BLOCKS_PER_EXAMPLE):
        step, share_masked = rng.randrange(num_steps), rng.choice([0.0, 0.3, 0.7, 1.0])
        few = rng.random() < 0.7  # values, or else any
        blocks.append(
            {
                "confidences": [rng.choice(CONFIDENCES) if few else rng.random() for _ in range(block_size)],
                "entropies": [rng.choice(ENTROPIES) if few else 3 * rng.random() for _ in range(block_size)],
                "is_masked": [rng.random() < share_masked for _ in range(block_size)],
                "num_to_commit": schedule[step],
                "is_last_step": step == num_steps - 1,
            }
        )
    return blocks


def column(blocks: list[dict], name: str) -> torch.Tensor:
    return torch.tensor([block[name] for block in blocks])


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=NUM_EXAMPLES, deadline=None, derandomize=True)
@given(
    st.integers(1, 16).flatmap(lambda size: st.tuples(st.just(size), st.integers(1, size))),
    st.integers(0, 2**32),
    st.sampled_from(CONFIDENCES),
    st.sampled_from([0.0, 0.125, 0.375, 1.0, 100.0]),
)
def test_every_block_commits_what_the_literal_rule_says(strategy, sizes, seed, threshold, bound):
    """160 examples times 64 blocks, 10,240 of each strategy."""
    blocks = random_blocks(random.Random(seed), *sizes)
    # float32 numbers, so that both sides compare and add up the same ones
    confidence_BK, entropy_BK = column(blocks, "confidences"), column(blocks, "entropies")
    is_masked_BK, is_last_step_B = column(blocks, "is_masked"), column(blocks, "is_last_step")
    is_committed_BK = select_commits(
        strategy,
        confidence_BK,
        is_masked_BK,
        column(blocks, "num_to_commit"),
        is_last_step_B,
        dynamic_threshold=threshold,
        entropy_BK=entropy_BK,
        entropy_bound=bound,
    )
    assert not (is_committed_BK & ~is_masked_BK).any(), "only masked positions are committed"
    assert is_committed_BK[is_last_step_B].equal(is_masked_BK[is_last_step_B]), "the last step commits all"
    assert is_committed_BK.any(1).equal(is_masked_BK.any(1)), "every step gets on"
    for row, block in enumerate(blocks):
        rounded = {"confidences": confidence_BK[row].tolist(), "entropies": entropy_BK[row].tolist()}
        expected = commits_slowly(strategy, **(block | rounded), threshold=threshold, entropy_bound=bound)
        assert set(is_committed_BK[row].nonzero()[:, 0].tolist()) == expected


def commit_one(
    strategy, confidence, is_masked, num_to_commit, threshold=0.9, is_last_step=False, entropy=None, bound=0.0
):
    """`entropy` is by default the complement of the confidence, so that both mean the same order."""
    confidence_BK = torch.tensor([confidence])
    committed_BK = select_commits(
        strategy,
        confidence_BK,
        torch.tensor([is_masked]).bool(),
        torch.tensor([num_to_commit]),
        torch.tensor([is_last_step]),
        dynamic_threshold=threshold,
        entropy_BK=1 - confidence_BK if entropy is None else torch.tensor([entropy]),
        entropy_bound=bound,
    )
    assert committed_BK.dtype == torch.bool
    return committed_BK[0].int().tolist()


def test_static_commits_the_most_confident_masked_positions():
    assert commit_one(STATIC, [0.1, 0.9, 0.3, 0.2], [1, 0, 1, 1], 2) == [0, 0, 1, 1]


def test_static_does_not_look_at_the_threshold():
    assert commit_one(STATIC, [0.95, 0.99, 0.97, 0.2], [1, 1, 1, 1], 1) == [0, 1, 0, 0]


def test_dynamic_commits_everything_above_the_threshold():
    assert commit_one(DYNAMIC, [0.95, 0.99, 0.97, 0.2], [1, 1, 1, 1], 1) == [1, 1, 1, 0]


def test_dynamic_falls_back_to_the_most_confident():
    assert commit_one(DYNAMIC, [0.95, 0.2, 0.5, 0.4], [1, 1, 1, 1], 2) == [1, 0, 1, 0]


def test_a_confidence_equal_to_the_threshold_is_not_above_it():
    assert commit_one(DYNAMIC, [0.75, 0.875, 0.75, 0.75], [1, 1, 1, 1], 1, threshold=0.75) == [0, 1, 0, 0]


def test_sequential_commits_the_first_masked_positions_however_sure_the_others_are():
    assert commit_one(SEQUENTIAL, [0.1, 0.99, 0.2, 0.99], [1, 0, 1, 1], 2) == [1, 0, 1, 0]


def test_entropy_bounded_commits_while_the_sum_stays_within_the_bound():
    entropy = [0.5, 0.125, 2.0, 0.25]
    commits = [commit_one(ENTROPY, [0.0] * 4, [1] * 4, 1, entropy=entropy, bound=b) for b in (0.37, 0.375, 0.875, 3)]
    assert commits == [[0, 1, 0, 0], [0, 1, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1]]


def test_entropy_bounded_commits_one_position_beyond_the_bound_and_leaves_out_those_not_masked():
    assert commit_one(ENTROPY, [0.0] * 4, [1, 0, 1, 1], 1, entropy=[2.0, 0.0, 1.5, 1.5], bound=0.1) == [0, 0, 1, 0]
    assert commit_one(ENTROPY, [0.0] * 4, [1, 0, 1, 1], 1, entropy=[0.2, 5.0, 0.2, 0.2], bound=0.7) == [1, 0, 1, 1]


def test_entropy_bounded_needs_entropies():
    one = torch.ones(1, dtype=torch.int64)
    with pytest.raises(AssertionError, match="needs the entropies"):
        select_commits(ENTROPY, torch.rand(1, 1), one[None].bool(), one, one.bool(), dynamic_threshold=0.9)


@pytest.mark.parametrize("strategy", [STATIC, DYNAMIC])
def test_ties_break_towards_the_lower_position(strategy):
    assert commit_one(strategy, [0.25, 0.5, 0.5, 0.5], [1, 1, 1, 1], 2) == [0, 1, 1, 0]
    # Long enough that an unstable sort would mix the ties up.
    assert commit_one(strategy, [0.5] * 64, [1] * 64, 20) == [1] * 20 + [0] * 44


def test_ties_in_entropy_break_towards_the_lower_position():
    assert commit_one(ENTROPY, [0.5] * 64, [1] * 64, 1, bound=10.0) == [1] * 20 + [0] * 44


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_last_allowed_step_commits_everything_left(strategy):
    assert commit_one(strategy, [0.1, 0.9, 0.3, 0.2], [1, 0, 1, 1], 1, is_last_step=True) == [1, 0, 1, 1]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_clean_block_commits_nothing(strategy):
    assert commit_one(strategy, [0.99, 0.99, 0.99, 0.99], [0, 0, 0, 0], 2) == [0, 0, 0, 0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_defect_7_prompt_tokens_are_not_overwritten_when_fewer_masks_than_n_of_s_remain(strategy):
    # Three prompt tokens share the block with one masked position; two are to be committed, also at the last step.
    for is_last_step in (False, True):
        assert commit_one(strategy, [0.99, 0.99, 0.99, 0.1], [0, 0, 0, 1], 2, is_last_step=is_last_step) == [0, 0, 0, 1]


def test_defect_9_a_bfloat16_confidence_is_refused_since_it_quantises_the_threshold():
    confidence_BK = torch.tensor([[0.9001, 0.5]])
    assert not (confidence_BK.bfloat16() > 0.9).any() and (confidence_BK > 0.9).any()
    arguments = (torch.tensor([[True, True]]), torch.tensor([1]), torch.tensor([False]))
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(AssertionError, match="quantises the threshold"):
            select_commits(DYNAMIC, confidence_BK.to(dtype), *arguments, dynamic_threshold=0.9)
    for dtype in (torch.float32, torch.float64):
        select_commits(DYNAMIC, confidence_BK.to(dtype), *arguments, dynamic_threshold=0.9)


def test_the_table_holds_exactly_the_strategies_of_the_settings():
    assert set(REMASKING_STRATEGIES) == set(get_args(RemaskingStrategy)) == set(STRATEGIES)


def test_an_unknown_strategy_is_refused_by_name():
    with pytest.raises(ValueError, match=r"rollout\.remasking_strategy \(best\) must be one of low_confidence_static"):
        commit_one("best", [0.5], [1], 1)
