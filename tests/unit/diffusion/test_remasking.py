"""Remasking strategies against a literal, slow reading of the method."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opdlm.config.schema import RemaskingStrategy
from megatron_opdlm.diffusion.remasking import REMASKING_STRATEGIES, select_commits

STATIC, DYNAMIC = "low_confidence_static", "low_confidence_dynamic"
# Few values and a threshold among them, all exact in float32, so that ties and equality with the threshold are common.
CONFIDENCES = [0.0, 0.25, 0.5, 0.75, 1.0]


def reference_commits(strategy, confidence, is_masked, num_to_commit, threshold, is_last_step):
    """The method's rule for one block, position by position: the set of positions to commit."""
    masked = [i for i in range(len(confidence)) if is_masked[i]]
    if is_last_step or len(masked) < num_to_commit:
        return set(masked)
    if strategy == DYNAMIC:
        above = [i for i in masked if confidence[i] > threshold]
        if len(above) >= num_to_commit:
            return set(above)
    chosen, left = set(), list(masked)
    for _ in range(num_to_commit):
        best = left[0]
        for i in left:
            if confidence[i] > confidence[best]:
                best = i
        chosen.add(best)
        left.remove(best)
    return chosen


@st.composite
def batches(draw):
    block_size = draw(st.integers(1, 6))
    row = st.tuples(
        st.lists(st.sampled_from(CONFIDENCES), min_size=block_size, max_size=block_size),
        st.lists(st.booleans(), min_size=block_size, max_size=block_size),
        st.integers(1, block_size),
        st.booleans(),
    )
    return draw(st.lists(row, min_size=1, max_size=4))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(batches(), st.sampled_from([STATIC, DYNAMIC]), st.sampled_from(CONFIDENCES))
def test_every_row_commits_what_the_literal_rule_says(batch, strategy, threshold):
    confidence, is_masked, num_to_commit, is_last = (list(column) for column in zip(*batch, strict=True))
    committed_BK = select_commits(
        strategy,
        torch.tensor(confidence),
        torch.tensor(is_masked),
        torch.tensor(num_to_commit),
        threshold,
        torch.tensor(is_last),
    )
    for row, (row_confidence, row_masked, count, last) in enumerate(batch):
        expected = reference_commits(strategy, row_confidence, row_masked, count, threshold, last)
        assert set(committed_BK[row].nonzero()[:, 0].tolist()) == expected


def commit_one(strategy, confidence, is_masked, num_to_commit, threshold=0.9, is_last_step=False):
    committed_BK = select_commits(
        strategy,
        torch.tensor([confidence]),
        torch.tensor([is_masked]).bool(),
        torch.tensor([num_to_commit]),
        threshold,
        torch.tensor([is_last_step]),
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


@pytest.mark.parametrize("strategy", [STATIC, DYNAMIC])
def test_ties_break_towards_the_lower_position(strategy):
    assert commit_one(strategy, [0.25, 0.5, 0.5, 0.5], [1, 1, 1, 1], 2) == [0, 1, 1, 0]
    # Long enough that an unstable sort would mix the ties up.
    assert commit_one(strategy, [0.5] * 64, [1] * 64, 20) == [1] * 20 + [0] * 44


@pytest.mark.parametrize("strategy", [STATIC, DYNAMIC])
def test_the_last_allowed_step_commits_everything_left(strategy):
    assert commit_one(strategy, [0.1, 0.9, 0.3, 0.2], [1, 0, 1, 1], 1, is_last_step=True) == [1, 0, 1, 1]


@pytest.mark.parametrize("strategy", [STATIC, DYNAMIC])
def test_a_clean_block_commits_nothing(strategy):
    assert commit_one(strategy, [0.99, 0.99, 0.99, 0.99], [0, 0, 0, 0], 2) == [0, 0, 0, 0]


@pytest.mark.parametrize("strategy", [STATIC, DYNAMIC])
def test_defect_7_prompt_tokens_are_not_overwritten_when_fewer_masks_than_n_of_s_remain(strategy):
    # Three prompt tokens share the block with one masked position; two are to be committed, also at the last step.
    for is_last_step in (False, True):
        assert commit_one(strategy, [0.99, 0.99, 0.99, 0.1], [0, 0, 0, 1], 2, is_last_step=is_last_step) == [0, 0, 0, 1]


def test_defect_9_a_bfloat16_confidence_is_refused_since_it_quantises_the_threshold():
    confidence_BK = torch.tensor([[0.9001, 0.5]])
    assert not (confidence_BK.bfloat16() > 0.9).any() and (confidence_BK > 0.9).any()
    arguments = (torch.tensor([[True, True]]), torch.tensor([1]), 0.9, torch.tensor([False]))
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(AssertionError, match="quantises the threshold"):
            select_commits(DYNAMIC, confidence_BK.to(dtype), *arguments)
    for dtype in (torch.float32, torch.float64):
        select_commits(DYNAMIC, confidence_BK.to(dtype), *arguments)


def test_the_table_holds_exactly_the_strategies_of_the_settings():
    assert set(REMASKING_STRATEGIES) == set(get_args(RemaskingStrategy))


def test_an_unknown_strategy_is_refused_by_name():
    with pytest.raises(ValueError, match=r"rollout\.remasking_strategy \(best\) must be one of low_confidence_static"):
        commit_one("best", [0.5], [1], 1)
