"""The teacher's filters on one rank, against a distribution that is filtered one token after the other."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opdlm.config.schema import DivergenceConfig
from megatron_opdlm.distillation.teacher_filters import filter_target_
from megatron_opdlm.parallel.vocabulary_shard import VocabularyShard
from tests.slow_divergences import target_slowly

# logarithms of 8, 4, 2, 1, 1 sixteenths, out of order; token 1 is the most likely
SIXTEENTHS = [math.log(p / 16) for p in (1, 8, 2, 1, 4)]


def target(logits: list[float], dtype: torch.dtype = torch.float32, **filters) -> list[float]:
    """The filtered distribution, one probability per token."""
    logits_CV = torch.tensor([logits], dtype=dtype)
    size = len(logits)
    filter_target_(logits_CV, DivergenceConfig(**filters), VocabularyShard(0, size, size, size, group=None))
    return logits_CV.double().softmax(-1)[0].tolist()


def kept(**filters) -> list[int]:
    return [token for token, probability in enumerate(target(SIXTEENTHS, **filters)) if probability > 0]


@pytest.mark.parametrize(
    ("filters", "tokens"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"teacher_top_k": 1}, [1]),
        ({"teacher_top_k": 4}, [0, 1, 2, 4]),  # of two equal ones the lower id
        ({"teacher_top_k": 99}, [0, 1, 2, 3, 4]),
        ({"teacher_top_p": 0.49}, [1]),
        ({"teacher_top_p": 0.51}, [1, 4]),
        ({"teacher_top_p": 0.9}, [0, 1, 2, 4]),
        ({"teacher_min_p": 0.24}, [1, 2, 4]),
        ({"teacher_min_p": 0.26}, [1, 4]),
        ({"teacher_min_p": 1.0}, [1]),
        # three tokens have 14 sixteenths, of which 0.85 is less than the first two have
        ({"teacher_top_k": 3, "teacher_top_p": 0.85}, [1, 4]),
        # probabilities go with the square: 64, 16, 4, 1, 1
        ({"teacher_temperature": 0.5, "teacher_min_p": 0.24}, [1, 4]),
        ({"teacher_temperature": 2.0, "teacher_min_p": 0.36}, [1, 2, 4]),
    ],
    ids=str,
)
def test_what_a_filter_keeps_is_what_hand_arithmetic_keeps(filters, tokens):
    assert kept(**filters) == tokens


def filter_settings() -> st.SearchStrategy:
    return st.fixed_dictionaries(
        {
            "teacher_temperature": st.sampled_from([0.5, 1.0, 2.0]),
            "teacher_top_k": st.integers(0, 8),
            "teacher_top_p": st.sampled_from([0.123, 0.456, 0.789, 1.0]),
            "teacher_min_p": st.sampled_from([0.0, 0.0123, 0.345]),
        }
    )


@settings(deadline=None, max_examples=200)
@given(
    # a coarse grid, so that logits are often equal, and -inf, so that some tokens take no part
    logits=st.lists(st.sampled_from([-math.inf, -2.0, -1.0, 0.0, 1.0, 2.0]), min_size=7, max_size=7).filter(
        lambda values: max(values) > -math.inf
    ),
    filters=filter_settings(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_target_is_the_slowly_filtered_distribution(logits, filters, dtype):
    expected = target_slowly(logits, DivergenceConfig(**filters))
    assert target(logits, dtype, **filters) == pytest.approx(expected, abs=1e-6)


def test_without_filters_the_logits_stay_as_they_are():
    logits_CV = torch.tensor([SIXTEENTHS])
    before_CV = logits_CV.clone()
    filter_target_(logits_CV, DivergenceConfig(), VocabularyShard(0, 5, 5, 5, group=None))
    assert logits_CV.equal(before_CV)
