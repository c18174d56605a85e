"""The cross-entropy with its vocabulary split over two ranks is the one of the whole vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_opdlm.parallel.vocabulary_shard import VocabularyShard
from tests.ranks import run_on_ranks
from tests.slow_divergences import MASK_TOKEN_ID, NUM_ROWS, VOCAB_SIZE, assert_same
from tests.unit.test_cross_entropy import plain_cross_entropy, random_student, with_gradients

CHUNK_SIZES = [1, 7, 100]


def on_rank(rank: int) -> list[dict[str, torch.Tensor]]:
    num_rows = NUM_ROWS // 2
    shard = VocabularyShard(rank * num_rows, num_rows, VOCAB_SIZE, MASK_TOKEN_ID, group=dist.group.WORLD)
    results = []
    for chunk_size in CHUNK_SIZES:
        inputs = random_student()
        rows = inputs["weight_VH"].detach()[shard.first : shard.first + num_rows]
        inputs["weight_VH"] = rows.clone().requires_grad_()
        results.append(with_gradients(inputs, shard=shard, chunk_size=chunk_size))
    return results


@pytest.fixture(scope="module")
def both_ranks() -> list[list[dict[str, torch.Tensor]]]:
    return run_on_ranks(on_rank, 2)


@pytest.mark.parametrize("case", range(len(CHUNK_SIZES)), ids=map(str, CHUNK_SIZES))
def test_values_and_gradients_on_two_ranks_match_the_plain_formula(both_ranks, case):
    first, second = (results[case] for results in both_ranks)
    whole_weight = {"weight_gradient": torch.cat([first["weight_gradient"], second["weight_gradient"]])}
    for actual in (first, second):
        assert_same(actual | whole_weight, plain_cross_entropy(random_student()), 1e-12)
